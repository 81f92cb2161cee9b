"""The networks of an onnx-fp32 engine in FP16, as TensorRT gets them, for onnxruntime's CUDA provider to run."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import numpy_helper

from edge_asr.engine.graph import Graph
from edge_asr.engine.precision import calibrate, half, recordings, rescale
from edge_asr.recognizer.bundle import Bundle

ONNX_CUDA_HALF = "onnx-cuda-fp16"
"""What the bench calls them."""


def write_half(bundle: Bundle, encoder: Path, decoder: Path, folder: Path, threads: int) -> tuple[Path, Path]:
    """Write both networks in FP16 into `folder`, divided as far as calibration says. Raises EngineError."""
    folder.mkdir(exist_ok=True)
    graphs = [read(path) for path in (encoder, decoder)]
    calibration = calibrate(bundle, graphs[0], graphs[1], recordings(bundle), folder, threads)
    first, second = (half(rescale(graph, calibration.scale, calibration.inner)) for graph in graphs)
    return first.write(folder, "encoder")[0], second.write(folder, "decoder")[0]


def read(path: Path) -> Graph:
    """Read a network of an engine with its constants."""
    model = onnx.load(str(path))
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    del model.graph.initializer[:]
    return Graph(model, tensors)
