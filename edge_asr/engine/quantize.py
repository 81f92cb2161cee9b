"""fp32 weights to 8 bits, and back."""

from __future__ import annotations

import dataclasses

import numpy as np

from edge_asr.engine.weights import OUTPUT, PREDICTOR_OUTPUT, Array, Matrix, Quantized, Weights

KEPT = (OUTPUT, PREDICTOR_OUTPUT)
"""Stay in fp32, as in FunASR's recipe: the scores of the vocabulary and the weights of the frames."""
LARGEST = 127


def quantize(weights: Weights) -> Weights:
    """Return the weights with matrices in signed 8 bits, column by column, symmetrically."""
    matrices = {name: _quantize(name, matrix) for name, matrix in weights.matrices.items()}
    return dataclasses.replace(weights, matrices=matrices)


def dequantize(weights: Weights) -> Weights:
    """Return the weights with all matrices in fp32: of a bundle that was published in int8 only."""
    matrices = {name: m.dequantized() if isinstance(m, Quantized) else m for name, m in weights.matrices.items()}
    return dataclasses.replace(weights, matrices=matrices)


def _quantize(name: str, matrix: Matrix) -> Matrix:
    if name in KEPT or isinstance(matrix, Quantized):
        return matrix
    scales: Array = np.maximum(np.abs(matrix).max(axis=0), np.finfo(np.float32).tiny) / np.float32(LARGEST)
    values = np.rint(matrix / scales).astype(np.int8)
    return Quantized(values, scales, np.zeros(len(scales), np.int8))
