"""The shapes that a plan of TensorRT is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_asr.recognizer.features import WIDTH

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Of an input: the smallest, the usual (which kernels are chosen for), the largest."""
Profile = Mapping[str, Shapes]
"""The shapes of each input that one set of kernels is for."""
Range = tuple[int, int, int]
SINGLE, BATCH = (1, 1, 1), (1, 8, 32)
RANGES: Sequence[tuple[Range, Range]] = (
    # From 1 frame on, so that nothing is too short: kernels are chosen for the usual length anyway.
    (SINGLE, (1, 34, 64)),
    (SINGLE, (64, 128, 192)),
    (SINGLE, (192, 334, 512)),
    (BATCH, (1, 128, 192)),
)
"""Utterances and frames (60 ms each): what is spoken alone first, then batches."""
USUAL_TOKENS = 32
MOST_BATCH_TOKENS = 96
"""Of an utterance in a batch, 8 a second: the scores of every word for each token are the largest of all that is
computed, and TensorRT takes memory for the largest. A batch in which somebody says more is recognised in parts."""


def encoder_profiles() -> list[Profile]:
    """Return the shapes that the encoder's plan is for."""
    return [_profile({"x": (batch, frames, WIDTH), "mask": (batch, frames)}) for batch, frames in RANGES]


def decoder_profiles(width: int) -> list[Profile]:
    """Return the shapes that the decoder's plan is for, `width`: of an encoder frame. At most a token a frame."""
    profiles = []
    for batch, frames in RANGES:
        most = frames[2] if batch == SINGLE else min(frames[2], MOST_BATCH_TOKENS)
        tokens = (1, min(USUAL_TOKENS, frames[1]), most)
        inputs: Mapping[str, Sequence[Range | int]] = {
            "enc": (batch, frames, width),
            "enc_mask": (batch, frames),
            "cif": (batch, tokens, frames),
            "emb_mask": (batch, tokens),
        }
        profiles.append(_profile(inputs))
    return profiles


def _profile(inputs: Mapping[str, Sequence[Range | int]]) -> Profile:
    def shape(sizes: Sequence[Range | int], which: int) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else size[which] for size in sizes)

    return {name: (shape(sizes, 0), shape(sizes, 1), shape(sizes, 2)) for name, sizes in inputs.items()}
