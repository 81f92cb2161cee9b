"""The daemon's engine in this process: when TensorRT's is built, when it is used, and when not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from bundled import BUNDLE, sound_of, transcripts
from mosquitto import PATIENCE_S
from plans import RELEASE, plan, put_plan, put_processors
from prometheus_client import REGISTRY
from tensorrt_fakes import fake_tensorrt

from edge_asr import keeper, memory
from edge_asr.child import EngineBuild
from edge_asr.config import EngineConfig
from edge_asr.errors import EngineError
from edge_asr.keeper import EngineKeeper
from edge_asr.ladder import plan_folder
from edge_asr.recognizer.bundle import FP32, Bundle, read_bundle
from edge_asr.recognizer.manifest import FILE, TENSORRT, read_manifest, write_manifest

NAME = "01.wav"
GB = 10**9


@pytest.fixture(autouse=True)
def no_jetson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever machine the tests run on, it says nothing of L4T."""
    monkeypatch.setattr("edge_asr.recognizer.tensorrt_network.LEGACY_TEGRA", tmp_path / "nowhere")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with the engine for the processor."""
    put_processors(tmp_path / "state")
    return tmp_path / "state"


class Builds:
    """Stands in for the child: what is built comes ready-made, or fails."""

    def __init__(self) -> None:
        self.seen: list[str | None] = []
        """The engine that answered when a plan was to be built."""
        self.engine: Callable[[], str | None] = lambda: None
        self.failure: EngineError | None = None

    def run(self, child: EngineBuild, bundle: Bundle, folder: Path, config: EngineConfig) -> None:
        assert config.target == TENSORRT
        child._begins()
        self.seen.append(self.engine())
        if self.failure is not None:
            raise self.failure
        shutil.copytree(plan(), folder)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    builds = Builds()
    monkeypatch.setattr(EngineBuild, "run", lambda *given: builds.run(*given))
    return builds


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose manifests were looked at."""
    folders: list[Path] = []
    look = keeper._stamp

    def noted(folder: Path) -> keeper.Stamp:
        folders.append(folder)
        return look(folder)

    monkeypatch.setattr(keeper, "_stamp", noted)
    return folders


@contextlib.asynccontextmanager
async def keeping(state: Path, builds: Builds | None = None, **keys: Any) -> AsyncIterator[EngineKeeper]:
    """Yield a keeper that has started, on the fakes."""
    plan()
    config = EngineConfig.model_validate({"threads": 1, **keys})
    with fake_tensorrt(RELEASE):
        kept = EngineKeeper(read_bundle(BUNDLE), config, state, lambda: None, poll_s=0.01)
        if builds is not None:
            builds.engine = lambda: kept.engine
        try:
            await kept.start()
            yield kept
        finally:
            assert await kept.close(PATIENCE_S)


async def reached(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), PATIENCE_S)


async def heard(kept: EngineKeeper) -> tuple[str, str]:
    recognition = await asyncio.wrap_future(kept.scheduler.submit(sound_of(NAME)))
    return recognition.text, recognition.engine


def shown() -> dict[str, float]:
    values = {name: REGISTRY.get_sample_value("edge_asr_engine", {"engine": name}) for name in (TENSORRT, FP32)}
    return {name: value or 0.0 for name, value in values.items()}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_the_processor_serves_while_the_plan_is_built_then_the_gpu_does(
    state: Path, builds: Builds, caplog: pytest.LogCaptureFixture
) -> None:
    async with keeping(state, builds) as kept:
        assert (kept.engine, shown()) == (FP32, {TENSORRT: 0, FP32: 1})
        await reached(lambda: kept.engine == TENSORRT)
        assert (await heard(kept), kept.why) == ((transcripts()[NAME], TENSORRT), "")
        assert shown() == {TENSORRT: 1, FP32: 0}
    assert builds.seen == [FP32]
    assert warnings(caplog) == []


async def test_with_little_memory_the_plan_is_built_before_anything_is_served(
    state: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "available_bytes", lambda: 1)
    async with keeping(state, builds) as kept:
        assert kept.engine == TENSORRT
    assert builds.seen == [None]


