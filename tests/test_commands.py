"""What a command on MQTT means, which are ignored, which are refused and what is answered: without a broker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr.errors import EdgeAsrError
from edge_asr.publish import commands
from edge_asr.publish.commands import CommandError, Commands, parse


class Clock:
    """Monotonic seconds that a test sets."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(commands, "time", clock)
    return clock


class Appliance:
    """Obeys everything, when told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.futures: list[Future[Mapping[str, Any]]] = []
        self.woken = 0
        self.commands = Commands("edge_asr/hall", self.obey, self.wake)

    def obey(self, name: str, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        self.asked.append((name, arguments))
        self.futures.append(Future())
        return self.futures[-1]

    def wake(self) -> None:
        self.woken += 1

    def receive(self, name: str, payload: str | bytes = b"", *, retained: bool = False) -> None:
        raw = payload.encode() if isinstance(payload, str) else payload
        self.commands.receive(f"edge_asr/hall/cmd/{name}", raw, retained)

    @property
    def answers(self) -> list[tuple[str, Mapping[str, Any]]]:
        """What has been answered on which topic."""
        return [(topic, json.loads(payload)) for topic, payload in self.commands.answers]


@pytest.mark.parametrize(
    ("name", "payload", "arguments"),
    [
        ("mute", "on", {"mute": True}),
        ("mute", " OFF\n", {"mute": False}),
        ("mute", "true", {"mute": True}),
        ("mute", "0", {"mute": False}),
        ("mute", '{"mute": true}', {"mute": True}),
        ("preset", "aggressive", {"preset": "aggressive"}),
        ("preset", '{"preset": "relaxed"}', {"preset": "relaxed"}),
        ("listen", "", {"seconds": None}),
        ("listen", "{}", {"seconds": None}),
        ("listen", '{"seconds": null}', {"seconds": None}),
        ("listen", '{"seconds": 8}', {"seconds": 8.0}),
        ("listen", '{"seconds": 120}', {"seconds": 120.0}),
        ("listen", '{"seconds": 0}', {"seconds": 0.0}),
        ("reload", "", {}),
        ("reload", " {}\n", {}),
        ("flush", "", {}),
        ("replay", '{"from_seq": 1}', {"from_seq": 1}),
        ("replay", '{"from_seq": 9223372036854775807}', {"from_seq": 2**63 - 1}),
    ],
)
def test_a_payload_becomes_typed_arguments(name: str, payload: str, arguments: Mapping[str, Any]) -> None:
    parsed = parse(name, payload.encode())
    assert parsed == arguments
    assert [type(value) for value in parsed.values()] == [type(value) for value in arguments.values()]


@pytest.mark.parametrize(
    ("name", "payload", "words"),
    [
        ("mute", "perhaps", "mute takes on or off"),
        ("mute", "{}", "mute takes on or off"),
        ("mute", '{"mute": 1}', "mute takes on or off"),
        ("mute", '{"mute": true, "for": 5}', "mute takes on or off"),
        ("preset", "fast", "preset takes aggressive, default or relaxed"),
        ("preset", '{"preset": ["default"]}', "preset takes aggressive, default or relaxed"),
        ("listen", "8", "listen takes nothing"),
        ("listen", '{"seconds": true}', "listen takes nothing"),
        ("listen", '{"seconds": 0.5}', "from 1 to 120"),
        ("listen", '{"seconds": 121}', "from 1 to 120"),
        ("listen", '{"seconds": NaN}', "from 1 to 120"),
        ("listen", '{"seconds": "8"}', "listen takes nothing"),
        ("listen", '{"second": 8}', "listen takes nothing"),
        ("listen", '{"seconds": 8', "listen takes nothing"),
        ("listen", "[" * 1024, "listen takes nothing"),
        ("listen", '{"seconds": false}', "0 ends it"),
        ("listen", '{"seconds": -1}', "from 1 to 120; 0 ends it"),
        ("reload", "now", "reload takes nothing; send an empty payload"),
        ("reload", '{"model": "/tmp"}', "reload takes nothing"),
        ("flush", "null", "flush takes nothing; send an empty payload"),
        ("replay", "", 'replay takes {"from_seq": n}'),
        ("replay", "7", "from 1 on"),
        ("replay", '{"from_seq": 0}', "from 1 on"),
        ("replay", '{"from_seq": true}', "from 1 on"),
        ("replay", '{"from_seq": 1.5}', "from 1 on"),
        ("replay", '{"from_seq": "1"}', "from 1 on"),
        ("replay", '{"from_seq": null}', "from 1 on"),
        ("replay", '{"from_seq": 1, "to_seq": 2}', "from 1 on"),
        ("replay", '{"from_seq": 9223372036854775808}', "from 1 on"),
        ("listen", " " * 1025, "the payload has 1025 bytes; 1024 are the limit"),
        ("explode", "now", "there is no command explode; there are mute, preset, listen, reload, flush, replay"),
    ],
)
def test_nonsense_is_refused_with_what_would_do(name: str, payload: str, words: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse(name, payload.encode())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(CommandError, match="not UTF-8"):
        parse("mute", b"\xff\xfe")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["mute", "preset", "seconds", "from_seq"]), inner),
    max_leaves=6,
)


@given(
    st.sampled_from([*commands.READERS, "explode"]),
    st.binary(max_size=1100) | JSON.map(lambda one: json.dumps(one).encode()),
)
def test_whatever_is_sent_becomes_typed_arguments_or_a_refusal_of_one_line(name: str, payload: bytes) -> None:
    try:
        arguments = parse(name, payload)
    except CommandError as error:
        why = str(error)
    else:
        _check(name, arguments)
        return
    assert len(why.splitlines()) == 1


def _check(name: str, arguments: Mapping[str, Any]) -> None:
    match name:
        case "mute":
            assert arguments["mute"] in (True, False)
        case "preset":
            assert arguments["preset"] in commands.PRESETS
        case "listen":
            assert arguments["seconds"] in (None, 0) or 1 <= arguments["seconds"] <= 120
        case "replay":
            assert 1 <= arguments["from_seq"] < 2**63
        case _:
            assert arguments == {}
    assert len(arguments) <= 1


def test_a_command_is_obeyed_and_answered_when_it_is_done() -> None:
    appliance = Appliance()
    appliance.receive("preset", "relaxed")
    assert appliance.asked == [("preset", {"preset": "relaxed"})]
    assert (appliance.answers, appliance.woken) == ([], 0)
    appliance.futures[0].set_result({"preset": "relaxed", "device": "客厅"})
    answer = {"ok": True, "preset": "relaxed", "device": "客厅"}
    assert appliance.answers == [("edge_asr/hall/cmd/preset/result", answer)]
    assert appliance.woken == 1


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (CommandError("there is no microphone to mute; add one to sources"), "there is no microphone to mute"),
        (EdgeAsrError("the engine is gone"), "the engine is gone"),
        (RuntimeError("internal detail"), "it failed; the log of the appliance says how"),
    ],
)
def test_a_command_that_fails_now_or_later_is_answered_with_the_reason(
    failure: Exception, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    appliance = Appliance()

    def refuse(name: str, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        raise failure

    appliance.receive("mute", "on")
    appliance.futures[0].set_exception(failure)
    appliance.commands._command = refuse
    appliance.receive("mute", "on")
    assert [(answer["ok"], answer["why"][: len(why)]) for _, answer in appliance.answers] == [(False, why)] * 2
    assert caplog.text.count("the command mute failed") == (2 if isinstance(failure, RuntimeError) else 0)


def test_a_command_given_up_or_answered_with_what_is_no_json_is_refused() -> None:
    appliance = Appliance()
    appliance.receive("mute", "on")
    appliance.receive("mute", "off")
    appliance.futures[0].cancel()
    appliance.futures[1].set_result({"mute": object()})
    assert [answer["ok"] for _, answer in appliance.answers] == [False, False]
    assert appliance.answers[0][1]["why"] == "it was given up"


RETAINED = [
    ("mute", "on"),
    ("preset", "default"),
    ("listen", '{"seconds": 8}'),
    ("reload", ""),
    ("flush", ""),
    ("replay", '{"from_seq": 1}'),
    ("replay", "nonsense"),
    ("explode", "now"),
]


def test_only_mute_and_preset_are_obeyed_when_retained_and_emptying_them_means_nothing() -> None:
    appliance = Appliance()
    for name, payload in RETAINED:
        appliance.receive(name, payload, retained=True)
    for retained in (True, False):  # the broker tells those who are there already without the mark
        for name in ("mute", "preset"):
            appliance.receive(name, retained=retained)
    assert [name for name, _ in appliance.asked] == ["mute", "preset"]
    assert appliance.answers == []


def test_a_repeat_within_five_seconds_is_ignored_but_for_mute_and_preset(clock: Clock) -> None:
    appliance = Appliance()
    for clock.now, seconds, obeyed in (
        (100.0, 8, True),
        (102.0, 9, True),  # another wish
        (104.9, 8, False),  # still a repeat, though another came between
        (105.1, 8, True),  # counted from the one obeyed, not from the one ignored
    ):
        before = len(appliance.asked)
        appliance.receive("listen", json.dumps({"seconds": seconds}))
        assert (len(appliance.asked) > before) == obeyed, clock.now
    for _ in range(3):
        appliance.receive("mute", "on")
        appliance.receive("preset", "default")
    assert len(appliance.asked) == 9
    assert appliance.answers == []  # ignored, not refused


@pytest.mark.parametrize(
    ("name", "payload", "same"),
    [("reload", "", "{}"), ("flush", "", " "), ("replay", '{"from_seq": 7}', '{"from_seq":7}')],
)
def test_the_same_wish_in_other_words_is_a_repeat_too(clock: Clock, name: str, payload: str, same: str) -> None:
    appliance = Appliance()
    for sent in (payload, payload, same):
        appliance.receive(name, sent)
    assert len(appliance.asked) == 1
    assert appliance.answers == []
    clock.now += 5
    appliance.receive(name, same)
    assert len(appliance.asked) == 2


def test_a_button_that_is_pressed_released_and_pressed_again_is_no_repeat(clock: Clock) -> None:
    appliance = Appliance()
    for seconds in (8, 0, 0, 8, 8, 0, 8):
        appliance.receive("listen", json.dumps({"seconds": seconds}))
    assert [arguments["seconds"] for _, arguments in appliance.asked] == [8, 0, 8, 0, 8]


def test_what_is_obeyed_on_the_spot_is_not_asked_of_the_appliance_and_is_answered_as_well() -> None:
    appliance = Appliance()
    asked: list[Mapping[str, Any]] = []

    def replay(arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        asked.append(arguments)
        done: Future[Mapping[str, Any]] = Future()
        done.set_result({"rows": 3})
        return done

    def flush(arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        raise EdgeAsrError("the outbox is closed")

    local = {"replay": replay, "flush": flush}
    appliance.commands = Commands("edge_asr/hall", appliance.obey, appliance.wake, local)
    appliance.receive("replay", '{"from_seq": 4}')
    appliance.receive("flush")
    appliance.receive("reload")
    assert asked == [{"from_seq": 4}]
    assert appliance.asked == [("reload", {})]
    assert appliance.answers == [
        ("edge_asr/hall/cmd/replay/result", {"ok": True, "rows": 3}),
        ("edge_asr/hall/cmd/flush/result", {"ok": False, "why": "the outbox is closed"}),
    ]


def test_a_refused_command_may_be_sent_again_at_once(clock: Clock) -> None:
    appliance = Appliance()
    for _ in range(2):
        appliance.receive("listen", '{"seconds": 500}')
    assert len(appliance.answers) == 2


def test_what_is_remembered_of_obeyed_commands_ends_with_its_time(clock: Clock) -> None:
    appliance = Appliance()
    for number in range(300):
        clock.now += 0.1
        appliance.receive("listen", json.dumps({"seconds": 1 + number / 10}))
        appliance.futures[-1].set_result({})
    assert len(appliance.asked) == 300
    assert len(appliance.commands._obeyed) <= 51


def test_more_than_twenty_commands_in_a_second_are_refused_until_it_is_over(clock: Clock) -> None:
    appliance = Appliance()
    for _ in range(25):
        appliance.receive("mute", "on")
    assert len(appliance.asked) == 20
    assert [answer["why"] for _, answer in appliance.answers] == ["more than 20 commands in a second; send fewer"] * 5
    clock.now += 1.0
    appliance.receive("mute", "off")
    assert len(appliance.asked) == 21


def test_mute_gets_through_however_much_else_comes(clock: Clock) -> None:
    appliance = Appliance()
    for count in range(100):
        appliance.receive(f"x{count}", "on")
        appliance.receive("listen", json.dumps({"seconds": 1 + count}))
        appliance.receive("replay", json.dumps({"from_seq": 1 + count}))
    appliance.receive("mute", "on")
    assert appliance.asked[-1] == ("mute", {"mute": True})
    assert len(appliance.asked) == 21


def test_what_was_retained_once_is_not_obeyed_again_on_the_next_connection(clock: Clock) -> None:
    appliance = Appliance()
    appliance.commands.subscribed()
    appliance.receive("mute", "off", retained=True)
    appliance.receive("mute", "on")
    appliance.commands.subscribed()
    appliance.receive("mute", "off", retained=True)
    assert [arguments["mute"] for _, arguments in appliance.asked] == [False, True]
    appliance.receive("mute", "on", retained=True)
    appliance.receive("mute", "off", retained=True)
    assert [arguments["mute"] for _, arguments in appliance.asked] == [False, True, True, False]


def test_what_is_retained_while_we_are_there_is_a_new_wish(clock: Clock) -> None:
    appliance = Appliance()
    appliance.commands.subscribed()
    appliance.receive("mute", "off", retained=True)
    appliance.receive("mute", "on")
    clock.now += commands.KEPT_S
    appliance.receive("mute", "off", retained=True)
    appliance.receive("reload", retained=True)
    assert appliance.asked == [("mute", {"mute": muted}) for muted in (False, True, False)]


def test_commands_that_never_end_do_not_pile_up(clock: Clock) -> None:
    appliance = Appliance()
    for _ in range(100):
        clock.now += 1
        appliance.receive("mute", "on")
    assert len(appliance.asked) == commands.PENDING_LIMIT
    assert "still being obeyed" in appliance.answers[-1][1]["why"]
    appliance.futures[0].set_result({})
    clock.now += 1
    appliance.receive("mute", "on")
    assert len(appliance.asked) == commands.PENDING_LIMIT + 1


def test_answers_that_nobody_takes_drop_the_oldest(clock: Clock) -> None:
    appliance = Appliance()
    for number in range(100):
        clock.now += 1
        appliance.receive("mute", "on")
        appliance.futures[-1].set_result({"number": number})
    assert [answer["number"] for _, answer in appliance.answers] == list(range(100 - commands.ANSWERS_LIMIT, 100))


@pytest.mark.parametrize("name", ["mute/result", "mute/on/off", "", "x" * 65, "a b", "客厅", "$x"])
def test_a_topic_that_is_no_name_of_a_command_is_not_even_answered(name: str) -> None:
    appliance = Appliance()
    appliance.receive(name, "on")
    assert (appliance.asked, appliance.answers) == ([], [])


def test_a_topic_of_another_device_is_ignored() -> None:
    appliance = Appliance()
    appliance.commands.receive("edge_asr/kitchen/cmd/mute", b"on", False)
    assert (appliance.asked, appliance.answers) == ([], [])
