"""Paraformer: segment of speech -> recognition. Features, encoder, CIF, decoder, text, whatever the backend."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_asr.errors import BundleError, EngineError, NotFiniteError, TooLargeError
from edge_asr.recognizer.bundle import Bundle, cmvn_from_metadata
from edge_asr.recognizer.cif import Alphas, overlaps, token_times
from edge_asr.recognizer.features import WIDTH, FeatureExtractor, Features
from edge_asr.recognizer.network import Arrays, DeviceArray, Network, interruptible
from edge_asr.recognizer.tokens import SPECIAL_IDS, join
from edge_asr.types import SAMPLE_RATE, Recognition, Samples, Token

Ids = npt.NDArray[np.int64]
LogProbabilities = npt.NDArray[np.float32]
Times = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the networks say of one utterance."""

    ids: Ids
    """Best token ids `[N]`, special ones among them."""
    log_probabilities: LogProbabilities
    """Of those ids, `[N]`."""
    alphas: Alphas
    """`[T]`: the share of a token in each frame."""


USUAL_FRAMES = 512
"""Half a minute, the longest segment that can be configured; more are computed when they come."""
ANY_NUMBER = 1 << 20
NOTHING = Decoded(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))


class Paraformer:
    """An engine with its bundle: encoder and decoder network. One thread at a time."""

    def __init__(self, bundle: Bundle, encoder: Network, decoder: Network, engine: str) -> None:
        """Join bundle and networks, and try them on a second of noise; raises BundleError where they do not fit.

        `engine`: what transcripts call it, `onnx-int8` for example.
        """
        self.bundle, self.engine = bundle, engine
        self._encoder, self._decoder = encoder, decoder
        self._features = feature_extractor(bundle, encoder.metadata)
        try:
            self._input_scale = np.float32(encoder.metadata["input_scale"])
            self._tail = float(encoder.metadata["tail"])
            self.batches = encoder.metadata["batches"] == "true"
            """Whether utterances can share a run without changing each other; in int8 they cannot."""
            # Graphs take any number; plans were built for so many.
            self.largest_batch: int = getattr(encoder, "largest_batch", ANY_NUMBER)
            vocabulary = int(encoder.metadata["vocabulary"])
        except (KeyError, ValueError) as error:
            raise EngineError(f"{bundle.folder}: its engine lacks {error}; run edge-asr build-engine again") from error
        check_vocabulary(bundle, vocabulary)
        self._positions = position_encoding(USUAL_FRAMES)
        self.recognize(noise())  # the first run takes longer, and what is damaged shows

    def recognize(self, samples: Samples) -> Recognition:
        """Recognise `[n]` samples (16 kHz, full scale +-1); text is empty for silence. Raises EngineError."""
        stages: dict[str, float] = {}
        with timed(stages, "features"):
            features = self._features(samples)
        [decoded] = self._decode([features], stages) if len(features) else [NOTHING]
        return self._recognition(decoded, stages)

    def recognize_batch(self, batch: Sequence[Samples], padding: int = 0) -> list[Recognition]:
        """Recognise several segments, in as few runs as the engine can; each as if it were alone.

        `padding`: frames that inputs are filled up with beyond the longest. Raises EngineError.
        """
        if not self.batches:
            return [self.recognize(samples) for samples in batch]
        stages: dict[str, float] = {}
        with timed(stages, "features"):
            features = [self._features(samples) for samples in batch]
        return [self._recognition(decoded, stages) for decoded in self._decode_in_parts(features, stages, padding)]

    def decode(self, samples: Samples) -> Decoded:
        """Return what the networks say of `[n]` samples, before it becomes text. Raises EngineError."""
        features = self._features(samples)
        return self._decode([features], {})[0] if len(features) else NOTHING

    def interrupt(self) -> None:
        """End what is being recognised, and let nothing begin, where the networks can; see Interruptible."""
        for network in interruptible(self._encoder, self._decoder):
            network.interrupt()

    def resume(self) -> None:
        """Go on recognising."""
        for network in interruptible(self._encoder, self._decoder):
            network.resume()

    def close(self) -> None:
        """Release the networks."""
        self._encoder.close()
        self._decoder.close()

    def _decode_in_parts(self, batch: Sequence[Features], stages: dict[str, float], padding: int) -> list[Decoded]:
        """Do as _decode does, in two runs or more where one would be too large for the engine."""
        try:
            return self._decode(batch, stages, padding)
        except TooLargeError:
            if len(batch) < 2:
                raise
        middle = len(batch) // 2
        parts = (batch[:middle], batch[middle:])
        return [decoded for part in parts for decoded in self._decode_in_parts(part, stages, padding)]

    def _decode(self, batch: Sequence[Features], stages: dict[str, float], padding: int = 0) -> list[Decoded]:
        """Return what the networks say of each `[T, 560]` of features."""
        longest = max((len(features) for features in batch), default=0) + padding
        if not longest:
            return [NOTHING] * len(batch)
        lengths = [len(features) for features in batch]
        with timed(stages, "encoder"):
            mask = _mask(lengths, longest)
            inputs = {"x": self._inputs(batch, longest), **({"mask": mask} if self.batches else {})}
            encoded = self._encoder.run(inputs)
        with timed(stages, "cif"):
            alphas = [np.asarray(row[:length]) for row, length in zip(encoded["alphas"], lengths, strict=True)]
            self._check_finite(encoded["alphas"])
            cifs = [overlaps(row, self._tail) for row in alphas]
            most = max(map(len, cifs))
        if not most:
            return [Decoded(NOTHING.ids, NOTHING.log_probabilities, row) for row in alphas]
        with timed(stages, "decoder"):
            decoded = self._decoder.run(self._decoder_inputs(encoded["enc"], cifs, mask, most))
            self._check_finite(decoded["logp"])
        return [
            Decoded(ids[: len(cif)], scores[: len(cif)], row)
            for ids, scores, cif, row in zip(decoded["ids"], decoded["logp"], cifs, alphas, strict=True)
        ]

    def _inputs(self, batch: Sequence[Features], longest: int) -> Features:
        """Return `x` `[B, T, 560]`: features, scaled, with position encoding."""
        if longest > len(self._positions):
            self._positions = position_encoding(longest)
        x = np.zeros((len(batch), longest, WIDTH), np.float32)
        for row, features in zip(x, batch, strict=True):
            np.multiply(features, self._input_scale, out=row[: len(features)])
            row[: len(features)] += self._positions[: len(features)]
        return x

    def _decoder_inputs(
        self, enc: Features | DeviceArray, cifs: Sequence[Features], mask: Features, most: int
    ) -> Arrays:
        cif = np.zeros((len(cifs), most, enc.shape[1]), np.float32)
        for row, shares in zip(cif, cifs, strict=True):
            row[: len(shares), : shares.shape[1]] = shares
        if not self.batches:
            return {"enc": enc, "cif": cif}
        return {"enc": enc, "cif": cif, "enc_mask": mask, "emb_mask": _mask([len(shares) for shares in cifs], most)}

    def _recognition(self, decoded: Decoded, stages: Mapping[str, float]) -> Recognition:
        spoken = int((decoded.ids >= SPECIAL_IDS).sum())
        times = token_times(decoded.alphas, self._tail, spoken) if spoken else None
        return recognition(self.bundle, decoded, stages, times, self.engine)

    def _check_finite(self, values: npt.NDArray[np.float32]) -> None:
        if not np.isfinite(values).all():
            raise NotFiniteError(f"{self.bundle.folder}: its engine gives no finite numbers; copy the bundle again")


