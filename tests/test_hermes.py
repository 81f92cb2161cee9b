"""Hermes: what goes out with each sentence, and what dialogue managers ask for: without a broker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_asr.config_mqtt import HermesConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.publish import hermes
from edge_asr.publish.commands import RATE_LIMIT
from edge_asr.publish.dialect import Greeting
from edge_asr.publish.hermes import Hermes
from edge_asr.types import iso_time

START = 1_750_000_000.0
"""Wall time of the tests' beginning."""
# As `AsrTextCaptured`, `AsrToken` and `AsrError` of rhasspy-hermes 0.6.2 read them.
TEXT_CAPTURED = {
    "text": str,
    "likelihood": float,
    "seconds": float,
    "siteId": str,
    "sessionId": str | None,
    "wakewordId": str | None,
    "asrTokens": list,
    "lang": str | None,
}
TOKEN = {"value": str, "confidence": float, "rangeStart": int, "rangeEnd": int, "time": dict | None}
ERROR = {"error": str, "siteId": str, "context": str | None, "sessionId": str | None}


def said(text: str, tokens: list[tuple[str, int | None, int | None]] | None = None, **keys: object) -> dict[str, Any]:
    content = {
        "text": text,
        "confidence": 0.9,
        "language": "zh",
        "end": iso_time(START + 1000),
        "latency_ms": {"response": 2.5},
        "tokens": [
            {"text": token, "start_ms": start, "end_ms": end, "confidence": 0.8} for token, start, end in tokens or ()
        ],
    }
    return {**content, **keys}


class Appliance:
    """Does what it is asked, at once or when told to, with Hermes beside it and a clock that a test moves."""

    def __init__(self, *, patient: bool = False, site_id: str | None = "hall") -> None:
        self.now = 0.0
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.futures: list[Future[Mapping[str, Any]]] = []
        self.woken = 0
        self.refusal: str | None = None
        self.patient = patient
        self.hermes = Hermes(
            HermesConfig(enabled=True, site_id=site_id),
            "hall",
            self.obey,
            self.wake,
            clock=lambda: self.now,
            wall=lambda: START + self.now,
        )

    def obey(self, name: str, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        self.asked.append((name, arguments))
        future: Future[Mapping[str, Any]] = Future()
        self.futures.append(future)
        if self.refusal is not None:
            future.set_exception(EdgeAsrError(self.refusal))
        elif not self.patient:
            future.set_result({})
        return future

    def wake(self) -> None:
        self.woken += 1

    def send(self, name: str, *, retained: bool = False, **request: object) -> None:
        self.hermes.receive(f"hermes/asr/{name}", json.dumps({"siteId": "hall", **request}).encode(), retained)

    def hear(self, text: str, **keys: object) -> list[dict[str, Any]]:
        return [json.loads(message.payload) for message in self.hermes.said(said(text, **keys))]  # type: ignore[arg-type]

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        """Let time pass; return topic and payload of what came up."""
        self.now += seconds
        return [(message.topic, json.loads(message.payload)) for message in self.hermes.take()]

    @property
    def mutes(self) -> list[bool]:
        return [arguments["mute"] for name, arguments in self.asked if name == "mute"]

    @property
    def listens(self) -> list[float]:
        return [arguments["seconds"] for name, arguments in self.asked if name == "listen"]


def test_a_sentence_is_a_text_captured() -> None:
    (message,) = Appliance().hermes.said(said("打开客厅灯"))
    assert (message.topic, message.qos, message.retain) == ("hermes/asr/textCaptured", 0, False)
    assert json.loads(message.payload) == {
        "text": "打开客厅灯",
        "likelihood": 0.9,
        "seconds": 0.0025,
        "siteId": "hall",
        "sessionId": None,
        "wakewordId": None,
        "lang": "zh",
        "asrTokens": [[]],
    }


def test_tokens_are_characters_and_words_with_their_place_in_the_text_and_in_time() -> None:
    tokens = [("打", 0, 120), ("开", 120, 240), ("li@@", 300, 400), ("ght", 400, 500), ("one", None, None)]
    (heard,) = Appliance().hear("打开 light one", tokens=tokens)
    assert [(word["value"], word["rangeStart"], word["rangeEnd"], word["time"]) for word in heard["asrTokens"][0]] == [
        ("打", 0, 1, {"start": 0.0, "end": 0.12}),
        ("开", 1, 2, {"start": 0.12, "end": 0.24}),
        ("light", 3, 8, {"start": 0.3, "end": 0.5}),
        ("one", 9, 12, None),
    ]
    assert all(heard["text"][word["rangeStart"] : word["rangeEnd"]] == word["value"] for word in heard["asrTokens"][0])


def test_what_the_text_does_not_hold_is_no_token() -> None:
    (heard,) = Appliance().hear("25度", tokens=[("二", 0, 9), ("十", 9, 20), ("五", 20, 30), ("度", 30, 40)])
    assert [token["value"] for token in heard["asrTokens"][0]] == ["度"]


def test_every_field_has_the_type_that_rhasspy_reads() -> None:
    appliance = Appliance()
    (heard,) = appliance.hear("light 灯", tokens=[("light", 0, 10), ("灯", None, None)])
    assert heard.keys() == TEXT_CAPTURED.keys()
    assert all(isinstance(heard[key], kind) for key, kind in TEXT_CAPTURED.items())
    assert all(isinstance(token[key], kind) for token in heard["asrTokens"][0] for key, kind in TOKEN.items())
    appliance.refusal = "muted"
    appliance.send("startListening", sessionId="s")
    (_, error), (_, empty) = appliance.wait(0)
    assert error.keys() == ERROR.keys()
    assert all(isinstance(error[key], kind) for key, kind in ERROR.items())
    assert all(isinstance(empty[key], kind) for key, kind in TEXT_CAPTURED.items())


def test_an_unknown_confidence_is_no_doubt() -> None:
    (heard,) = Appliance().hear("开灯", confidence=None, latency_ms={})
    assert (heard["likelihood"], heard["seconds"]) == (1.0, 0.0)


def test_an_empty_text_is_not_told() -> None:
    assert Appliance().hear("") == []


def test_a_session_is_answered_with_the_next_sentence() -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId="s1", wakewordId="hey", lang="en", stopOnSilence=True)
    assert appliance.listens == [8.0]
    (heard,) = appliance.hear("开灯")
    assert (heard["sessionId"], heard["wakewordId"], heard["lang"]) == ("s1", "hey", "en")
    assert appliance.listens == [8.0, 0.0]  # nobody asks for more
    (after,) = appliance.hear("关灯")
    assert after["sessionId"] is None
    assert appliance.wait(100) == []


