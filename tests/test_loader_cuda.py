"""The engine for onnxruntime's CUDA provider: which one it is, when it is built, and what it is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bundled import BUNDLE, engine_of, sound_of, transcripts

from edge_asr import loader
from edge_asr.child import EngineBuild
from edge_asr.config import EngineConfig
from edge_asr.errors import EngineError
from edge_asr.loader import engine_folder, load_on_cuda
from edge_asr.recognizer.bundle import FP32, INT8, Bundle, read_bundle
from edge_asr.recognizer.onnx_network import ONNX_CUDA, CudaOptions, OnnxNetwork

NAME = "01.wav"
CONFIG = EngineConfig.model_validate(
    {"threads": 1, "gpu": 1, "cuda": {"enabled": True, "memory_limit_mb": 512, "search": "exhaustive"}}
)


@pytest.fixture(autouse=True)
def options(monkeypatch: pytest.MonkeyPatch) -> list[CudaOptions | None]:
    """What networks were told of the GPU; they run on the processor, for there may be none."""
    told: list[CudaOptions | None] = []

    def load(path: Path, threads: int, cuda: CudaOptions | None) -> OnnxNetwork:
        told.append(cuda)
        return OnnxNetwork(path, threads)

    monkeypatch.setattr(loader, "OnnxNetwork", load)
    return told


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """Where what is built; it comes ready-made."""
    made: list[tuple[Path, str]] = []

    def build(child: EngineBuild, bundle: Bundle, folder: Path, config: EngineConfig) -> None:
        made.append((folder, config.target))
        shutil.copytree(engine_of(config.target), folder)

    monkeypatch.setattr(EngineBuild, "run", build)
    return made


def check(state: Path, config: EngineConfig = CONFIG) -> None:
    recognizer = load_on_cuda(read_bundle(BUNDLE), config, state)
    recognition = recognizer.recognize(sound_of(NAME))
    assert (recognition.text, recognition.engine, recognizer.engine) == (transcripts()[NAME], ONNX_CUDA, ONNX_CUDA)
    recognizer.close()


def test_the_processors_engine_is_taken_where_it_is_fp32(
    tmp_path: Path, builds: list[tuple[Path, str]], options: list[CudaOptions | None]
) -> None:
    shutil.copytree(engine_of(FP32), engine_folder(read_bundle(BUNDLE), tmp_path))
    check(tmp_path)
    assert builds == []
    assert options == [CudaOptions(gpu=1, memory_limit_mb=512, search="exhaustive")] * 2


@pytest.mark.parametrize("beside", [[INT8], []], ids=["int8", "none"])
def test_else_one_in_fp32_is_built_beside_it_once(
    tmp_path: Path, beside: list[str], builds: list[tuple[Path, str]]
) -> None:
    place = engine_folder(read_bundle(BUNDLE), tmp_path)
    for engine in beside:
        shutil.copytree(engine_of(engine), place)
    check(tmp_path)
    check(tmp_path)
    assert builds == [(place.with_name(f"{place.name}-{ONNX_CUDA}"), FP32)]


def test_a_configured_engine_is_taken_if_it_is_fp32(tmp_path: Path, builds: list[tuple[Path, str]]) -> None:
    check(tmp_path, CONFIG.model_copy(update={"dir": engine_of(FP32)}))
    with pytest.raises(EngineError, match="it is onnx-int8, onnx-fp32 is wanted"):
        check(tmp_path, CONFIG.model_copy(update={"dir": engine_of(INT8)}))
    assert builds == []
