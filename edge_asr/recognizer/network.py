"""What a loaded network is to the recogniser: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Frames and tokens that launches on a GPU are recorded for; what lies between is filled up."""
Arrays = Mapping[str, Any]
"""numpy arrays by name; what only the next network reads may be a DeviceArray."""


class DeviceArray(Protocol):
    """An output that stays where it was computed, until that network runs again or is closed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As of the numpy array that it stands for."""

    def numpy(self) -> npt.NDArray[Any]:
        """Fetch a copy. Raises EngineError."""


class Network(Protocol):
    """A loaded graph on some backend; used by one thread at a time."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Key-value pairs that the graph carries (sherpa-onnx keeps CMVN and sizes there)."""

    def run(self, inputs: Arrays) -> Arrays:
        """Compute. Raises EngineError."""

    def close(self) -> None:
        """Release memory and device."""


@runtime_checkable
class Interruptible(Protocol):
    """What a network or recogniser may be as well: able to end a run before it is done. Those of a GPU are short."""

    def interrupt(self) -> None:
        """Let the run under way, and all to come, raise InterruptedRunError as soon as can be; from any thread."""

    def resume(self) -> None:
        """Let runs be completed again."""


def interruptible(*parts: object) -> list[Interruptible]:
    """Return those that can be interrupted."""
    return [part for part in parts if isinstance(part, Interruptible)]
