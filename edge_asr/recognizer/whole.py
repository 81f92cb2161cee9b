"""A published graph run as it is: for what we cannot take apart, and where no engine can be built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer.bundle import Bundle
from edge_asr.recognizer.cif import NEARLY_ONE, times_of_fires
from edge_asr.recognizer.features import Features
from edge_asr.recognizer.network import Arrays, Network, interruptible
from edge_asr.recognizer.paraformer import (
    NOTHING,
    Decoded,
    Times,
    check_vocabulary,
    feature_extractor,
    noise,
    recognition,
    timed,
)
from edge_asr.recognizer.tokens import SPECIAL_IDS
from edge_asr.types import Recognition, Samples

UPSAMPLED = 3
"""Finer alphas to an encoder frame."""


class WholeParaformer:
    """A bundle's own graph: `speech`, `speech_lengths` -> `logits`, `token_num`. One thread at a time.

    Tokens have times only where the graph gives finer alphas as well (`us_alphas` and `us_cif_peak`, of BiCif models).
    """

    batches = False
    largest_batch = 1

    def __init__(self, bundle: Bundle, network: Network, engine: str) -> None:
        """Join bundle and network, and try them on a second of noise; raises BundleError where they do not fit.

        `engine`: what transcripts call it, `onnx-fp32` for example.
        """
        self.bundle, self.engine = bundle, engine
        self._network = network
        self._features = feature_extractor(bundle, network.metadata)
        try:
            scores, _ = self._scores(self._run(self._features(noise())))
        except EngineError as error:
            raise BundleError(
                f"{bundle.graph}: damaged, or no Paraformer graph; copy the bundle again, or set `model` (or"
                f" --model) to the folder of a Paraformer bundle ({error})"
            ) from error
        if not np.isfinite(scores).all():
            raise BundleError(f"{bundle.folder}: gives no finite numbers on noise; copy the bundle again")

    def recognize(self, samples: Samples) -> Recognition:
        """Recognise `[n]` samples (16 kHz, full scale +-1); text is empty for silence. Raises EngineError."""
        stages: dict[str, float] = {}
        with timed(stages, "features"):
            features = self._features(samples)
        if not len(features):
            return recognition(self.bundle, NOTHING, stages, None, self.engine)
        with timed(stages, "model"):
            outputs = self._run(features)
            decoded = self._best(*self._scores(outputs))
        return recognition(self.bundle, decoded, stages, _times(outputs, decoded), self.engine)

    def recognize_batch(self, batch: Sequence[Samples]) -> list[Recognition]:
        """Recognise several segments, one by one: padding would change what they are."""
        return [self.recognize(samples) for samples in batch]

    def interrupt(self) -> None:
        """End what is being recognised, and let nothing begin, where the network can; see Interruptible."""
        for network in interruptible(self._network):
            network.interrupt()

    def resume(self) -> None:
        """Go on recognising."""
        for network in interruptible(self._network):
            network.resume()

    def close(self) -> None:
        """Release the network."""
        self._network.close()

    def decode(self, samples: Samples) -> Decoded:
        """Return what the graph says of `[n]` samples, without alphas. Raises EngineError."""
        features = self._features(samples)
        return self._best(*self._scores(self._run(features))) if len(features) else NOTHING

    def _best(self, scores: npt.NDArray[np.float32], count: int) -> Decoded:
        scores = scores[:count]
        if not np.isfinite(scores).all():
            raise EngineError(f"{self.bundle.graph}: the scores are not finite")
        # Published graphs end in a log-softmax, some exports in plain scores: normalising is right for both.
        shares = np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)
        return Decoded(scores.argmax(-1), -np.log(shares), NOTHING.alphas)

    def _scores(self, outputs: Arrays) -> tuple[npt.NDArray[np.float32], int]:
        """Return scores `[N, V]` and the number of tokens that count. Raises EngineError for what is neither."""
        try:
            logits, counts = outputs["logits"], outputs["token_num"].reshape(-1)
        except KeyError as error:
            raise EngineError(f"{self.bundle.graph}: it has no output {error}") from error
        if logits.ndim != 3 or not len(logits) or logits.dtype.kind != "f":
            raise EngineError(f"{self.bundle.graph}: its `logits` are {_shown(logits)}, not of shape [1, N, V]")
        if not len(counts) or counts.dtype.kind not in "iuf" or not np.isfinite(counts[0]):
            raise EngineError(f"{self.bundle.graph}: its `token_num`, {_shown(outputs['token_num'])}, is no number")
        check_vocabulary(self.bundle, logits.shape[-1])
        return logits[0], max(0, int(counts[0]))

    def _run(self, features: Features) -> Arrays:
        return self._network.run({"speech": features[None], "speech_lengths": np.array([len(features)], np.int32)})


def _times(outputs: Arrays, decoded: Decoded) -> Times | None:
    """Return start and end in ms of each token that is not special; None where the graph does not tell."""
    if not {"us_alphas", "us_cif_peak"} <= set(outputs):
        return None
    finer, peaks = outputs["us_alphas"], outputs["us_cif_peak"]
    # Text without times is better than none: what is not what BiCif models give is left alone.
    if finer.ndim != 2 or not len(finer) or finer.shape != peaks.shape or not _are_finite(finer, peaks):
        return None
    alphas, fired = finer[0].astype(np.float32, copy=False), peaks[0] >= NEARLY_ONE
    spoken = int((decoded.ids >= SPECIAL_IDS).sum())
    return times_of_fires(alphas, fired, spoken, rate=UPSAMPLED)


def _are_finite(*arrays: npt.NDArray[Any]) -> bool:
    return all(array.dtype.kind == "f" and bool(np.isfinite(array).all()) for array in arrays)


def _shown(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} of shape {list(array.shape)}"
