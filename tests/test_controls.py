"""What may be changed while the appliance runs: it holds for all sources, it is kept, and it is told."""

from __future__ import annotations

import asyncio
import logging
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from listening import Clock, Exactly

from edge_asr import controls as controls_module
from edge_asr.attention import ALWAYS, PHRASE, PUSH_TO_TALK, Attention
from edge_asr.config import SegmentConfig
from edge_asr.controls import FILE, Controls
from edge_asr.errors import EdgeAsrError
from edge_asr.pipeline import Listener
from edge_asr.sources import WatchedSource
from edge_asr.speech.completeness import ContentEndpoint
from edge_asr.types import Recognition, Token


class Ear:
    """Listener and source in one, which note what they are told."""

    def __init__(self) -> None:
        self.muted: list[bool] = []
        self.endpoints: list[tuple[int, ContentEndpoint | None]] = []

    def mute(self, muted: bool) -> None:
        self.muted.append(muted)

    def use(self, endpoint: int, content_endpoint: ContentEndpoint | None) -> None:
        self.endpoints.append((endpoint, content_endpoint))


class Changes:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def changes() -> Changes:
    return Changes()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, changes: Changes, clock: Clock) -> Callable[..., Controls]:
    def made(mode: str = ALWAYS, attention: Attention | None = None, **segment: object) -> Controls:
        attention = attention or Attention(mode, Exactly("小爱同学"), 8.0, clock)
        return Controls(SegmentConfig.model_validate(segment), attention, tmp_path / "state", changes)

    return made


def listen_with(controls: Controls) -> Ear:
    ear = Ear()
    controls.add(cast(Listener, ear), cast(WatchedSource, ear))
    return ear


async def test_a_preset_holds_for_all_sources_and_after_a_restart(
    make: Callable[..., Controls], changes: Changes
) -> None:
    controls = make(preset="relaxed", content_endpointing=False)
    ears = [listen_with(controls) for _ in range(2)]
    assert [ear.endpoints for ear in ears] == [[(25, None)]] * 2
    assert await controls.obey("preset", {"preset": "aggressive"}) == {"preset": "aggressive"}
    assert [ear.endpoints[-1] for ear in ears] == [(5, None)] * 2
    assert changes.count == 1
    again = make(preset="relaxed")
    assert again.preset == "aggressive"
    assert listen_with(again).endpoints == [(5, ContentEndpoint(5))]


def test_the_text_goes_by_the_preset_too(make: Callable[..., Controls]) -> None:
    controls = make(phrases=["打开客厅灯"])
    ear = listen_with(controls)
    controls.use("relaxed")
    assert [endpoint for _, endpoint in ear.endpoints] == [
        ContentEndpoint(chunks, frozenset({"打 开 客 厅 灯"})) for chunks in (12, 25)
    ]


async def test_mute_holds_for_all_sources_and_after_a_restart(make: Callable[..., Controls], changes: Changes) -> None:
    controls = make()
    ear = listen_with(controls)
    assert await controls.obey("mute", {"mute": True}) == {"mute": True}
    assert ear.muted == [True] * 2, "the listener and its source"
    again = make()
    assert again.muted
    assert listen_with(again).muted == [True] * 2, "before it runs"
    assert await again.obey("mute", {"mute": False}) == {"mute": False}
    assert not make().muted
    assert changes.count == 2


async def test_what_is_so_already_changes_nothing(
    make: Callable[..., Controls], changes: Changes, tmp_path: Path
) -> None:
    controls = make()
    ear = listen_with(controls)
    assert await controls.obey("mute", {"mute": False}) == {"mute": False}
    assert await controls.obey("preset", {"preset": "default"}) == {"preset": "default"}
    assert (ear.muted, len(ear.endpoints), changes.count) == ([], 1, 0)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("mode", "result"),
    [
        (ALWAYS, {"listen": "always"}),
        (PUSH_TO_TALK, {"listen": "push_to_talk", "seconds": 3.0}),
        (PHRASE, {"listen": "phrase", "seconds": 3.0}),
    ],
)
async def test_it_listens_when_asked_to(make: Callable[..., Controls], mode: str, result: dict[str, object]) -> None:
    controls = make(mode)
    listen_with(controls)
    assert await controls.obey("listen", {"seconds": 3.0}) == result


