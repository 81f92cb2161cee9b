"""TensorRT's engine of the bundled model, on the fakes: what is wrong with it leads one rung down, with one line."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from bundled import BUNDLE, recording, sound_of, transcripts
from plans import RELEASE, plan, put_plan, put_processors
from tensorrt_fakes import fake_tensorrt

from edge_asr import cli
from edge_asr.config import EngineConfig
from edge_asr.errors import EngineError
from edge_asr.ladder import Ladder, load_ladder, plan_folder, rungs_of
from edge_asr.recognizer.bundle import FP32, INT8, read_bundle
from edge_asr.recognizer.manifest import FILE, ONNX, TENSORRT, Manifest, read_manifest, write_manifest
from edge_asr.recognizer.onnx_network import ONNX_CUDA

NAME = "01.wav"
TEXT = transcripts()[NAME]


@pytest.fixture(autouse=True)
def no_jetson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever machine the tests run on, it says nothing of L4T."""
    monkeypatch.setattr("edge_asr.recognizer.tensorrt_network.LEGACY_TEGRA", tmp_path / "nowhere")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with both engines of the bundled model."""
    put_plan(tmp_path / "state")
    put_processors(tmp_path / "state")
    return tmp_path / "state"


def wanted(target: str = TENSORRT, **keys: Any) -> EngineConfig:
    return EngineConfig.model_validate({"target": target, "threads": 1, **keys})


def load(state: Path, target: str = TENSORRT, **keys: Any) -> Ladder:
    return load_ladder(read_bundle(BUNDLE), wanted(target, **keys), state)


def heard(ladder: Ladder) -> tuple[str, str]:
    """Return what a ladder hears in a recording, and on which engine."""
    recognition = ladder.recognize(sound_of(NAME))
    return recognition.text, recognition.engine


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("target", ["auto", TENSORRT])
def test_the_plan_answers_where_there_are_tensorrt_and_a_gpu(
    state: Path, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_tensorrt(RELEASE):
        ladder = load(state, target, strict=True)
        assert (ladder.engine, ladder.why) == (TENSORRT, "")
        assert heard(ladder) == (TEXT, TENSORRT)
        ladder.close()
    assert caplog.messages == []


def nothing(place: Path) -> None:
    """The plan is as it was built."""


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)


def manifest_of(place: Path) -> Manifest:
    manifest = read_manifest(place)
    assert manifest is not None
    return manifest


def flipped_plan(place: Path) -> None:
    path = place / manifest_of(place).encoder
    flip(path, path.stat().st_size // 2)


def flipped_manifest(place: Path) -> None:
    flip(place / FILE, 1000)


def wrong_expectation(place: Path) -> None:
    manifest = manifest_of(place)
    assert manifest.self_test is not None
    ids = [number + 1 for number in manifest.self_test.ids]
    write_manifest(place, dataclasses.replace(manifest, self_test=dataclasses.replace(manifest.self_test, ids=ids)))


@dataclass(frozen=True)
class Trouble:
    """What may be wrong with a plan or its machine, and what is said of it."""

    reason: str
    """A pattern."""
    change: Callable[[Path], None] = nothing
    release: str | None = RELEASE
    """None: there is no TensorRT."""
    gpu: Mapping[str, Any] = field(default_factory=dict)

    def machine(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.release is None else fake_tensorrt(self.release, **self.gpu)


AGAIN = r"; run edge-asr build-engine"
TROUBLES = {
    "a plan of another version": Trouble(f"it was built for TensorRT 10.3.0, here is 10.13.*{AGAIN}", release="10.13"),
    "a flipped byte in the plan": Trouble(f"encoder-.*plan: damaged{AGAIN}", flipped_plan),
    "a flipped byte in the manifest": Trouble(f"manifest.json: .*{AGAIN}", flipped_manifest),
    "a missing library": Trouble("TensorRT is not installed.*set engine.target to onnx", release=None),
    "no GPU": Trouble("set engine.target to onnx", gpu={"gpu": "none"}),
    "a failed self-test": Trouble(f"it failed its self-test .*{AGAIN}", wrong_expectation),
    "no memory": Trouble("end what else uses the GPU", gpu={"oom_at": 3}),
}
troubles = pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)


@troubles
def test_whatever_is_wrong_with_a_plan_leads_one_rung_down_with_one_warning(
    state: Path, trouble: Trouble, caplog: pytest.LogCaptureFixture
) -> None:
    trouble.change(engine_place(state))
    with trouble.machine():
        ladder = load(state)
        assert heard(ladder) == (TEXT, FP32)
        ladder.close()
    [line] = warnings(caplog)
    assert re.fullmatch(f"onnx-fp32 answers instead of tensorrt-fp16: .*{trouble.reason}.*", line)
    assert "\n" not in line
    assert re.search(trouble.reason, ladder.why)


@troubles
def test_with_strict_whatever_is_wrong_with_a_plan_is_one_line_and_exit_code_3(
    state: Path, trouble: Trouble, capfd: pytest.CaptureFixture[str]
) -> None:
    trouble.change(engine_place(state))
    options = [f"state_dir={state}", f"engine.target={TENSORRT}", "engine.strict=true", "engine.threads=1"]
    command = ["transcribe", "--model", str(BUNDLE), *(part for option in options for part in ("-o", option))]
    with trouble.machine(), pytest.raises(SystemExit) as ended:
        cli.main([*command, str(recording(NAME))])
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (3, "")
    assert re.fullmatch(f"edge-asr: .*{trouble.reason}.*; engine.strict allows nothing less than tensorrt-fp16\n", err)


def engine_place(state: Path) -> Path:
    folder = plan_folder(read_bundle(BUNDLE), wanted(), state)
    assert folder is not None
    return folder


def test_a_flipped_byte_anywhere_in_the_manifest_is_noticed(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = engine_place(state) / FILE
    content = path.read_bytes()
    positions = random.Random(0).sample([k for k, byte in enumerate(content) if not chr(byte).isspace()], 12)
    with fake_tensorrt(RELEASE):
        for position in positions:
            caplog.clear()
            flip(path, position)
            ladder = load(state)
            assert ladder.engine == FP32, f"byte {position}: {content[position - 20 : position + 20]!r}"
            assert len(warnings(caplog)) == 1
            ladder.close()
            path.write_bytes(content)


def test_auto_takes_what_there_is_and_is_content_with_it(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    ladder = load(state, "auto", strict=True)  # there is no TensorRT here
    assert (heard(ladder), ladder.why) == ((TEXT, FP32), "")
    assert caplog.messages == []
    ladder.close()


def test_where_no_plan_is_built_yet_the_processor_answers(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    place = engine_place(state)
    shutil.rmtree(place)
    with fake_tensorrt(RELEASE):
        ladder = load(state, "auto")
    assert ladder.engine == FP32
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        f"onnx-fp32 answers instead of tensorrt-fp16: {place}: holds no engine; run edge-asr build-engine --model"
        f" {BUNDLE} --out {place}"
    )
    ladder.close()


def test_an_answer_that_is_not_finite_is_decoded_again_on_the_processor(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_tensorrt(RELEASE, nan_at=13):
        ladder = load(state)
        assert ladder.engine == TENSORRT
        assert [heard(ladder)[0] for _ in range(4)] == [TEXT] * 4
        assert heard(ladder) == (TEXT, FP32)
        assert ladder.engine == TENSORRT
        ladder.close()
    [line] = warnings(caplog)
    assert line.startswith("tensorrt-fp16 failed on a segment, which onnx-fp32 decoded again: ")


def test_a_gpu_that_breaks_is_left_and_no_request_is_lost(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    with fake_tensorrt(RELEASE, clean=False, fail_at=13):
        ladder = load(state)
        assert ladder.engine == TENSORRT
        assert [heard(ladder)[0] for _ in range(4)] == [TEXT] * 4
        assert (heard(ladder), ladder.engine) == ((TEXT, FP32), FP32)
        ladder.close()
    [line] = warnings(caplog)
    assert line.startswith("onnx-fp32 answers instead of tensorrt-fp16: ")


# Which rungs there are


def names(config: EngineConfig, state: Path) -> list[str]:
    return [rung.name for rung in rungs_of(read_bundle(BUNDLE), config, state)]


@pytest.mark.parametrize(
    ("keys", "without", "with_tensorrt"),
    [
        ({"target": "auto"}, [ONNX], [TENSORRT, ONNX]),
        ({"target": TENSORRT}, [TENSORRT, ONNX], [TENSORRT, ONNX]),
        ({"target": INT8}, [INT8], [INT8]),
        ({"target": "auto", "cuda": {"enabled": True}}, [ONNX_CUDA, ONNX], [TENSORRT, ONNX_CUDA, ONNX]),
        ({"target": INT8, "cuda": {"enabled": True}}, [ONNX_CUDA, INT8], [ONNX_CUDA, INT8]),
    ],
)
def test_the_rungs_follow_from_the_configuration_and_the_machine(
    keys: Mapping[str, Any], without: list[str], with_tensorrt: list[str], tmp_path: Path
) -> None:
    assert names(wanted(**keys), tmp_path) == without
    with fake_tensorrt(RELEASE):
        assert names(wanted(**keys), tmp_path) == with_tensorrt


def test_a_provider_that_is_not_there_is_passed_with_a_warning(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    ladder = load(state, FP32, cuda={"enabled": True})
    assert heard(ladder) == (TEXT, FP32)
    [line] = warnings(caplog)
    assert line.startswith("onnx-fp32 answers instead of onnx-cuda: ")
    assert "engine.cuda.enabled" in line
    ladder.close()


# engine.dir


def test_a_configured_plan_is_the_first_rung_whatever_the_target(tmp_path: Path) -> None:
    with fake_tensorrt(RELEASE):
        ladder = load(tmp_path / "state", "auto", dir=plan())
        assert heard(ladder) == (TEXT, TENSORRT)
        ladder.close()
    assert not (tmp_path / "state").exists()


def test_below_a_configured_plan_that_does_not_fit_is_the_engine_of_the_processor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_processors(tmp_path / "state")
    ladder = load(tmp_path / "state", "auto", dir=plan())  # there is no TensorRT here
    assert heard(ladder) == (TEXT, FP32)
    [line] = warnings(caplog)
    assert line.startswith("onnx-fp32 answers instead of tensorrt-fp16: TensorRT is not installed")
    ladder.close()


def test_a_configured_plan_with_a_damaged_manifest_is_passed_only_where_one_is_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_processors(tmp_path / "state")
    place = tmp_path / "engine"
    shutil.copytree(plan(), place)
    flip(place / FILE, 1000)
    with pytest.raises(EngineError, match=r"manifest\.json"):
        load(tmp_path / "state", "auto", dir=place)
    with fake_tensorrt(RELEASE):
        ladder = load(tmp_path / "state", "auto", dir=place)
    assert heard(ladder) == (TEXT, FP32)
    assert len(warnings(caplog)) == 1
    ladder.close()


def test_a_configured_folder_without_an_engine_is_an_error(tmp_path: Path) -> None:
    with fake_tensorrt(RELEASE), pytest.raises(EngineError, match="holds no engine"):
        load(tmp_path / "state", "auto", dir=tmp_path)
