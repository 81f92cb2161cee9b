"""The CUDA provider of onnxruntime: its code on memory of the processor, and what is said where there is no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np
import onnxruntime
import pytest
from bundled import bundle_of, engine_of, load, sound_of, transcripts

from edge_asr.config import CudaConfig
from edge_asr.errors import BrokenEngineError, EngineError
from edge_asr.recognizer import onnx_network
from edge_asr.recognizer.bundle import FP32
from edge_asr.recognizer.manifest import read_manifest
from edge_asr.recognizer.network import BUCKETS
from edge_asr.recognizer.onnx_network import ARENAS, ONNX_CUDA, SEARCHES, CudaOptions, OnnxNetwork
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.types import Samples

needs_no_gpu = pytest.mark.skipif(
    onnx_network.CUDA_PROVIDER in onnxruntime.get_available_providers(), reason="this onnxruntime knows CUDA"
)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bind everything to the processor's memory instead of a GPU's: the same code runs."""
    monkeypatch.setattr(onnx_network, "CUDA_PROVIDER", onnx_network.CPU_PROVIDER)
    monkeypatch.setattr(onnx_network, "CUDA_DEVICE", "cpu")


@pytest.fixture(params=[False, True], ids=["launched", "replayed"])
def bound(request: pytest.FixtureRequest, without_gpu: None) -> Iterator[Paraformer]:
    """Yield the bundled model with its arrays bound."""
    recognizer = Paraformer(bundle_of(FP32), *networks(CudaOptions(graphs=request.param)), ONNX_CUDA)
    yield recognizer
    recognizer.close()


def networks(cuda: CudaOptions) -> tuple[OnnxNetwork, OnnxNetwork]:
    folder = engine_of(FP32)
    manifest = read_manifest(folder)
    assert manifest is not None
    return OnnxNetwork(folder / manifest.encoder, 1, cuda), OnnxNetwork(folder / manifest.decoder, 1, cuda)


def sounds() -> list[Samples]:
    return [sound_of(name) for name in transcripts()]


def assert_same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-4)
        np.testing.assert_allclose(one.alphas, other.alphas, atol=1e-5)


# Arrays that are bound


def test_bound_networks_hear_what_others_do(bound: Paraformer) -> None:
    usual = load(FP32)
    # Once more: what one sound has left in fixed arrays must not show in another.
    twice = [*sounds(), *sounds()]
    assert_same([bound.decode(sound) for sound in twice], [usual.decode(sound) for sound in twice])
    assert bound.recognize(twice[0]).text == usual.recognize(twice[0]).text != ""
    usual.close()


def test_a_batch_is_the_same_as_its_sounds_alone(bound: Paraformer) -> None:
    batch = sounds()[:3]
    assert [each.text for each in bound.recognize_batch(batch)] == [bound.recognize(each).text for each in batch]


def test_what_is_longer_than_half_a_minute_is_no_problem(bound: Paraformer) -> None:
    long = np.resize(sounds()[0], 16_000 * 33)
    usual = load(FP32)
    assert_same([bound.decode(long)], [usual.decode(long)])
    usual.close()


@pytest.mark.parametrize("graphs", [False, True])
def test_what_the_decoder_reads_stays_on_the_device(without_gpu: None, graphs: bool) -> None:
    encoder, decoder = networks(CudaOptions(graphs=graphs))
    inputs = {"x": np.zeros((1, 17, 560), np.float32), "mask": np.ones((1, 17), np.float32)}
    encoded: Any = encoder.run(inputs)
    assert encoded["alphas"].shape == (1, 17)
    frames = 24 if graphs else 17
    assert encoded["enc"].shape[:2] == (1, frames)
    assert not isinstance(encoded["enc"], np.ndarray)
    assert encoded["enc"].numpy().shape == encoded["enc"].shape
    cif = np.zeros((1, 2, frames), np.float32)
    masks = {"enc_mask": inputs["mask"], "emb_mask": np.ones((1, 2), np.float32)}
    decoded = decoder.run({"enc": encoded["enc"], "cif": cif, **masks})
    assert decoded["ids"].shape == decoded["logp"].shape == (1, 2)
    for network in (encoder, decoder):
        network.close()


def test_launches_are_recorded_once_for_each_bucket(without_gpu: None) -> None:
    encoder, decoder = networks(CudaOptions(graphs=True))
    recorded = encoder._bound._recorded  # type: ignore[union-attr]
    for frames in (9, 16, 12, 17, BUCKETS[-1] + 1):
        encoder.run({"x": np.zeros((1, frames, 560), np.float32), "mask": np.ones((1, frames), np.float32)})
    assert [key[1] for key in recorded] == [("T", 16), ("T", 24)]
    graphs = [each.options.get_run_config_entry("gpu_graph_id") for each in recorded.values()]
    assert graphs == ["1", "2"]
    for network in (encoder, decoder):
        network.close()


# Options


def test_options_are_called_as_onnxruntime_calls_them() -> None:
    assert CudaOptions(2, 1024, "power-of-two", "exhaustive", True).for_provider() == {
        "device_id": "2",
        "gpu_mem_limit": "1073741824",
        "arena_extend_strategy": "kNextPowerOfTwo",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "use_tf32": "0",
        "enable_cuda_graph": "1",
    }


def test_the_predictor_never_runs_in_tf32_and_memory_is_limited_only_if_asked() -> None:
    options = CudaOptions().for_provider()
    assert options["use_tf32"] == "0"
    assert "gpu_mem_limit" not in options


@pytest.mark.parametrize(("key", "names"), [("arena", ARENAS), ("search", SEARCHES)])
def test_whatever_can_be_configured_is_known(key: str, names: dict[str, str]) -> None:
    assert set(get_args(CudaConfig.model_fields[key].annotation)) == set(names)


# Where there is no GPU


@needs_no_gpu
def test_an_onnxruntime_without_cuda_is_said_with_the_remedy() -> None:
    with pytest.raises(EngineError, match=r"knows no CUDA: .*pip install 'edge-asr\[gpu\]'") as raised:
        networks(CudaOptions())
    assert len(str(raised.value).splitlines()) == 1


@needs_no_gpu
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_onnxruntime_must_not_go_on_without_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [onnx_network.CUDA_PROVIDER])
    with pytest.raises(EngineError, match=r"cannot use GPU 3 \(.*providers_cuda\.so.*\); install CUDA") as raised:
        networks(CudaOptions(gpu=3))
    assert len(str(raised.value).splitlines()) == 1


@needs_no_gpu
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_libraries_without_a_gpu_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [onnx_network.CUDA_PROVIDER])
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: None)
    with pytest.raises(EngineError, match="its libraries are there, but no GPU"):
        networks(CudaOptions())


# What fails on the way


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", BrokenEngineError),
        ("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0", BrokenEngineError),
        ("Non-zero status code: Failed to allocate memory for requested buffer of size 4096", EngineError),
    ],
)
def test_an_error_of_the_gpu_breaks_the_engine_and_others_do_not(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch, said: str, kind: type[EngineError]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(said)

    encoder, decoder = networks(CudaOptions())
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", fail)
    with pytest.raises(EngineError, match="onnxruntime failed: ") as raised:
        encoder.run({"x": np.zeros((1, 4, 560), np.float32), "mask": np.ones((1, 4), np.float32)})
    assert type(raised.value) is kind
    for network in (encoder, decoder):
        network.close()