@pytest.mark.parametrize("mode", [ALWAYS, PUSH_TO_TALK, PHRASE])
async def test_it_stops_listening_when_asked_to_also_while_it_does_not_listen(
    make: Callable[..., Controls], clock: Clock, mode: str
) -> None:
    attention = Attention(mode, Exactly("小爱同学"), 8.0, clock)
    controls = make(attention=attention)
    assert await controls.obey("listen", {"seconds": 0.0}) == {"listen": mode, "seconds": 0.0}
    listen_with(controls)
    controls.listen(8.0)
    began_at, clock.now = clock.now + 1, clock.now + 2
    controls.listen(0.0)
    said = Recognition("灯", (Token("灯", None, None, 1.0),), 1.0)
    assert attention.admit(said, began_at) == said, "who spoke already is heard to the end"
    assert (attention.admit(said, clock.now) is None) == (mode != ALWAYS)
    controls.mute(True)
    assert controls.listen(0.0) == {"listen": mode, "seconds": 0.0}


async def test_it_listens_for_the_configured_time_where_none_is_said(make: Callable[..., Controls]) -> None:
    controls = make(PUSH_TO_TALK)
    listen_with(controls)
    assert (await controls.obey("listen", {"seconds": None}))["seconds"] == 8.0


def test_without_a_source_it_does_not_pretend_to_listen(make: Callable[..., Controls]) -> None:
    with pytest.raises(EdgeAsrError, match="nothing is listened to yet"):
        make(PUSH_TO_TALK).listen(3.0)


def test_what_was_asked_for_before_a_mute_is_over_after_it(make: Callable[..., Controls], clock: Clock) -> None:
    attention = Attention(PUSH_TO_TALK, None, 8.0, clock)
    controls = make(attention=attention)
    listen_with(controls)
    controls.listen(8.0)
    for muted in (True, False):
        controls.mute(muted)
    assert not attention.hears(clock.now + 1)


async def test_what_holds_from_the_last_time_on_is_said_at_the_start(
    make: Callable[..., Controls], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await make().obey("preset", {"preset": "aggressive"})
    make(preset="relaxed")
    assert caplog.messages[-1] == "not muted, preset aggressive, as was chosen before the last stop"
    caplog.clear()
    make(preset="aggressive")
    assert caplog.messages == [], "the configuration says so too"


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("preset", {"preset": "quick"}, "unknown preset quick; known here: aggressive, default, relaxed"),
        ("dance", {}, "unknown command dance; known here: mute, preset, listen"),
    ],
)
async def test_what_cannot_be_done_says_what_can(
    make: Callable[..., Controls], name: str, arguments: dict[str, object], why: str
) -> None:
    with pytest.raises(EdgeAsrError) as refused:
        await make().obey(name, arguments)
    assert str(refused.value) == why


def test_one_that_is_muted_does_not_pretend_to_listen(make: Callable[..., Controls]) -> None:
    controls = make(PUSH_TO_TALK)
    controls.mute(True)
    with pytest.raises(EdgeAsrError, match="muted"):
        controls.listen(3.0)


def damage(tmp_path: Path, content: str) -> Path:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / FILE).write_text(content, encoding="utf-8")
    return tmp_path / "state" / FILE


