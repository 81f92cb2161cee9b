"""What `subscribe` makes of messages: what is asked for, kept for the next start and shown, without a broker."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group
from rich.live import Live

from edge_asr import cli_subscribe, cli_subscribe_view
from edge_asr.cli_subscribe import Desk, StateFile, subscribe
from edge_asr.cli_subscribe_view import JsonView, PrettyView
from edge_asr.config_mqtt import MqttConfig
from edge_asr.subscribe import Follower


def transcript(seq: int) -> bytes:
    return json.dumps({"seq": seq, "id": f"id-{seq}", "text": f"t{seq}"}).encode()


def desk(followers: dict[str, Follower] | None = None, *shown: str) -> Desk:
    return Desk("edge_asr", shown or ("transcript",), JsonView(), followers)


def test_what_comes_under_no_device_id_is_neither_shown_nor_followed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = desk({})
    for device in ("", "a b", "\x1b[2J", "x" * 65, "大厅"):
        assert list(shown.receive(f"edge_asr/{device}/transcript", transcript(1), False)) == []
    assert (capsys.readouterr().out, shown.followers) == ("", {})


def test_only_so_many_devices_are_kept_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_subscribe, "DEVICES_LIMIT", 2)
    shown = desk({})
    for device in ("a", "b", "c", "a"):
        list(shown.receive(f"edge_asr/{device}/transcript", transcript(1), False))
    assert set(shown.followers or {}) == {"a", "b"}
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_who_comes_online_is_asked_at_once_but_not_who_was_there_before() -> None:
    shown = desk({"hall": Follower(5)})
    assert list(shown.receive("edge_asr/hall/status", b"online", True)) == []
    assert list(shown.receive("edge_asr/hall/status", b"offline", False)) == []
    assert list(shown.receive("edge_asr/hall/status", b"online", False)) == [
        ("edge_asr/hall/cmd/replay", '{"from_seq": 5}')
    ]


def test_the_state_of_a_device_that_is_not_followed_now_stays(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text('{"kitchen": {"seq": 7, "id": "k"}}')
    kept = StateFile(path)
    shown = desk(kept.read())
    list(shown.receive("edge_asr/hall/transcript", transcript(3), False))
    kept.write(shown)
    assert json.loads(path.read_text()) == {"kitchen": {"seq": 7, "id": "k"}, "hall": {"seq": 3, "id": "id-3"}}
    assert [item.name for item in tmp_path.iterdir()] == ["state"]


def test_one_device_and_no_others_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").write_text('{"kitchen": {"seq": 7, "id": "k"}, "hall": {"seq": 2, "id": "h"}}')
    followed: list[set[str]] = []
    monkeypatch.setattr(cli_subscribe.signal, "signal", lambda *_: None)  # type: ignore[attr-defined]
    monkeypatch.setattr(
        cli_subscribe, "_follow", lambda _config, _device, desk, *_: followed.append(set(desk.followers))
    )
    for device in ("hall", "+"):
        subscribe(MqttConfig(), device, (), json_lines=True, complete=True, state=tmp_path / "state")
    assert followed == [{"hall"}, {"hall", "kitchen"}]


def test_the_state_of_a_device_is_shown_with_whether_it_is_there() -> None:
    choose = cli_subscribe._choose_topics
    assert set(choose("+", ["state"], json_lines=True, complete=False)) == {"state", "status"}
    assert set(choose("+", ["said"], json_lines=True, complete=False)) == {"said"}


class Shown(Live):
    """What a terminal would show below the sentences."""

    def __init__(self) -> None:
        self.group = Group()

    def update(self, renderable: object, *, refresh: bool = False) -> None:
        assert isinstance(renderable, Group)
        assert refresh
        self.group = renderable

    @property
    def lines(self) -> list[str]:
        return [str(line).split()[-1] for line in self.group.renderables]


def test_what_is_being_said_is_shown_until_it_is_said_or_taken_back() -> None:
    live = Shown()
    view = PrettyView(Console(file=io.StringIO()), live)

    def partial(identifier: str, **keys: object) -> None:
        view.message("hall", "partial", "", json.dumps({"id": identifier, "source": "desk", **keys}).encode())

    partial("a", text="打")
    partial("b", text="关")
    partial("a", text="打开")
    assert live.lines == ["关", "打开"]
    partial("b", text="", end=True)
    assert live.lines == ["打开"]
    view.message("hall", "transcript", "", b'{"id": "a", "text": "x"}')
    assert live.lines == []
    for number in range(10):
        partial(str(number), text=str(number))
    assert live.lines == ["6", "7", "8", "9"]
    assert len(live.lines) == cli_subscribe_view.PARTIALS_LIMIT


def test_what_is_nested_too_deeply_is_a_line_of_json_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    JsonView().transcript("hall", "edge_asr/hall/transcript", deep)
    assert json.loads(capsys.readouterr().out) == {"topic": "edge_asr/hall/transcript", "payload": "nested too deeply"}
    while deep:  # freed level by level
        deep = deep["a"]


def test_other_topics_are_shown_as_they_are_but_harmless() -> None:
    out = io.StringIO()
    PrettyView(Console(file=out), None).message("hall", "cmd/mute/result", "", b'{"ok": true,\n "x": "\x1b"}')
    assert out.getvalue() == 'hall cmd/mute/result {"ok": true,\\n "x": "\\x1b"}\n'