@pytest.mark.parametrize("available", [1, sys.maxsize], ids=["before", "beside"])
async def test_a_build_that_fails_is_one_warning_and_not_repeated(
    state: Path,
    builds: Builds,
    available: int,
    looks: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(keeper, "available_bytes", lambda: available)
    builds.failure = EngineError("on purpose")
    async with keeping(state, builds) as kept:
        await reached(lambda: "on purpose" in kept.why)
        await reached(lambda: len(looks) > 2)
        assert await heard(kept) == (transcripts()[NAME], FP32)
    assert warnings(caplog) == ["paraformer-tiny: its TensorRT engine could not be built: on purpose"]
    assert len(builds.seen) == 1


async def test_with_strict_a_build_that_fails_is_an_error(state: Path, builds: Builds) -> None:
    builds.failure = EngineError("on purpose")
    with pytest.raises(EngineError, match="on purpose"):
        async with keeping(state, builds, strict=True):
            pytest.fail("it served")


async def test_a_plan_that_somebody_builds_anew_is_used_instead(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    place = put_plan(state)
    manifest = read_manifest(place)
    assert manifest is not None
    async with keeping(state) as kept:
        assert kept.engine == TENSORRT
        assert caplog.messages == []
        write_manifest(place, manifest)
        await reached(lambda: "tensorrt-fp16 answers from now on" in caplog.messages)
        assert await heard(kept) == (transcripts()[NAME], TENSORRT)
    assert warnings(caplog) == []


async def test_a_plan_that_is_refused_leaves_the_old_engine_and_the_next_is_tried(
    state: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = ["needs more than there is"]
    monkeypatch.setattr(keeper, "lack", lambda *given: lacking[0])
    async with keeping(state, builds) as kept:
        await reached(lambda: "no room" in kept.why)
        assert await heard(kept) == (transcripts()[NAME], FP32)
        [line] = warnings(caplog)
        assert line.startswith("onnx-fp32 goes on: its new TensorRT engine is not used: ")
        assert line.endswith("no room for it beside onnx-fp32: needs more than there is; restart edge-asr to use it")
        lacking[0] = ""
        place = plan_folder(read_bundle(BUNDLE), EngineConfig(), state)
        assert place is not None
        (place / FILE).touch()
        await reached(lambda: kept.engine == TENSORRT)
        assert kept.why == ""


async def test_a_damaged_plan_is_built_anew_beside(
    state: Path, builds: Builds, caplog: pytest.LogCaptureFixture
) -> None:
    place = put_plan(state)
    (place / FILE).write_text("{")
    monkeypatched = builds.run

    def clear_and_run(child: EngineBuild, bundle: Bundle, folder: Path, config: EngineConfig) -> None:
        shutil.rmtree(folder)
        monkeypatched(child, bundle, folder, config)

    builds.run = clear_and_run  # type: ignore[method-assign]
    async with keeping(state, builds) as kept:
        await reached(lambda: kept.engine == TENSORRT)
    assert builds.seen == [FP32]
    [line] = warnings(caplog)
    assert line.startswith(f"onnx-fp32 answers instead of tensorrt-fp16: {place / FILE}: not a manifest")


async def test_a_configured_folder_is_never_built_in(
    state: Path, builds: Builds, looks: list[Path], tmp_path: Path
) -> None:
    place = tmp_path / "configured"
    shutil.copytree(plan(), place)
    manifest = read_manifest(place)
    assert manifest is not None
    (place / manifest.encoder).write_bytes(b"damaged")
    async with keeping(state, builds, dir=place) as kept:
        assert kept.engine == FP32
        await reached(lambda: len(looks) > 2)
    assert builds.seen == []


async def test_where_no_tensorrt_is_wanted_nothing_is_built_or_watched(state: Path, builds: Builds) -> None:
    async with keeping(state, builds, target=FP32) as kept:
        assert (kept.engine, kept.why, kept._watching) == (FP32, "", None)
    assert builds.seen == []


@pytest.mark.parametrize(
    ("host_free", "gpu_free", "reason"),
    [
        (2.3 * GB, None, "needs about 2400 MB of memory, 2300 MB are free"),
        (2.5 * GB, None, None),
        (8 * GB, 1.2 * GB, "needs about 1300 MB of the GPU's memory, 1200 MB are free"),
        (1.3 * GB, 4 * GB, "needs about 1400 MB of memory, 1300 MB are free"),
        (1.5 * GB, 1.4 * GB, None),
    ],
)
def test_two_engines_must_fit_into_memory(host_free: float, gpu_free: float | None, reason: str | None) -> None:
    found = memory.lack(GB, int(host_free), None if gpu_free is None else int(gpu_free))
    assert (found is None) is (reason is None)
    assert reason is None or (found is not None and reason in found)
