"""Networks on TensorRT: what goes wrong is one clear line and leaves nothing behind; threads and the end."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_engine import bundle_of
from random_weights import utterance
from small_plans import (
    ALL,
    PLAIN,
    RELEASE,
    build,
    frames,
    loaded,
    metadata,
    plan_bytes,
    recognizing,
    tokens,
    weights,
    write_plans,
)
from tensorrt_fakes import fake_tensorrt

from edge_asr.engine.graph import encoder_graph
from edge_asr.errors import BrokenEngineError, EngineError, NotFiniteError
from edge_asr.recognizer import cuda, tensorrt_network
from edge_asr.recognizer.cuda import FREE_MEMORY
from edge_asr.recognizer.manifest import REMEDY
from edge_asr.recognizer.network import DeviceArray
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.tensorrt_network import TensorRtNetwork, TensorRtOptions, load_networks, machine, unavailable
from edge_asr.types import SAMPLE_RATE

SOUND = utterance(7)[: 2 * SAMPLE_RATE]


# What goes wrong while loading


def damage(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("which", [0, 1], ids=["encoder", "decoder"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(damage(path.read_bytes())), "Magic tag does not match"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(plan_bytes("10.13")[path.name != "encoder.plan"]), "Version tag does not match"),
    ],
    ids=["flipped", "empty", "missing", "of another TensorRT"],
)
def test_a_plan_that_cannot_be_loaded_is_one_line_with_the_remedy(
    which: int, harm: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    paths = write_plans(tmp_path)
    plan_bytes("10.13")
    harm(paths[which])
    with fake_tensorrt(RELEASE), pytest.raises(EngineError) as raised:
        load_networks(*paths, metadata(), TensorRtOptions())
    line = str(raised.value)
    assert line.startswith(f"{paths[which]}: ")
    assert said in line
    assert line.endswith(REMEDY)
    assert "\n" not in line


def test_a_plan_for_another_gpu_is_refused(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE, sm="7.2"), pytest.raises(EngineError, match=r"incompatible device.*build-engine again"):
        load_networks(*paths, metadata(), TensorRtOptions())


def test_a_plan_of_something_else_is_refused(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE):
        graph = encoder_graph(weights(), metadata()).model()
        graph.graph.input[1].name = "lengths"
        for node in graph.graph.node:
            node.input[:] = ["lengths" if name == "mask" else name for name in node.input]
        paths[0].write_bytes(build(graph.SerializeToString()))
        with pytest.raises(EngineError, match=r"no plan of edge-asr \('lengths'\).*build-engine again"):
            load_networks(*paths, metadata(), TensorRtOptions())


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=str)
@pytest.mark.parametrize("release", ["8.5", "11.4"])
def test_out_of_memory_anywhere_leaves_nothing_behind(
    release: str, options: TensorRtOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = write_plans(tmp_path, release)
    with fake_tensorrt(release) as gpu:
        with loaded(paths, options):
            needed = gpu.counts["allocations"]
        assert needed >= 10
        refused = []
        for number in range(1, needed + 1):
            gpu.out_of_memory_at = gpu.counts["allocations"] + number
            caplog.clear()
            try:
                with loaded(paths, options):
                    assert "CUDA graph: out of memory" in caplog.text, "all else is needed"
            except EngineError as error:
                refused.append(error)
            assert gpu.leaks() == [], "not even while the error is kept"
        assert len(refused) >= 10
        assert all(FREE_MEMORY in str(error) and not isinstance(error, BrokenEngineError) for error in refused)


def test_what_is_lacking_is_named(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE) as gpu:
        with loaded(paths):
            engines = sum(one.size for one in gpu.allocations.values() if one.kind == "engine")
        gpu.free = engines + 100_000
        with pytest.raises(
            EngineError, match=r"the GPU has no [\d.]+ MB left for what the networks compute on the way"
        ):
            load_networks(*paths, metadata(), TensorRtOptions())


def test_out_of_memory_for_a_batch_leaves_the_rest_at_work(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE) as gpu, loaded(paths) as (encoder, _):
        alone = encoder.run(frames(20))["alphas"]
        held = len(gpu.allocations)
        for number in range(1, 8):  # then what is computed on the way
            gpu.out_of_memory_at = gpu.counts["allocations"] + number
            with pytest.raises(EngineError, match=r"left for|locked in memory"):
                encoder.run(frames(20, 2))
            assert len(gpu.allocations) == held
        gpu.out_of_memory_at = gpu.counts["allocations"] + 8
        with pytest.raises(EngineError, match="left for what the networks compute on the way"):
            encoder.run(frames(20, 2))
        np.testing.assert_array_equal(encoder.run(frames(20))["alphas"], alone)
        encoder.run(frames(20, 2))


def test_a_context_that_cannot_be_made_is_an_error_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, _):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("tensorrt").ICudaEngine, "_context", lambda self, managed: None)
            with pytest.raises(EngineError, match="cannot make an execution context"):
                encoder.run(frames(20))
        encoder.run(frames(20))


@pytest.mark.parametrize(("method", "left"), [("set_optimization_profile_async", 4), ("set_input_shape", 5)])
def test_an_error_that_is_kept_keeps_nothing_on_the_gpu(
    method: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE) as gpu:
        contexts = importlib.import_module("tensorrt")._runtime.IExecutionContext
        with loaded(paths) as (encoder, _):
            monkeypatch.setattr(contexts, method, lambda self, *arguments: False)
            with pytest.raises(EngineError) as raised:
                encoder.run(frames(20))
            assert gpu.live["execution contexts"] == left
        assert gpu.leaks() == []
        assert raised.value.__traceback__ is not None


@pytest.mark.parametrize(
    ("method", "answer", "said"),
    [
        ("set_input_shape", False, r"refuses x \(1, 24, 560\)"),
        ("set_tensor_address", False, "refuses the address of"),
        ("infer_shapes", ["mask"], "cannot tell the shapes"),
        ("infer_shapes", RuntimeError("infer_shapes error code: -1"), "cannot tell the shapes"),
        ("get_tensor_shape", (1, -1), "would answer"),
        ("execute_async_v3", False, "cannot run it"),
        ("set_optimization_profile_async", False, "cannot choose profile 0"),
        ("set_optimization_profile_async", RuntimeError("Error in set optimization profile async."), "cannot choose"),
    ],
)
def test_every_answer_of_tensorrt_is_looked_at(
    method: str, answer: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(context: Any, *arguments: Any) -> Any:
        context._logger.log(importlib.import_module("tensorrt").ILogger.Severity.ERROR, "this is\nwhy")
        if isinstance(answer, Exception):
            raise type(answer)(*answer.args)
        return answer

    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, _):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("tensorrt")._runtime.IExecutionContext, method, refuse)
            with pytest.raises(EngineError, match=rf"{said}.*\(this is why\); {REMEDY}") as raised:
                encoder.run(frames(20))
            assert not isinstance(raised.value, BrokenEngineError)
            del raised  # its traceback holds the context, in the frame of refuse()
        encoder.run(frames(20))


# What goes wrong while running


def run_next(encoder: TensorRtNetwork, decoder: TensorRtNetwork, number: int, enc: DeviceArray) -> DeviceArray:
    """Run the encoder when the number is odd, else the decoder."""
    if number % 2:
        found: DeviceArray = encoder.run(frames(20))["enc"]
        return found
    decoder.run(tokens(enc, 4))
    return enc


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=str)
@pytest.mark.parametrize("failing", [1, 2, 4, 5])
def test_after_an_error_of_the_gpu_nothing_can_be_computed(
    failing: int, options: TensorRtOptions, tmp_path: Path
) -> None:
    """Also where somebody keeps the errors: nothing of the GPU is kept with them, or it would be given back late."""
    paths = write_plans(tmp_path)
    kept = []
    with fake_tensorrt(RELEASE) as gpu, loaded(paths, options) as (encoder, decoder):
        gpu.fail_at = gpu.counts["executions"] + failing
        enc: Any = None
        for number in range(1, failing):
            enc = run_next(encoder, decoder, number, enc)
        for number in (failing, failing, 1, 1):
            with pytest.raises(BrokenEngineError, match=r"launch failure.*restart edge-asr") as caught:
                run_next(encoder, decoder, number, enc)
            kept.append(caught.value)


def test_numbers_that_are_not_finite_have_an_error_of_their_own(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    for failing in (1, 2):  # of the encoder, of the decoder
        with fake_tensorrt(RELEASE) as gpu, recognizing(paths) as recognizer:
            gpu.nan_at = gpu.counts["executions"] + failing
            with pytest.raises(NotFiniteError):
                recognizer.recognize(SOUND)


def test_what_the_longest_need_and_is_not_there_shows_while_loading(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    for failing in (1, 2, 3, 4):  # both networks in both profiles
        with fake_tensorrt(RELEASE, clean=False, fail_at=failing) as gpu:
            with pytest.raises(BrokenEngineError, match="launch failure"):
                load_networks(*paths, metadata(), TensorRtOptions())
            assert gpu.counts["executions"] == failing


# Threads, and the end


def test_any_thread_may_load_run_and_close(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    found: list[Any] = []

    def on_a_thread(work: Callable[[], Any]) -> Any:
        thread = threading.Thread(target=lambda: found.append(work()))
        thread.start()
        thread.join()
        return found.pop()

    with fake_tensorrt(RELEASE) as gpu:
        networks = on_a_thread(lambda: load_networks(*paths, metadata(), TensorRtOptions(cuda_graphs=True)))
        bundle = bundle_of("tiny", paths[0].parent)
        recognizer = on_a_thread(lambda: Paraformer(bundle, networks[0], networks[1], engine="tensorrt-fp16"))
        text = recognizer.recognize(SOUND).text
        assert text
        assert on_a_thread(lambda: recognizer.recognize(SOUND)).text == text
        assert not any(gpu.stacks.values()), "no thread keeps the context"
        on_a_thread(recognizer.close)
        assert gpu.leaks() == []


def test_closing_twice_does_no_harm_and_what_is_closed_does_not_run(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, decoder):
        enc = encoder.run(frames(20))["enc"]
        for _ in range(2):
            decoder.close()
        with pytest.raises(EngineError, match="is closed"):
            decoder.run(tokens(enc, 4))
        encoder.run(frames(20))


def test_another_pair_is_loaded_beside_the_first_and_outlives_it(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE) as gpu, loaded(paths) as (first, _):
        wanted = first.run(frames(20))["alphas"]
        for _ in range(10):
            with loaded(paths, TensorRtOptions(cuda_graphs=True)) as (second, _):
                np.testing.assert_array_equal(second.run(frames(20))["alphas"], wanted)
            np.testing.assert_array_equal(first.run(frames(20))["alphas"], wanted)
            assert gpu.live["primary contexts"] == 1


def test_the_context_of_others_stays_as_it_is(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE):
        driver = importlib.import_module("pycuda.driver")
        driver.init()
        other = driver.Device(0).make_context()
        with loaded(paths) as (encoder, _):
            encoder.run(frames(20))
            assert driver.Context.get_current() is other
        assert driver.Context.get_current() is other
        other.detach()


def test_what_tensorrt_says_is_for_the_log_at_debug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_plans(tmp_path)
    caplog.set_level(logging.DEBUG, "edge_asr")
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, _):
        trt = importlib.import_module("tensorrt")
        log = encoder._plan.log
        assert isinstance(log, trt.ILogger)
        log.log(trt.ILogger.Severity.WARNING, "look here")
        log.log(trt.ILogger.Severity.INFO, "by the way")
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert (logging.DEBUG, "TensorRT: look here") in said
    assert "by the way" not in str(said)


# Machines


@pytest.mark.parametrize(
    ("release", "settings", "number", "said"),
    [
        ("broken", {}, 0, r"TensorRT is not installed, or cannot be loaded \(libnvdla_compiler.so"),
        (RELEASE, {"gpu": "nodriver"}, 0, r"pycuda cannot be loaded \(libcuda.so.1"),
        (RELEASE, {"gpu": "none"}, 0, "CUDA finds no GPU .*no CUDA-capable device"),
        (RELEASE, {}, 3, r"there is no GPU 3 \(engine.gpu\), only 1"),
    ],
)
def test_what_is_lacking_is_told_in_a_line(
    release: str, settings: dict[str, Any], number: int, said: str, tmp_path: Path
) -> None:
    with fake_tensorrt(release, clean=False, **settings):
        why = unavailable(number)
        assert why is not None
        assert "\n" not in why
        with pytest.raises(EngineError, match=said):
            load_networks(tmp_path, tmp_path, {}, TensorRtOptions(gpu=number))
        with pytest.raises(EngineError, match=said):
            machine(number)


@pytest.mark.parametrize(
    ("module", "made", "said"),
    [
        ("tensorrt", None, "TensorRT is not installed"),
        ("tensorrt", types.ModuleType("tensorrt"), "TensorRT is not installed, or cannot be loaded"),
        ("tensorrt", types.SimpleNamespace(__version__="8.4.3.1"), "TensorRT 8.4.3.1 is too old"),
        ("pycuda.driver", None, "pycuda cannot be loaded"),
    ],
)
def test_what_is_not_installed_half_there_or_too_old_is_told(
    module: str, made: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_tensorrt(RELEASE):
        monkeypatch.setitem(sys.modules, module, made)
        assert str(unavailable()).startswith(said)
        monkeypatch.undo()


def test_the_machine_says_what_plans_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tegra = tmp_path / "nv_tegra_release"
    tegra.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081\n# KERNEL_VARIANT: oot\n")
    monkeypatch.setattr(tensorrt_network, "LEGACY_TEGRA", tegra)
    with fake_tensorrt("10.3", sm="8.7", memory="1000000,8000000", name="Orin", multiprocessors=16) as gpu:
        found = machine()
        assert gpu.live["primary contexts"] == 0, "it takes a second on a Jetson"
        assert cuda.free_bytes(0) == 1_000_000
    assert (found.tensorrt, found.cuda, found.driver, found.gpu, found.sm) == ("10.3.0", "12.6", "12.6", "Orin", "8.7")
    assert (found.multiprocessors, found.total_bytes, found.integrated) == (16, 8_000_000, True)
    assert found.l4t == "# R36 (release), REVISION: 4.3, GCID: 38968081"
    tegra.unlink()
    with fake_tensorrt("11.4", integrated=0):
        assert (machine().l4t, machine().cuda, machine().integrated) == (None, "13.2", False)