@pytest.mark.parametrize("muted", [True, False])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"mute": 1, "preset": "quick"}', '{"preset": []}', "\0", "[" * 9999]
)
async def test_who_may_have_been_muted_is_until_somebody_says_otherwise(
    make: Callable[..., Controls], changes: Changes, tmp_path: Path, content: str, muted: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = damage(tmp_path, content)
    controls = make(preset="relaxed")
    assert (controls.muted, controls.preset) == (True, "relaxed")
    assert listen_with(controls).muted == [True] * 2
    assert controls.trouble.startswith(f"muted, for {path} is damaged")
    assert controls.trouble.endswith(": send off to cmd/mute, or remove the file and restart edge-asr")
    assert caplog.messages == [controls.trouble]
    assert await controls.obey("mute", {"mute": muted}) == {"mute": muted}
    assert (controls.trouble, changes.count) == ("", 1)
    again = make()
    assert (again.muted, again.trouble) == (muted, "")


def test_a_preset_that_there_is_not_mutes_nobody(make: Callable[..., Controls], tmp_path: Path) -> None:
    damage(tmp_path, '{"mute": false, "preset": "quick"}')
    controls = make(preset="relaxed")
    assert (controls.muted, controls.preset, controls.trouble) == (False, "relaxed", "")


def test_a_damaged_file_keeps_the_preset_it_tells(make: Callable[..., Controls], tmp_path: Path) -> None:
    damage(tmp_path, '{"preset": "aggressive"}')
    assert make().preset == "aggressive"


async def test_what_cannot_be_kept_holds_all_the_same_and_says_so(
    make: Callable[..., Controls], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("a file where the folder belongs", encoding="utf-8")
    controls = make()
    await controls.obey("mute", {"mute": True})
    assert controls.muted
    assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.WARNING]


async def test_the_file_is_replaced_whole_and_nothing_is_left_beside_it(
    make: Callable[..., Controls], tmp_path: Path
) -> None:
    controls = make()
    for muted in (True, False, True):
        await controls.obey("mute", {"mute": muted})
    (kept,) = (tmp_path / "state").iterdir()
    assert kept.name == FILE
    assert stat.S_IMODE(kept.stat().st_mode) & 0o077 == 0


async def test_nobody_waits_while_it_is_written_and_what_holds_at_last_is_kept(
    make: Callable[..., Controls], monkeypatch: pytest.MonkeyPatch, changes: Changes
) -> None:
    written, go_on = [], threading.Event()
    write = controls_module._write

    def slow(path: Path, chosen: Mapping[str, Any]) -> None:
        written.append(chosen["mute"])
        assert go_on.wait(30)
        write(path, chosen)

    monkeypatch.setattr(controls_module, "_write", slow)
    controls = make()
    asked = [asyncio.create_task(controls.obey("mute", {"mute": muted})) for muted in (True, False, True)]
    while changes.count < 3:
        await asyncio.sleep(0)
    go_on.set()
    assert [(await task)["mute"] for task in asked] == [True, False, True]
    assert written[-1]
    assert make().muted


async def test_a_mute_for_a_moment_adds_to_the_chosen_one_and_outlives_no_restart(tmp_path: Path) -> None:
    controls = Controls(SegmentConfig(), Attention(ALWAYS, None), tmp_path, lambda: None)
    assert await controls.obey("mute", {"mute": True}) == {"mute": True}
    assert await controls.obey("mute", {"mute": True, "by": "hermes"}) == {"mute": True}
    assert await controls.obey("mute", {"mute": False, "by": "hermes"}) == {"mute": True}, "it was muted by hand"
    assert await controls.obey("mute", {"mute": False}) == {"mute": False}
    assert await controls.obey("mute", {"mute": True, "by": "hermes"}) == {"mute": True}
    again = Controls(SegmentConfig(), Attention(ALWAYS, None), tmp_path, lambda: None)
    assert not again.muted, "a power cut while the house speaks must not mute for good"
    assert await controls.obey("mute", {"mute": False}) == {"mute": False}, "who says so is heard at once"
    assert await controls.obey("mute", {"mute": False, "by": "hermes"}) == {"mute": False}