def test_the_wake_word_itself_is_not_the_answer() -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId="s1")
    (wake_word,) = appliance.hear("小爱同学", end=iso_time(START - 0.3))
    assert wake_word["sessionId"] is None
    (command,) = appliance.hear("开灯", end=iso_time(START + 2))
    assert command["sessionId"] == "s1"


def test_of_a_recording_nobody_knows_when_it_was_said() -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId="s1")
    (heard,) = appliance.hear("开灯", end=None)
    assert heard["sessionId"] == "s1"


def test_all_open_sessions_are_answered() -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId="s1")
    appliance.send("startListening", sessionId="s2")
    assert [heard["sessionId"] for heard in appliance.hear("开灯")] == ["s1", "s2"]


def test_a_session_that_hears_nothing_gets_an_empty_text_in_the_end() -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId="s1", lang="en")
    assert appliance.wait(8 + hermes.LAST_WORDS_S - 0.1) == []
    ((topic, empty),) = appliance.wait(0.2)
    assert topic == "hermes/asr/textCaptured"
    assert (empty["text"], empty["likelihood"], empty["sessionId"], empty["lang"]) == ("", 0.0, "s1", "en")
    assert empty["asrTokens"] == []
    assert appliance.wait(100) == []


def test_what_is_being_said_when_a_session_is_stopped_is_its_answer() -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId="s1")
    appliance.send("stopListening", sessionId="s1")
    assert appliance.listens == [8.0, 0.0]
    (heard,) = appliance.hear("开灯")
    assert heard["sessionId"] == "s1"
    assert appliance.listens == [8.0, 0.0]


