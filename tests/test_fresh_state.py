"""What a show or a measurement sees of the state of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_asr.config import Config
from edge_asr.fresh_state import fresh_state


def test_engines_are_shared_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = Path("state")
    (state / "engines" / "tiny").mkdir(parents=True)
    (state / "controls.json").write_text('{"mute": true}', encoding="utf-8")
    with fresh_state(Config(state_dir=state)) as config:
        assert [entry.name for entry in config.state_dir.iterdir()] == ["engines"]
        assert (config.state_dir / "engines" / "tiny").is_dir()
        (config.state_dir / "engines" / "small").mkdir()
        (config.state_dir / "controls.json").write_text("{}", encoding="utf-8")
        fresh = config.state_dir
    assert not fresh.exists()
    assert (state / "engines" / "small").is_dir()
    assert (state / "controls.json").read_text(encoding="utf-8") == '{"mute": true}'


def test_the_outbox_is_one_of_its_own_and_nobody_else_is_told(tmp_path: Path) -> None:
    real = Config.model_validate(
        {"state_dir": tmp_path, "outbox": {"file": tmp_path / "kept.sqlite3", "max_mb": 7}, "hermes": {"enabled": True}}
    )
    with fresh_state(real) as config:
        assert (config.outbox.file, config.outbox.max_mb) == (None, 7)
        assert not config.home_assistant.enabled
        assert not config.hermes.enabled


def test_no_port_is_open(tmp_path: Path) -> None:
    doors = {name: {"enabled": True} for name in ("http", "wyoming", "funasr")}
    with fresh_state(Config.model_validate({"state_dir": tmp_path, **doors})) as config:
        assert [section.enabled for section in (config.http, config.wyoming, config.funasr)] == [False] * 3


def test_the_first_engine_of_a_machine_is_kept(tmp_path: Path) -> None:
    with fresh_state(Config(state_dir=tmp_path / "state")) as config:
        (config.state_dir / "engines" / "tiny").mkdir()
    assert (tmp_path / "state" / "engines" / "tiny").is_dir()


def test_where_nothing_can_be_kept_there_is_a_state_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with fresh_state(Config(state_dir=tmp_path / "file")) as config:
        (config.state_dir / "engines" / "tiny").mkdir(parents=True)
