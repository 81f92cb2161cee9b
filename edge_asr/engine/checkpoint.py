"""Weights out of FunASR's own checkpoint, `model.pt`; needs torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from edge_asr.engine.weights import Array, Matrix, Weights
from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer.model_config import ModelConfig

LINEAR = re.compile(r"(linear_q_k_v|linear_q|linear_k_v|linear_out|w_1|w_2|cif_output|output_layer)\.weight$")
ARCHIVE_MARK = b"PK\x03\x04"


def read_checkpoint(path: Path, config: ModelConfig) -> Weights:
    """Return the weights of a checkpoint; raises BundleError where it is damaged, EngineError without torch."""
    try:
        import torch
    except ImportError as error:
        raise EngineError(
            f"{path}: reading a checkpoint needs torch: pip install 'edge-asr[checkpoint]', or export the model to ONNX"
        ) from error
    try:
        # What torch wrote before version 1.6 is no zip archive, and cannot be mapped.
        mapped = _is_archive(path)
        loaded: Any = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
        loaded = loaded.get("state_dict", loaded)
        parameters = {name: tensor.float().numpy() for name, tensor in loaded.items() if torch.is_tensor(tensor)}
    except Exception as error:  # of whatever kind torch's archive reader and unpickler raise on a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(f"{path}: damaged, or no checkpoint of torch; copy the bundle again ({reason})") from error
    return weights_of(parameters, config)


def _is_archive(path: Path) -> bool:
    """Whether a file begins as torch's zip archives do: the mark that torch itself goes by."""
    with path.open("rb") as file:
        return file.read(len(ARCHIVE_MARK)) == ARCHIVE_MARK


def weights_of(parameters: dict[str, Array], config: ModelConfig) -> Weights:
    """Return the weights of a state dict by FunASR's names."""
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, Array] = {}
    for name, value in parameters.items():
        if LINEAR.search(name):
            matrices[name.removesuffix(".weight")] = np.ascontiguousarray(value.T)
        else:
            vectors[name] = value
    return Weights(matrices, vectors, config)
