"""Engines of the random-weight Paraformers, written without torch and without a published graph."""

from __future__ import annotations

from pathlib import Path

from random_weights import SCALE, SHIFT, VOCABULARIES, Size, state_dict

from edge_asr.engine.checkpoint import weights_of
from edge_asr.engine.graph import Graph, decoder_graph, encoder_graph
from edge_asr.engine.quantize import quantize
from edge_asr.engine.weights import Array, Weights, check
from edge_asr.recognizer.bundle import FP32, INT8, Bundle, Cmvn
from edge_asr.recognizer.model_config import ModelConfig
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.paraformer import Paraformer


def bundle_of(size: Size, folder: Path) -> Bundle:
    """Return a bundle with the CMVN that fits the utterances, and a made-up token list."""
    tokens = tuple(f"<{number}>" for number in range(VOCABULARIES[size]))
    files = {FP32: folder / "model.onnx"}
    return Bundle(size, folder, files, ModelConfig(), tokens, Cmvn(SHIFT, SCALE), {})


def weights_from(size: Size, **changed: Array) -> Weights:
    """Return the checked weights of a size; `changed`: tensors by name, with `__` for a dot."""
    parameters = state_dict(size)
    parameters.update({name.replace("__", "."): value for name, value in changed.items()})
    weights = weights_of(parameters, ModelConfig())
    check(weights)
    return weights


def recognizer_of(weights: Weights, size: Size, folder: Path, signed: bool = True) -> Paraformer:
    """Write both networks of the weights into `folder`, and load them."""
    metadata = {
        "input_scale": repr(weights.input_scale),
        "tail": repr(weights.config.tail),
        "vocabulary": str(weights.vocabulary),
        "batches": str(not weights.quantized).lower(),
    }
    engine = INT8 if weights.quantized else FP32
    encoder = _load(encoder_graph(weights, metadata, signed), folder, f"{engine}-encoder")
    decoder = _load(decoder_graph(weights, signed), folder, f"{engine}-decoder")
    return Paraformer(bundle_of(size, folder), encoder, decoder, engine)


def _load(network: Graph, folder: Path, name: str) -> OnnxNetwork:
    path, _ = network.write(folder, name)
    return OnnxNetwork(path, threads=1)


def quantized_from(size: Size) -> Weights:
    """Return the weights of a size in 8 bits."""
    return quantize(weights_from(size))
