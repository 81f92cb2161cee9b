"""Paraformers with random weights, and sounds for them: the same numbers on every machine, from numpy alone.

Only the raw stream of PCG64, which numpy promises to keep, integers, and single float32 operations are used: no
distribution of numpy's, no transcendental function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from edge_asr.types import SAMPLE_RATE, Samples

Size = Literal["tiny", "small", "large"]
Array = npt.NDArray[np.float32]
Weights = dict[str, Array]
Shape = tuple[int, ...]
Integers = npt.NDArray[np.int64]

SIZES: tuple[Size, ...] = get_args(Size)
DIMENSIONS = {"tiny": (144, 576, 6, 2), "small": (320, 1280, 40, 12), "large": (512, 2048, 50, 16)}
"""Width, width of the feed-forward parts, blocks of the encoder, blocks of the decoder."""
VOCABULARIES = {"tiny": 64, "small": 8359, "large": 8404}
UTTERANCES = {"tiny": 200, "small": 80, "large": 20}
"""How many utterances, from the first on, each size is tried on."""
HEADS, KERNEL, FEATURES = 4, 11, 560
WATCHED = (
    "encoder.encoders0.0.self_attn.linear_q_k_v.weight",
    "encoder.encoders.0.norm1.weight",
    "encoder.after_norm.bias",
    "predictor.cif_output.weight",
    "predictor.cif_output.bias",
    "decoder.decoders.0.self_attn.fsmn_block.weight",
    "decoder.output_layer.weight",
    "decoder.output_layer.bias",
)
"""Tensors that the fingerprint of the weights is of."""
LOUDNESS = (2.0, 4.3, 6.0, 7.4, 8.5, 9.6, 10.5, 11.4, 12.0, 12.7, 13.2)
"""Mean of the utterances' log-mel energies in every eighth bin."""
SHIFT = np.tile(-np.interp(np.arange(80), np.arange(0, 88, 8), LOUDNESS), 7).astype(np.float32)
SCALE = np.tile(np.linspace(0.25, 0.31, 80), 7).astype(np.float32)
"""CMVN. It fits the utterances: what is the same in all frames would drown the rest, and all tokens were alike."""

SHORTEST, LONGEST = 4_800, 480_000
"""Samples: 0.3 s and 30 s."""

BIAS = 0.05
"""Biases are within +-: small, because they are the same in all frames."""
GAINS = {
    "linear_q_k_v.weight": 2.0,
    "linear_q.weight": 3.0,
    "linear_k_v.weight": 3.0,
    "cif_output.weight": 4.0,
    "output_layer.weight": 3.0,
}
"""Factors on torch's ranges: attention that chooses, weights of frames and scores of tokens that vary."""
FIRING = {"tiny": -1.2, "small": -0.95, "large": -1.25}
"""Bias of the predictor: about 4.5 tokens a second."""
SPECIAL = -1.5
"""Bias of the special ids: they come now and then. sherpa-onnx stops at id 2."""


def state_dict(size: Size, vocabulary: int | None = None, seed: int = 0) -> Weights:
    """Return the weights by FunASR's names, without the decoder's embedding, which is for training only."""
    shapes = _shapes(size, vocabulary or VOCABULARIES[size])
    return {name: _draw(size, name, shape, seed) for name, shape in shapes}


def utterance(index: int) -> Samples:
    """Return 16-bit sound as float32 `[n]`, full scale +-1, 0.3 to 30 s: noise and buzzes as short as syllables."""
    raw = np.random.PCG64(1_000_000 + index)
    pieces: list[Integers] = []
    missing = _length(index)
    while missing > 0:
        piece = _syllable(raw)[:missing]
        missing -= len(piece)
        pieces.append(piece)
    samples: Samples = np.concatenate(pieces).astype(np.float32) / np.float32(32768)
    return samples


def weights_fingerprint(size: Size) -> str:
    """Return the hash of a few tensors: what is made here must not change with numpy's version or the machine."""
    shapes = dict(_shapes(size, VOCABULARIES[size]))
    return _fingerprint(_draw(size, name, shapes[name], seed=0) for name in WATCHED)


def sounds_fingerprint(size: Size) -> str:
    """Return the hash of a size's utterances."""
    return _fingerprint(utterance(index) for index in range(UTTERANCES[size]))


def _fingerprint(arrays: Iterable[Array]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, "<f4").tobytes())
    return digest.hexdigest()


# Weights


def _shapes(size: Size, vocabulary: int) -> Iterator[tuple[str, Shape]]:
    width, hidden, encoder, decoder = DIMENSIONS[size]
    yield from _encoder_block("encoder.encoders0.0.", FEATURES, width, hidden)
    for block in range(encoder - 1):
        yield from _encoder_block(f"encoder.encoders.{block}.", width, width, hidden)
    yield from _norm("encoder.after_norm", width)
    yield from _linear("predictor.cif_conv1d", (width, width, 3))
    yield from _linear("predictor.cif_output", (1, width))
    for block in range(decoder):
        yield from _decoder_block(f"decoder.decoders.{block}.", width, hidden)
    yield from _norm("decoder.decoders3.0.norm1", width)
    yield from _decoder_feed_forward("decoder.decoders3.0.", width, hidden)
    yield from _norm("decoder.after_norm", width)
    yield from _linear("decoder.output_layer", (vocabulary, width))