def recognition(
    bundle: Bundle, decoded: Decoded, stages: Mapping[str, float], times: Times | None, engine: str
) -> Recognition:
    """Turn ids into text; `times`: start and end in ms of each token that is not special, None where not known."""
    spoken = decoded.ids >= SPECIAL_IDS
    ids, log_probabilities = decoded.ids[spoken], decoded.log_probabilities[spoken]
    if not len(ids):
        return Recognition("", (), None, stages, engine, model=bundle.name)
    pieces = [bundle.tokens[i] for i in ids]
    spans: Sequence[tuple[int | None, int | None]] = [(None, None)] * len(ids)
    if times is not None and len(times) == len(ids):
        # FunASR lets a token in the very first frames begin before the sound does.
        spans = [(max(0, start), max(0, end)) for start, end in times]
    tokens = tuple(
        Token(piece, start, end, float(confidence))
        for piece, (start, end), confidence in zip(pieces, spans, np.exp(log_probabilities), strict=True)
    )
    confidence = float(np.exp(log_probabilities.mean()))
    return Recognition(join(pieces), tokens, confidence, stages, engine, model=bundle.name)


def feature_extractor(bundle: Bundle, metadata: Mapping[str, str]) -> FeatureExtractor:
    """Return the front end of a bundle, whose CMVN is a file or in the graph's metadata. Raises BundleError."""
    cmvn = bundle.cmvn or cmvn_from_metadata(metadata, bundle.graph)
    extractor = FeatureExtractor(cmvn.neg_mean, cmvn.inv_stddev)
    with np.errstate(over="ignore"):  # what overflows is refused right here
        if not np.isfinite(extractor(noise())).all():
            raise BundleError(f"{bundle.folder}: gives no finite numbers on noise; copy the bundle again")
    return extractor


def check_vocabulary(bundle: Bundle, size: int) -> None:
    """Raise BundleError where the graph's vocabulary is not the token list's: it would give fluent nonsense."""
    if size != len(bundle.tokens):
        raise BundleError(
            f"{bundle.folder}: the token list holds {len(bundle.tokens)} tokens, the model {size}; they are not of one"
            " bundle, copy it again"
        )


def position_encoding(frames: int) -> Features:
    """Return `[frames, 560]`: sines, then cosines, of positions from 1 (FunASR's SinusoidalPositionEncoder)."""
    half = WIDTH // 2
    rates = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10_000) / (half - 1)))
    angles = np.arange(1, frames + 1, dtype=np.float32)[:, None] * rates
    encoding: Features = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return encoding


def noise(seconds: int = 1) -> Samples:
    """Return soft noise."""
    sound: Samples = np.random.default_rng(0).standard_normal(seconds * SAMPLE_RATE).astype(np.float32)
    sound *= np.float32(0.1)
    return sound


@contextmanager
def timed(stages: dict[str, float], stage: str) -> Iterator[None]:
    """Note in `stages` how many milliseconds the block takes."""
    started = time.perf_counter()
    yield
    stages[stage] = (time.perf_counter() - started) * 1e3


def _mask(lengths: Sequence[int], longest: int) -> Features:
    """Return `[B, longest]`: 1 where an utterance is."""
    mask: Features = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.float32)
    return mask