def test_a_stopped_session_does_not_wait_long() -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId="s1")
    appliance.send("stopListening", sessionId="s1")
    appliance.send("stopListening", sessionId="s1")
    ((_, empty),) = appliance.wait(hermes.STOPPED_S)
    assert (empty["text"], empty["sessionId"]) == ("", "s1")
    assert appliance.listens == [8.0, 0.0]


def test_to_stop_what_has_ended_is_nothing() -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId="s1")
    appliance.hear("开灯")
    appliance.send("stopListening", sessionId="s1")
    appliance.send("stopListening", sessionId="other")
    assert appliance.wait(100) == []


def test_without_stop_on_silence_all_that_is_said_is_one_answer() -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId="s1", stopOnSilence=False)
    assert appliance.listens == [120.0]
    assert appliance.hear("打开", tokens=[("打", 0, 1), ("开", 1, 2)], confidence=0.7) == []
    assert appliance.hear("light", tokens=[("light", 5, 9)]) == []
    appliance.send("stopListening", sessionId="s1")
    ((_, heard),) = appliance.wait(hermes.STOPPED_S)
    assert (heard["text"], heard["likelihood"]) == ("打开 light", 0.7)
    assert [[(t["value"], t["rangeStart"]) for t in tokens] for tokens in heard["asrTokens"]] == [
        [("打", 0), ("开", 1)],
        [("light", 3)],
    ]


def test_asking_twice_is_asking_once_but_after_the_answer_it_is_a_new_question() -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId="s1")
    appliance.send("startListening", sessionId="s1")
    assert appliance.listens == [8.0]
    appliance.hear("开灯")
    appliance.send("stopListening", sessionId="s1")
    appliance.send("startListening", sessionId="s1")  # a dialogue goes on
    (heard,) = appliance.hear("客厅")
    assert heard["sessionId"] == "s1"


def test_a_session_that_is_stopped_and_started_again_waits_anew() -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId="s1")
    appliance.send("stopListening", sessionId="s1")
    appliance.send("startListening", sessionId="s1")
    assert appliance.wait(hermes.STOPPED_S) == []
    ((_, empty),) = appliance.wait(20)
    assert empty["sessionId"] == "s1"


def test_only_so_many_sessions_are_open() -> None:
    appliance = Appliance()
    for number in range(hermes.SESSIONS_LIMIT + 1):
        appliance.send("startListening", sessionId=f"s{number}")
    ((_, empty),) = appliance.wait(0)
    assert (empty["sessionId"], empty["text"]) == ("s0", "")


def test_only_so_many_requests_are_taken_in_a_second() -> None:
    appliance = Appliance()
    for number in range(RATE_LIMIT + 1):
        appliance.send("startListening", sessionId="s", lang=str(number))
    ((topic, error),) = appliance.wait(0)
    assert topic == "hermes/error/asr"
    assert "send fewer" in error["error"]
    assert len(appliance.listens) == RATE_LIMIT


def test_a_session_that_cannot_be_opened_is_told_why_and_does_not_wait() -> None:
    appliance = Appliance()
    appliance.refusal = "muted; send off to cmd/mute first"
    appliance.send("startListening", sessionId="s1")
    assert appliance.woken == 1
    (error_topic, error), (_, empty) = appliance.wait(0)
    assert error_topic == "hermes/error/asr"
    assert error == {"error": appliance.refusal, "context": "startListening", "siteId": "hall", "sessionId": "s1"}
    assert (empty["text"], empty["sessionId"]) == ("", "s1")


def test_a_command_that_breaks_is_an_error_in_words(caplog: pytest.LogCaptureFixture) -> None:
    appliance = Appliance(patient=True)
    appliance.send("toggleOff")
    appliance.futures[0].set_exception(ZeroDivisionError())
    appliance.send("startListening", sessionId="s1")
    appliance.futures[1].cancel()
    errors = [content["error"] for topic, content in appliance.wait(0) if topic == "hermes/error/asr"]
    assert errors == ["it failed; the log of the appliance says how", "it was given up"]
    assert "toggleOff failed" in caplog.text


