"""Another model while the appliance runs: it takes over between two requests, or what answers goes on and says why."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled import BUNDLE, engine_of, recording, sound_of, transcripts
from mosquitto import PATIENCE_S
from plans import RELEASE, plan, put_plan, put_processors
from tensorrt_fakes import fake_tensorrt

from edge_asr import canary, keeper
from edge_asr.child import EngineBuild
from edge_asr.config import EngineConfig
from edge_asr.errors import BundleError, EngineError
from edge_asr.keeper import EngineKeeper
from edge_asr.ladder import Ladder
from edge_asr.recognizer.bundle import CARD, FP32, read_bundle
from edge_asr.recognizer.manifest import TENSORRT
from edge_asr.types import Recognition

NAME = "01.wav"
TEXT = transcripts()[NAME]
OTHER = TEXT.replace("灯", "登")
"""What the other model writes: its tokens are called otherwise."""


def put_model(folder: Path, **tokens: str) -> Path:
    """Put the bundled model there, with other names for some of its tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("am.mvn", "config.yaml", CARD):
        shutil.copy(BUNDLE / name, folder / name)
    if not (folder / "model.onnx").exists():
        (folder / "model.onnx").symlink_to(BUNDLE / "model.onnx")
    known = json.loads((BUNDLE / "tokens.json").read_text(encoding="utf-8"))
    changed = json.dumps([tokens.get(token, token) for token in known])
    (folder / "tokens.json").write_text(changed, encoding="utf-8")
    return folder


@contextlib.asynccontextmanager
async def keeping(model: Path, state: Path, **keys: Any) -> AsyncIterator[EngineKeeper]:
    """Yield a keeper of a model that has started, with an engine that is there already."""
    config = EngineConfig.model_validate({"threads": 1, "target": FP32, "dir": engine_of(FP32), **keys})
    kept = EngineKeeper(read_bundle(model), config, state, lambda: None, poll_s=0.01)
    try:
        await kept.start()
        yield kept
    finally:
        assert await kept.close(PATIENCE_S)


async def heard(kept: EngineKeeper) -> Recognition:
    return await asyncio.wait_for(asyncio.wrap_future(kept.scheduler.submit(sound_of(NAME))), PATIENCE_S)


