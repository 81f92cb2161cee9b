"""Plans of a tiny Paraformer with random weights, built with the fakes of TensorRT, and inputs for its networks."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from random_engine import bundle_of, weights_from
from tensorrt_fakes import fake_tensorrt

from edge_asr.engine.graph import Graph, decoder_graph, encoder_graph
from edge_asr.engine.precision import opset13
from edge_asr.recognizer.features import WIDTH
from edge_asr.recognizer.network import Arrays, DeviceArray
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.tensorrt_network import TensorRtNetwork, TensorRtOptions, load_networks

Profile = tuple[tuple[int, int], tuple[int, int]]

RELEASE = "10.3"
PROFILES: Sequence[Profile] = (((1, 1), (8, 64)), ((1, 1), (64, 160)), ((1, 4), (1, 64)))
"""Least and most utterances, least and most frames."""
OPTIONS = [
    TensorRtOptions(cuda_graphs=graphs, mapped_memory=mapped) for graphs in (False, True) for mapped in (False, True)
]
PLAIN, ALL = OPTIONS[0], OPTIONS[3]
Plans = tuple[Path, Path]


@functools.cache
def weights() -> Any:
    return weights_from("tiny")


@functools.cache
def metadata() -> Mapping[str, str]:
    scale, tail, vocabulary = weights().input_scale, weights().config.tail, weights().vocabulary
    return {"input_scale": repr(scale), "tail": repr(tail), "vocabulary": str(vocabulary), "batches": "true"}


@functools.cache
def graphs(old: bool) -> tuple[bytes, bytes]:
    """Return encoder and decoder as ONNX; `old`: as TensorRT 8.5 takes them."""
    networks: tuple[Graph, ...] = (encoder_graph(weights(), metadata()), decoder_graph(weights()))
    encoder, decoder = ((opset13(graph) if old else graph).model().SerializeToString() for graph in networks)
    return encoder, decoder


@functools.cache
def plan_bytes(release: str) -> tuple[bytes, bytes]:
    """Build both plans with the fake of a release."""
    with fake_tensorrt(release):
        encoder, decoder = (build(graph) for graph in graphs(release == "8.5"))
    return encoder, decoder


def build(graph: bytes, profiles: Sequence[Profile] = PROFILES) -> bytes:
    trt = importlib.import_module("tensorrt")
    log = trt.Logger(trt.Logger.Severity.ERROR)
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << flags.EXPLICIT_BATCH.value if hasattr(flags, "EXPLICIT_BATCH") else 0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(graph), parser.get_error(0)
    config = builder.create_builder_config()
    for batch, frames in profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            least, most = (shape_of(tensor, batch[i], frames[i], (1, frames[1])[i]) for i in (0, 1))
            profile.set_shape(tensor.name, least, most, most)
        config.add_optimization_profile(profile)
    return bytes(memoryview(builder.build_serialized_network(network, config)))


def shape_of(tensor: Any, batch: int, frames: int, tokens: int) -> tuple[int, ...]:
    sizes = {"cif": (batch, tokens, frames), "emb_mask": (batch, tokens)}
    return sizes.get(tensor.name, (batch, frames, *tuple(tensor.shape)[2:]))


def write_plans(folder: Path, release: str = RELEASE) -> Plans:
    """Write the plans of encoder and decoder; return their paths."""
    paths = folder / "encoder.plan", folder / "decoder.plan"
    for path, content in zip(paths, plan_bytes(release), strict=True):
        path.write_bytes(content)
    return paths


@contextmanager
def loaded(plans: Plans, options: TensorRtOptions | None = None) -> Iterator[tuple[TensorRtNetwork, TensorRtNetwork]]:
    networks = load_networks(*plans, metadata(), options or TensorRtOptions())
    try:
        yield networks
    finally:
        for network in networks:
            network.close()


@contextmanager
def recognizing(plans: Plans, options: TensorRtOptions | None = None) -> Iterator[Paraformer]:
    with loaded(plans, options) as networks:
        yield Paraformer(bundle_of("tiny", plans[0].parent), *networks, engine="tensorrt-fp16")


def frames(count: int, batch: int = 1, seed: int = 0) -> Arrays:
    """Return inputs of an encoder."""
    x = np.random.default_rng(seed).standard_normal((batch, count, WIDTH)).astype(np.float32)
    return {"x": x, "mask": np.ones((batch, count), np.float32)}


def tokens(enc: DeviceArray, count: int) -> Arrays:
    """Return inputs of a decoder, for the output of an encoder."""
    batch, length = enc.shape[:2]
    cif = np.random.default_rng(1).random((batch, count, length)).astype(np.float32) / length
    ones = {"enc_mask": np.ones((batch, length), np.float32), "emb_mask": np.ones((batch, count), np.float32)}
    return {"enc": enc, "cif": cif, **ones}
