"""Paraformer: segment of speech -> recognition. Features, network, tokens, text, the same whatever the backend."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer.bundle import Bundle, cmvn_from_metadata
from edge_asr.recognizer.features import FeatureExtractor, Features
from edge_asr.recognizer.network import Network
from edge_asr.recognizer.tokens import SPECIAL_IDS, join
from edge_asr.types import SAMPLE_RATE, Recognition, Samples, Token

Ids = npt.NDArray[np.int64]
LogProbabilities = npt.NDArray[np.float32]


class Paraformer:
    """A loaded bundle. One thread at a time."""

    def __init__(self, bundle: Bundle, network: Network) -> None:
        """Join bundle and network, and try them on a second of noise; raises BundleError where they do not fit."""
        self.bundle = bundle
        self._network = network
        cmvn = bundle.cmvn or cmvn_from_metadata(network.metadata, bundle.graph)
        self._features = FeatureExtractor(cmvn.neg_mean, cmvn.inv_stddev)
        self._check_vocabulary()

    def recognize(self, samples: Samples) -> Recognition:
        """Recognise `[n]` samples (16 kHz, full scale +-1); text is empty for silence. Raises EngineError."""
        stages: dict[str, float] = {}
        with _timed(stages, "features"):
            features = self._features(samples)
        if not len(features):
            return Recognition("", (), None, stages)
        with _timed(stages, "model"):
            ids, log_probabilities = self._decode(features)
        spoken = ids >= SPECIAL_IDS
        ids, log_probabilities = ids[spoken], log_probabilities[spoken]
        if not len(ids):
            return Recognition("", (), None, stages)
        pieces = [self.bundle.tokens[i] for i in ids]
        confidences = np.exp(log_probabilities)
        tokens = tuple(Token(p, None, None, float(c)) for p, c in zip(pieces, confidences, strict=True))
        return Recognition(join(pieces), tokens, float(np.exp(log_probabilities.mean())), stages)

    def close(self) -> None:
        """Release the network."""
        self._network.close()

    def _decode(self, features: Features) -> tuple[Ids, LogProbabilities]:
        """Return the best id and its log-probability, `[N]` each, for features `[T, 560]`."""
        scores, count = self._run(features)
        scores = scores[:count]
        if not np.isfinite(scores).all():
            raise EngineError(f"{self.bundle.graph}: the scores are not finite")
        # Published graphs end in a log-softmax, some exports in plain scores: normalising is right for both.
        shares = np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)
        return scores.argmax(-1), -np.log(shares)

    def _run(self, features: Features) -> tuple[LogProbabilities, int]:
        """Return scores `[N, V]` and the number of tokens that count."""
        lengths = np.array([len(features)], np.int32)
        outputs = self._network.run({"speech": features[None], "speech_lengths": lengths})
        try:
            return outputs["logits"][0], max(0, int(outputs["token_num"].reshape(-1)[0]))
        except KeyError as error:
            raise self._no_paraformer(f"it has no output {error}") from error

    def _check_vocabulary(self) -> None:
        """Compare the graph's vocabulary with the token list: a wrong list would give fluent nonsense."""
        noise = np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32) * np.float32(0.1)
        with np.errstate(over="ignore"):  # what overflows is refused right here
            features = self._features(noise)
        self._check_finite(features)
        try:
            scores, _ = self._run(features)
        except EngineError as error:
            raise self._no_paraformer(str(error)) from error
        self._check_finite(scores)
        if scores.shape[-1] != len(self.bundle.tokens):
            raise BundleError(
                f"{self.bundle.graph.parent}: the token list holds {len(self.bundle.tokens)} tokens, the model"
                f" {scores.shape[-1]}; they are not of one bundle, copy it again"
            )

    def _check_finite(self, values: npt.NDArray[np.float32]) -> None:
        if not np.isfinite(values).all():
            raise BundleError(f"{self.bundle.graph.parent}: gives no finite numbers on noise; copy the bundle again")

    def _no_paraformer(self, why: str) -> BundleError:
        return BundleError(
            f"{self.bundle.graph}: damaged, or no Paraformer graph; copy the bundle again, or set `model` (or"
            f" --model) to the folder of a Paraformer bundle ({why})"
        )


@contextmanager
def _timed(stages: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    stages[stage] = (time.perf_counter() - started) * 1e3