async def test_another_model_in_the_same_place_takes_over(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.symlink_to(put_model(tmp_path / "first"))
    async with keeping(model, tmp_path / "state") as kept:
        first = await heard(kept)
        assert (first.text, first.model) == (TEXT, "first")
        model.unlink()
        model.symlink_to(put_model(tmp_path / "second", 灯="登"))
        (model / CARD).write_text("gates: {min_confidence: 0.25}", encoding="utf-8")
        await kept.reload()
        second = await heard(kept)
        assert (second.text, second.model) == (OTHER, "second")
        assert (kept.bundle.name, kept.engine, kept.why) == ("second", FP32, "")
        assert kept.bundle.gates == {"min_confidence": 0.25}


def cut_graph(model: Path) -> None:
    (model / "model.onnx").unlink()
    (model / "model.onnx").write_bytes((BUNDLE / "model.onnx").read_bytes()[:1_000_000])


def lose_tokens(model: Path) -> None:
    (model / "tokens.json").unlink()


def rave(model: Path) -> None:
    tokens = json.loads((model / "tokens.json").read_text(encoding="utf-8"))
    (model / "tokens.json").write_text(json.dumps([*tokens[:3], *tokens[:2:-1]]), encoding="utf-8")


def belong_elsewhere(model: Path) -> None:
    tokens = json.loads((model / "tokens.json").read_text(encoding="utf-8"))
    (model / "tokens.json").write_text(json.dumps([*tokens, "x"]), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut_graph, "does not fit"),
        (lose_tokens, "no token list"),
        (rave, "too few are the same"),
        (belong_elsewhere, "tokens"),
        (shutil.rmtree, "no such folder"),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
async def test_a_broken_model_changes_nothing_and_the_next_one_is_taken(
    damage: Callable[[Path], None], why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = put_model(tmp_path / "model")
    async with keeping(model, tmp_path / "state") as kept:
        before = kept.bundle
        assert (await heard(kept)).text == TEXT
        damage(model)
        for _ in range(2):
            with pytest.raises((BundleError, EngineError), match=why):
                await asyncio.wait_for(kept.reload(), PATIENCE_S)
        assert (await heard(kept)).text == TEXT
        assert (kept.bundle, kept.engine, kept.why) == (before, FP32, "")
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(told) == 2
        assert all(line.startswith("onnx-fp32 of model goes on: ") and why in line for line in told)
        shutil.rmtree(model, ignore_errors=True)
        put_model(model, 灯="登")
        await kept.reload()
        assert (await heard(kept)).text == OTHER


async def test_a_model_of_the_catalogue_is_tried_on_its_own_recording_where_nothing_was_said(tmp_path: Path) -> None:
    model = put_model(tmp_path / BUNDLE.name)
    (model / "samples").mkdir()
    shutil.copy(recording(NAME), model / "samples")
    async with keeping(model, tmp_path / "state") as kept:
        rave(model)
        with pytest.raises(EngineError, match=r"hears '.*' in its own recording 01\.wav, not '打开客厅灯'"):
            await kept.reload()
        (model / "samples" / NAME).write_text("no sound")
        with pytest.raises(EngineError, match=r"not audio of any known format.*copy the bundle again"):
            await kept.reload()
        assert (await heard(kept)).text == TEXT
        put_model(model, 灯="登")
        shutil.copy(recording(NAME), model / "samples")
        await kept.reload()
        assert (await heard(kept)).text == OTHER, "one of five tokens may be another"


async def test_a_model_that_cannot_hear_anything_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with keeping(put_model(tmp_path / "model"), tmp_path / "state") as kept:
        monkeypatch.setattr(canary, "noise", lambda: np.full(16_000, np.nan, np.float32))
        closed: list[Ladder] = []
        monkeypatch.setattr(Ladder, "close", lambda ladder: closed.append(ladder))
        with pytest.raises(EngineError):
            await kept.reload()
        assert len(closed) == 1
        assert (await heard(kept)).text == TEXT


@pytest.mark.parametrize(("built", "needed_mb"), [(True, 29), (False, 58)])
async def test_without_room_for_both_the_model_stays_and_the_remedy_is_told(
    built: bool, needed_mb: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = put_model(tmp_path / "model")
    async with keeping(model, tmp_path / "state") as kept:
        if not built:
            monkeypatch.setattr(keeper, "existing", lambda *given: None)
        monkeypatch.setattr(keeper, "available_bytes", lambda: 20_000_000)
        with pytest.raises(EngineError, match="no room") as refused:
            await kept.reload()
        lack = f"it needs about {needed_mb} MB of memory, 20 MB are free; restart edge-asr to use it"
        assert str(refused.value) == f"{model}: there is no room for it beside onnx-fp32: {lack}"
        assert (await heard(kept)).text == TEXT


async def test_one_is_refused_while_another_or_the_first_one_is_being_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, go_on, loading = put_model(tmp_path / "model"), threading.Event(), threading.Event()
    check = EngineKeeper._check_memory

    def slow(*given: Any) -> None:
        loading.set()
        assert go_on.wait(PATIENCE_S)
        check(*given)

    monkeypatch.setattr(EngineKeeper, "_check_memory", slow)
    unstarted = EngineKeeper(read_bundle(model), EngineConfig(), tmp_path, lambda: None)
    with pytest.raises(EngineError, match="still being loaded; try again"):
        await unstarted.reload()
    async with keeping(model, tmp_path / "state") as kept:
        first = asyncio.create_task(kept.reload())
        assert await asyncio.to_thread(loading.wait, PATIENCE_S)
        with pytest.raises(EngineError, match="another engine is being built or loaded already; try again"):
            await kept.reload()
        assert (await heard(kept)).text == TEXT
        go_on.set()
        await asyncio.wait_for(first, PATIENCE_S)
        await kept.reload()


async def test_what_is_asked_while_models_change_is_answered_by_one_of_them(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model")
    async with keeping(model, tmp_path / "state") as kept:
        found: list[str] = []
        ended = False

        async def ask() -> None:
            while not ended:
                found.append((await heard(kept)).text)

        asking = [asyncio.create_task(ask()) for _ in range(2)]
        for name in ("登", "灯") * 3:
            put_model(model, 灯=name)
            await kept.reload()
        ended = True
        await asyncio.gather(*asking)
        assert set(found) == {TEXT, OTHER}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with the engines of the bundled model."""
    put_processors(tmp_path / "state")
    put_plan(tmp_path / "state")
    return tmp_path / "state"


@pytest.mark.parametrize(("outcome", "why"), [("built", None), ("failed", "on purpose"), ("damaged", "plan: damaged")])
async def test_a_plan_that_is_lacking_is_built_before_and_no_lesser_engine_takes_over(
    state: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, why: str | None
) -> None:
    plan()
    kept: EngineKeeper
    seen: list[str | None] = []

    def build(child: EngineBuild, bundle: object, folder: Path, config: EngineConfig) -> None:
        seen.append(kept.engine)
        assert config.target == TENSORRT
        if outcome == "failed":
            raise EngineError("on purpose")
        shutil.copytree(plan(), folder)
        if outcome == "damaged":
            next(folder.glob("*.plan")).write_bytes(b"damaged")

    monkeypatch.setattr(EngineBuild, "run", build)
    monkeypatch.setattr("edge_asr.recognizer.tensorrt_network.LEGACY_TEGRA", state / "nowhere")
    with fake_tensorrt(RELEASE):
        async with keeping(BUNDLE, state, target="auto", dir=None) as kept:
            assert (kept.engine, kept.why) == (TENSORRT, "")
            await asyncio.sleep(0)
            async with kept._changing:  # it has looked for a plan, and found it
                shutil.rmtree(next(state.rglob("*tensorrt*")))
            with contextlib.nullcontext() if why is None else pytest.raises(EngineError, match=why):
                await kept.reload()
            assert (await heard(kept)).engine == TENSORRT
            assert (kept.engine, kept.why) == (TENSORRT, "")
    assert seen == [TENSORRT]
