"""An engine held against fp32 on the processor, and what runs in a process of its own for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench.device_results import Check
from bench.terminal import say
from edge_asr.audio.decode import read as read_audio
from edge_asr.config import EngineConfig
from edge_asr.engine import trial
from edge_asr.engine.build import build_engine
from edge_asr.errors import EdgeAsrError, EngineError
from edge_asr.loader import load_engine
from edge_asr.recognizer.bundle import Bundle
from edge_asr.recognizer.paraformer import Decoded, Paraformer
from edge_asr.recognizer.self_test import count_same

RECORDINGS = 8
"""How many of a model's own recordings are listened to."""


def compare(found: Sequence[Decoded], expected: Sequence[Decoded]) -> Check:
    """Hold what an engine hears against what fp32 hears."""
    pairs = list(zip(found, expected, strict=True))
    same = [pair for pair in pairs if np.array_equal(pair[0].ids, pair[1].ids)]
    differences = [
        float(np.abs(one.log_probabilities - other.log_probabilities).max()) for one, other in same if len(one.ids)
    ]
    return Check(
        sounds=len(pairs),
        tokens=sum(len(other.ids) for _, other in pairs),
        same_tokens=sum(count_same(one.ids.tolist(), other.ids.tolist()) for one, other in pairs),
        same_sounds=len(same),
        largest_difference=max(differences, default=None),
    )


def hear(recognizer: Paraformer) -> list[Decoded]:
    """Decode the sounds of the check: made up, and the model's own recordings where it has some."""
    made = [make(seconds) for seconds in trial.TRIED_S for make in (trial.babble, trial.hiss)]
    recorded = sorted(recognizer.bundle.folder.rglob("*.wav"))[:RECORDINGS]
    return [recognizer.decode(sound) for sound in (*made, *map(read_audio, recorded))]


# What runs in a child


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module returns, run in a process of its own. Raises the EdgeAsrError that it does."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(theirs, function, arguments), name=function.__name__)
    child.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError as error:
        child.join()
        raise EngineError(f"{function.__name__} ended with {child.exitcode}: out of memory?") from error
    finally:
        ours.close()
    child.join()
    if isinstance(answer, EdgeAsrError):
        raise answer
    return answer


def _send(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send(function(*arguments))
    except EdgeAsrError as error:
        pipe.send(type(error)(str(error)))


def build_in_child(bundle: Bundle, target: str, folder: Path, threads: int, gpu: int) -> None:
    """Build an engine, with a line for each step: it may take minutes."""
    build_engine(bundle, target, folder, threads, lambda step, share: say(f"{share:4.0%} {step}"), gpu=gpu)


def hear_in_child(bundle: Bundle, folder: Path, threads: int) -> list[Decoded]:
    """Decode the sounds of the check with an fp32 engine on the processor."""
    with contextlib.closing(load_engine(bundle, folder, EngineConfig(threads=threads))) as recognizer:
        return hear(recognizer)
