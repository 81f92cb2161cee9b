"""To whom the appliance listens: each mode, the time for which it was asked to, and a wake phrase on its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from listening import Clock, Exactly
from prometheus_client import REGISTRY

from edge_asr.attention import ALWAYS, PHRASE, PUSH_TO_TALK, Attention
from edge_asr.recognizer.tokens import join
from edge_asr.types import Recognition, Token


def said(text: str) -> Recognition:
    return Recognition(text, tuple(Token(character, 0, 1, 0.9) for character in text), 0.9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(clock: Clock) -> Callable[[str], Attention]:
    return lambda mode: Attention(mode, Exactly("小爱同学"), 8.0, clock)


def unaddressed(mode: str) -> float:
    return REGISTRY.get_sample_value("edge_asr_unaddressed_total", {"mode": mode}) or 0.0


def test_always_is_everybody(make: Callable[[str], Attention], clock: Clock) -> None:
    attention = make(ALWAYS)
    assert attention.hears(clock.now)
    assert attention.admit(said("打开灯"), clock.now) == said("打开灯")


def test_push_to_talk_hears_nobody_until_it_is_asked_to(make: Callable[[str], Attention], clock: Clock) -> None:
    attention = make(PUSH_TO_TALK)
    assert not attention.hears(clock.now)
    assert attention.listen() == 8.0
    assert attention.hears(clock.now)
    assert attention.hears(clock.now + 7.9)
    assert attention.admit(said("打开灯"), clock.now + 7.9) == said("打开灯")
    assert not attention.hears(clock.now + 8.1)


def test_what_began_a_moment_before_the_button_was_pressed_is_heard_and_what_began_long_before_is_not(
    make: Callable[[str], Attention], clock: Clock
) -> None:
    attention = make(PUSH_TO_TALK)
    attention.listen()
    assert attention.hears(clock.now - 0.9)
    assert not attention.hears(clock.now - 1.1)
    assert attention.admit(said("我们先不说这个"), clock.now - 20) is None


def test_what_waits_for_its_recognition_is_not_forgotten_when_it_is_asked_again(
    make: Callable[[str], Attention], clock: Clock
) -> None:
    attention = make(PUSH_TO_TALK)
    attention.listen(2.0)
    began_at, clock.now = clock.now + 1.9, clock.now + 20
    attention.listen(2.0)
    assert attention.admit(said("打开灯"), began_at) == said("打开灯")
    assert not attention.hears(clock.now - 5), "nor is it what was said in between"


def test_who_asks_again_says_how_long_from_now_on(make: Callable[[str], Attention], clock: Clock) -> None:
    attention = make(PUSH_TO_TALK)
    attention.listen(60.0)
    began_at, clock.now = clock.now + 5, clock.now + 10
    attention.listen(2.0)
    assert attention.hears(began_at)
    assert not attention.hears(clock.now + 3)


def test_what_began_in_time_is_heard_to_its_end(make: Callable[[str], Attention], clock: Clock) -> None:
    attention = make(PUSH_TO_TALK)
    attention.listen(2.0)
    began_at, clock.now = clock.now + 1.9, clock.now + 20
    assert attention.hears(began_at)
    assert attention.admit(said("打开灯"), began_at) is not None


def test_listening_can_be_ended(make: Callable[[str], Attention], clock: Clock) -> None:
    attention = make(PUSH_TO_TALK)
    attention.listen()
    attention.ignore()
    assert not attention.hears(clock.now)


def test_only_what_follows_the_wake_phrase_is_let_through(make: Callable[[str], Attention], clock: Clock) -> None:
    attention, before = make(PHRASE), unaddressed(PHRASE)
    assert attention.hears(clock.now), "or it could not be told"
    found = attention.admit(said("小爱同学打开灯"), clock.now)
    assert found is not None
    assert (found.text, join([token.text for token in found.tokens])) == ("打开灯", "打开灯")
    assert attention.admit(said("我们打开灯吧"), clock.now) is None
    assert unaddressed(PHRASE) == before + 1


def test_a_wake_phrase_on_its_own_makes_it_listen_for_a_while(make: Callable[[str], Attention], clock: Clock) -> None:
    attention, before = make(PHRASE), unaddressed(PHRASE)
    assert attention.admit(said("小爱同学"), clock.now) is None
    assert unaddressed(PHRASE) == before, "somebody did address us"
    assert attention.admit(said("打开灯"), clock.now + 7.9) == said("打开灯")
    assert attention.admit(said("打开灯"), clock.now + 8.1) is None


def test_what_followed_the_wake_phrase_is_heard_however_late_that_is_recognised(
    make: Callable[[str], Attention], clock: Clock
) -> None:
    attention = make(PHRASE)
    began_at, clock.now = clock.now, clock.now + 6
    assert attention.admit(said("小爱同学"), began_at) is None
    assert attention.admit(said("打开灯"), began_at + 2) == said("打开灯")
    assert attention.admit(said("打开灯"), began_at - 2) is None, "what was said before is nobody's still"


def test_who_is_asked_to_listen_needs_no_wake_phrase(make: Callable[[str], Attention], clock: Clock) -> None:
    attention = make(PHRASE)
    attention.listen(3.0)
    assert attention.admit(said("打开灯"), clock.now + 2) == said("打开灯")


def test_the_wake_phrase_is_left_out_while_it_listens_too(make: Callable[[str], Attention], clock: Clock) -> None:
    attention, before = make(PHRASE), unaddressed(PHRASE)
    attention.listen(3.0)
    assert attention.admit(said("小爱同学打开灯"), clock.now + 1) == said("打开灯")
    clock.now += 2
    assert attention.admit(said("小爱同学"), clock.now) is None
    assert unaddressed(PHRASE) == before
    assert attention.admit(said("打开灯"), clock.now + 7.9) == said("打开灯"), "and it listens anew"


def test_a_wake_phrase_in_one_room_does_not_open_the_ear_in_another(
    make: Callable[[str], Attention], clock: Clock
) -> None:
    attention = make(PHRASE)
    here, there = attention.ear(), attention.ear()
    assert here.admit(said("小爱同学"), clock.now) is None
    assert here.admit(said("打开灯"), clock.now + 1) == said("打开灯")
    assert there.admit(said("打开灯"), clock.now + 1) is None


def test_who_asks_is_heard_in_every_room_until_that_is_ended(make: Callable[[str], Attention], clock: Clock) -> None:
    attention = make(PUSH_TO_TALK)
    ears = attention.ear(), attention.ear()
    attention.listen(8.0)
    assert [ear.hears(clock.now + 1) for ear in ears] == [True] * 2
    attention.ignore()
    assert [ear.hears(clock.now + 1) for ear in ears] == [False] * 2


@pytest.mark.parametrize(
    ("text", "shown"), [("小", None), ("小爱同学", None), ("小爱同学打", "打"), ("打", "打"), ("小朋", "小朋")]
)
def test_of_what_may_become_the_wake_phrase_nothing_is_shown_while_it_listens(
    make: Callable[[str], Attention], clock: Clock, text: str, shown: str | None
) -> None:
    attention = make(PHRASE)
    attention.listen(3.0)
    found = attention.preview(said(text), clock.now)
    assert (found and found.text) == shown


def test_a_wake_phrase_from_before_it_was_told_to_ignore_opens_nothing(
    make: Callable[[str], Attention], clock: Clock
) -> None:
    attention, began_at = make(PHRASE), clock.now
    clock.now += 1
    attention.ignore()
    clock.now += 1
    assert attention.admit(said("小爱同学"), began_at) is None
    assert attention.admit(said("打开灯"), clock.now + 1) is None
    assert attention.admit(said("小爱同学"), clock.now) is None
    assert attention.admit(said("打开灯"), clock.now + 1) is not None


@pytest.mark.parametrize(
    ("mode", "text", "shown"),
    [
        (ALWAYS, "打开", "打开"),
        (PUSH_TO_TALK, "打开", None),
        (PHRASE, "打开", None),
        (PHRASE, "小爱", None),
        (PHRASE, "小爱同学", None),
        (PHRASE, "小爱同学打", "打"),
    ],
)
def test_what_grows_is_shown_once_it_is_known_to_be_for_us(
    make: Callable[[str], Attention], clock: Clock, mode: str, text: str, shown: str | None
) -> None:
    attention, before = make(mode), unaddressed(mode)
    found = attention.preview(said(text), clock.now)
    assert (found and found.text) == shown
    assert unaddressed(mode) == before
    assert not attention.hears(clock.now) or mode != PUSH_TO_TALK, "and nothing is changed by looking"