def _encoder_block(prefix: str, features: int, width: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{prefix}norm1", features)
    yield from _linear(f"{prefix}self_attn.linear_q_k_v", (3 * width, features))
    yield f"{prefix}self_attn.fsmn_block.weight", (width, 1, KERNEL)
    yield from _linear(f"{prefix}self_attn.linear_out", (width, width))
    yield from _norm(f"{prefix}norm2", width)
    yield from _linear(f"{prefix}feed_forward.w_1", (hidden, width))
    yield from _linear(f"{prefix}feed_forward.w_2", (width, hidden))


def _decoder_block(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    for norm in ("norm1", "norm2", "norm3"):
        yield from _norm(prefix + norm, width)
    yield from _decoder_feed_forward(prefix, width, hidden)
    yield f"{prefix}self_attn.fsmn_block.weight", (width, 1, KERNEL)
    yield from _linear(f"{prefix}src_attn.linear_q", (width, width))
    yield from _linear(f"{prefix}src_attn.linear_k_v", (2 * width, width))
    yield from _linear(f"{prefix}src_attn.linear_out", (width, width))


def _decoder_feed_forward(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{prefix}feed_forward.w_1", (hidden, width))
    yield from _norm(f"{prefix}feed_forward.norm", hidden)
    yield f"{prefix}feed_forward.w_2.weight", (width, hidden)


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _linear(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _draw(size: Size, name: str, shape: Shape, seed: int) -> Array:
    """Return the tensor of that name: weights uniform in about the ranges that torch starts from."""
    if name == "predictor.cif_output.bias":
        return np.full(shape, FIRING[size], np.float32)
    drawn = _uniform(name, shape, seed)
    drawn *= np.float32(_range(name, shape))
    if "norm" in name and name.endswith("weight"):
        drawn += np.float32(1)
    if name == "decoder.output_layer.bias":
        drawn[:3] = SPECIAL
    return drawn


def _range(name: str, shape: Shape) -> float:
    """Return the largest absolute value of a tensor."""
    if name.endswith("bias"):
        return BIAS
    if "norm" in name:
        return 0.5
    gain = next((gain for ending, gain in GAINS.items() if name.endswith(ending)), 1.0)
    return float(gain / np.prod(shape[1:]) ** 0.5)


def _uniform(name: str, shape: Shape, seed: int) -> Array:
    """Return multiples of 1/65536 in (-1, 1), from a generator of the tensor's own: the order of drawing is free."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
    drawn: Array = _words(np.random.PCG64(key), int(np.prod(shape))).astype(np.float32)
    drawn -= np.float32(32767.5)
    drawn *= np.float32(1 / 32768)
    return drawn.reshape(shape)


def _words(raw: np.random.PCG64, count: int) -> npt.NDArray[np.uint16]:
    """Return `count` random 16-bit numbers."""
    drawn: npt.NDArray[np.uint64] = np.asarray(raw.random_raw(-(-count // 4)), "<u8")
    return drawn.view("<u2")[:count].astype(np.uint16)


# Sounds


def _length(index: int) -> int:
    """Return samples, short ones more often than long ones; the first two utterances are the extremes."""
    if index < 2:
        return (SHORTEST, LONGEST)[index]
    spread = index * 40_503 % 65_536  # 65536 over the golden ratio: any run of indices is spread evenly
    return SHORTEST + ((LONGEST - SHORTEST) * spread**3 >> 48)


def _syllable(raw: np.random.PCG64) -> Integers:
    """Return 60 to 430 ms of nearly nothing or of bands of noise that swell and fade."""
    kind, duration, level, *pitches = _words(raw, 5).tolist()
    count = SAMPLE_RATE * (60 + duration % 371) // 1000
    noise = _words(raw, 2 * (count + 64)).astype(np.int64) - 32_768
    if kind % 8 == 0:
        return noise[:count] // 8_192
    bands = [
        _band(part, 4 + kind // 8 % 60, pitch)[:count] for part, pitch in zip(np.split(noise, 2), pitches, strict=True)
    ]
    position = np.arange(count, dtype=np.int64)
    swell = np.minimum(position * 16, np.minimum(65_536, (count - position) * 16))
    loudness = (64 + level % 64) << level // 64 % 7
    shaped: Integers = (bands[0] + bands[1] // 2 + noise[:count] // 256) * loudness // 32_768 * swell // 65_536
    return np.clip(shaped, -32_768, 32_767)


def _band(noise: Integers, smoothing: int, pitch: int) -> Integers:
    """Return noise smoothed over that many samples, moved up to a pitch by a square wave."""
    total = np.cumsum(noise)
    slow = (total[smoothing:] - total[:-smoothing]) // smoothing
    position = np.arange(len(slow), dtype=np.int64)
    return slow * (1 - (position * pitch >> 15) % 2 * 2)
