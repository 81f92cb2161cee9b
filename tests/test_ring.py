"""The ring between PortAudio's thread and the pipe, and what goes through the pipe."""

from __future__ import annotations

import threading

import pytest

from edge_asr.audio.messages import MessageReader, Report, Sound, pack_header, pack_report
from edge_asr.audio.ring import BlockRing


def block(number: int) -> bytes:
    return bytes([number % 256]) * 8


def test_blocks_come_out_as_they_went_in() -> None:
    ring, into = BlockRing(3, 8), bytearray(8)
    for number in range(10):
        ring.put(block(number), float(number), number == 4)
        slot = ring.take(into, 0)
        assert slot is not None
        assert (bytes(into), slot.captured_at, slot.overflowed, slot.dropped) == (block(number), number, number == 4, 0)
    assert ring.take(into, 0) is None


def test_a_short_block_keeps_its_length() -> None:
    ring, into = BlockRing(2, 8), bytearray(b"x" * 8)
    ring.put(b"abc", 0.0, False)
    slot = ring.take(into, 0)
    assert slot is not None
    assert into[: slot.size] == b"abc"


@pytest.mark.parametrize("size", [1, 4])
def test_a_full_ring_drops_the_oldest_and_counts_them(size: int) -> None:
    ring, into = BlockRing(size, 8), bytearray(8)
    for number in range(10):
        ring.put(block(number), float(number), number == 2)
    for number in range(10 - size, 10):
        slot = ring.take(into, 0)
        assert slot is not None
        assert (bytes(into), slot.captured_at) == (block(number), number)
        assert slot.dropped == (10 - size if number == 10 - size else 0)
    assert ring.take(into, 0) is None


def test_who_waits_is_woken_by_a_block_and_by_the_end() -> None:
    ring, into, taken = BlockRing(2, 8), bytearray(8), []
    waiting = threading.Thread(target=lambda: taken.extend([ring.take(into, 60), ring.take(into, 60)]))
    waiting.start()
    ring.put(block(7), 1.0, False)
    ring.close()
    waiting.join(30)
    assert not waiting.is_alive()
    assert taken[0] is not None
    assert taken[1] is None
    assert ring.closed


def test_many_blocks_pass_between_two_threads_whole_and_in_order() -> None:
    ring, into = BlockRing(4, 8), bytearray(8)

    def fill() -> None:
        for number in range(5000):
            ring.put(block(number), float(number), False)
        ring.close()

    filling = threading.Thread(target=fill)
    filling.start()
    expected = 0
    while (slot := ring.take(into, 10)) is not None:
        expected += slot.dropped
        assert (slot.captured_at, bytes(into)) == (expected, block(expected))
        expected += 1
    filling.join(30)
    assert expected == 5000


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_messages_do_not_depend_on_how_the_bytes_arrive(size: int) -> None:
    report = Report("open", "", 16_000, 2, "USB 麦克风")
    sent = pack_report(report) + pack_header(6, 12.5, True, 3) + b"sample" + pack_report(Report("waiting", "why"))
    reader = MessageReader()
    got = [message for start in range(0, len(sent), size) for message in reader.feed(sent[start : start + size])]
    assert got == [report, Sound(b"sample", 12.5, True, 3), Report("waiting", "why")]