def test_a_command_that_raises_at_once_is_an_error_too(caplog: pytest.LogCaptureFixture) -> None:
    def broken(name: str, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        raise RuntimeError("the loop is closed")

    dialect = Hermes(HermesConfig(enabled=True), "hall", broken, lambda: None)
    dialect.receive("hermes/asr/toggleOff", b'{"siteId": "hall"}', False)
    (message,) = dialect.take()
    assert message.topic == "hermes/error/asr"
    assert "the loop is closed" in caplog.text


def test_toggle_off_mutes_and_toggle_on_unmutes() -> None:
    appliance = Appliance()
    appliance.send("toggleOff")
    appliance.send("toggleOff")
    assert appliance.mutes == [True, True]  # somebody may have unmuted it meanwhile
    appliance.send("toggleOn")
    appliance.send("toggleOn")
    assert appliance.mutes[-2:] == [True, False]
    assert {arguments["by"] for _, arguments in appliance.asked} == {"hermes"}


def test_toggle_on_does_not_end_the_mute_of_somebody_else() -> None:
    appliance = Appliance()
    appliance.send("toggleOn")
    appliance.send("toggleOn", reason="ttsSay")
    assert appliance.mutes == []


def test_it_is_muted_until_the_last_reason_is_gone() -> None:
    appliance = Appliance()
    appliance.send("toggleOff", reason="ttsSay")
    appliance.send("toggleOff", reason="playAudio")
    appliance.send("toggleOn", reason="ttsSay")
    assert appliance.mutes[-1] is True
    appliance.send("toggleOn", reason="playAudio")
    assert appliance.mutes[-1] is False


def test_toggle_on_without_a_reason_ends_all_of_them() -> None:
    appliance = Appliance()
    appliance.send("toggleOff", reason="ttsSay")
    appliance.send("toggleOff", reason="playAudio")
    appliance.send("toggleOn")
    assert appliance.mutes[-1] is False


def test_a_toggle_on_that_was_lost_does_not_leave_it_deaf() -> None:
    appliance = Appliance()
    appliance.send("toggleOff", reason="ttsSay")
    appliance.wait(hermes.FEEDBACK_S - 1)
    assert appliance.mutes == [True]
    appliance.wait(2)
    assert appliance.mutes == [True, False]


def test_without_a_reason_it_stays_off() -> None:
    appliance = Appliance()
    appliance.send("toggleOff")
    appliance.wait(100 * hermes.FEEDBACK_S)
    assert appliance.mutes == [True]


def test_toggles_that_come_faster_than_they_are_obeyed_end_as_the_last_one_says() -> None:
    appliance = Appliance(patient=True)
    for _ in range(5):
        appliance.send("toggleOff", reason="ttsSay")
        appliance.send("toggleOn", reason="ttsSay")
    assert appliance.mutes == [True]
    appliance.futures[-1].set_result({})
    appliance.wait(0)
    assert appliance.mutes == [True, False]


def test_reasons_are_bounded() -> None:
    appliance = Appliance()
    for number in range(10 * hermes.REASONS_LIMIT):
        appliance.send("toggleOff", reason=f"r{number}")
    for number in range(9 * hermes.REASONS_LIMIT, 10 * hermes.REASONS_LIMIT):
        appliance.send("toggleOn", reason=f"r{number}")
    assert appliance.mutes[-1] is False


@pytest.mark.parametrize(
    ("topic", "payload", "retained"),
    [
        ("hermes/asr/startListening", b'{"siteId": "kitchen"}', False),
        ("hermes/asr/startListening", b"{}", False),  # that is the site `default`
        ("hermes/asr/startListening", b'{"siteId": ["hall"]}', False),
        ("hermes/asr/startListening", b'{"siteId": "hall"}', True),
        ("hermes/asr/startListening", b'{"siteId": "hall", "x": "' + b"x" * 20_000 + b'"}', False),
        ("hermes/asr/startListening", b'["hall"]', False),
        ("hermes/asr/startListening", b"\xff", False),
        ("hermes/asr/startListening", b"[" * 16_000, False),
        ("hermes/asr/startListening", b"", False),
        ("hermes/asr/train", b'{"siteId": "hall"}', False),
        ("hermes/asr/textCaptured", b'{"siteId": "hall"}', False),
    ],
)
def test_what_is_not_for_us_is_not_even_answered(topic: str, payload: bytes, retained: bool) -> None:
    appliance = Appliance()
    assert appliance.hermes.receive(topic, payload, retained) is Greeting.NOTHING
    assert appliance.asked == []
    assert appliance.wait(100) == []


def test_a_message_without_a_site_is_for_the_site_default() -> None:
    appliance = Appliance(site_id="default")
    appliance.hermes.receive("hermes/asr/startListening", b"{}", False)
    assert appliance.listens == [8.0]


def test_without_a_site_id_it_is_the_device_id() -> None:
    appliance = Appliance(site_id=None)
    appliance.send("startListening")
    assert appliance.listens == [8.0]
    assert appliance.hear("开灯")[0]["siteId"] == "hall"


@pytest.mark.parametrize("session", [7, ["s"], {"s": 1}, "s" * 300, True])
def test_a_session_whose_id_is_no_text_is_an_error(session: object) -> None:
    appliance = Appliance()
    appliance.send("startListening", sessionId=session)
    ((topic, error),) = appliance.wait(0)
    assert topic == "hermes/error/asr"
    assert error["sessionId"] is None
    assert "sessionId should be text" in error["error"]
    assert appliance.asked == []


def test_without_commands_it_only_speaks() -> None:
    dialect = Hermes(HermesConfig(enabled=True), "hall", None, lambda: None)
    assert dialect.topics == ()
    dialect.receive("hermes/asr/startListening", b'{"siteId": "hall"}', False)
    assert list(dialect.take()) == []
    assert len(list(dialect.said(said("开灯")))) == 1
    assert list(dialect.greet()) == []


def test_it_asks_for_its_own_base() -> None:
    dialect = Hermes(HermesConfig(enabled=True, base="house/hermes"), "hall", Appliance().obey, lambda: None)
    assert set(dialect.topics) == {
        f"house/hermes/asr/{name}" for name in ("startListening", "stopListening", "toggleOn", "toggleOff")
    }
    (message,) = dialect.said(said("开灯"))
    assert message.topic == "house/hermes/asr/textCaptured"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("sessionId", "wakewordId", "lang", "stopOnSilence", "reason", "x")
REQUESTS = st.fixed_dictionaries(
    {"siteId": st.sampled_from(["hall", "hall", "hall", "kitchen"]) | JUNK},
    optional={name: st.sampled_from(["a", "b", None, False]) | JUNK for name in FIELDS},
).map(lambda request: json.dumps(request).encode())
NAMES = st.sampled_from(["startListening", "stopListening", "toggleOn", "toggleOff", "train"])
EVENTS = st.one_of(
    st.tuples(NAMES, REQUESTS | st.binary(max_size=20)),
    st.tuples(st.just("said"), st.sampled_from(["开灯", "light on", ""])),
    st.tuples(st.just("wait"), st.floats(0, 20)),
    st.tuples(st.just("obeyed"), st.sampled_from([None, "no"])),
)


@settings(deadline=None)
@given(st.lists(EVENTS, max_size=30))
def test_whatever_comes_nothing_raises_everybody_is_answered_and_in_the_end_it_hears(events: list[Any]) -> None:
    appliance = Appliance(patient=True)
    messages = []
    for name, value in events:
        if name == "said":
            messages += list(appliance.hermes.said(said(value)))
        elif name == "wait":
            appliance.now += value
            messages += list(appliance.hermes.take())
        elif name == "obeyed":
            for future in [future for future in appliance.futures if not future.done()][:1]:
                future.set_exception(EdgeAsrError(value)) if value else future.set_result({})
        else:
            appliance.hermes.receive(f"hermes/asr/{name}", value, False)
    appliance.patient = False
    appliance.send("toggleOn")
    for future in appliance.futures:
        if not future.done():
            future.set_result({})
    appliance.now += 1000
    messages += [*appliance.hermes.take(), *appliance.hermes.take()]
    assert not appliance.hermes._sessions
    assert appliance.mutes[-1:] in ([], [False])
    for message in messages:
        content = json.loads(message.payload.encode())
        assert content["siteId"] == "hall"
        fields = TEXT_CAPTURED if message.topic == "hermes/asr/textCaptured" else ERROR
        assert content.keys() == fields.keys()
