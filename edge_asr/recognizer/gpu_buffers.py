"""Memory for the inputs and outputs of a network, on the host and on the GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_asr.recognizer.cuda import Bytes, DeviceMemory, Gpu, HostMemory
from edge_asr.recognizer.tensorrt_plan import Shape, Sizes, Tensor

STAYS = "enc"
"""The tensor that the encoder leaves on the GPU, for the decoder."""


class Buffers:
    """Memory for inputs and outputs: taken once, on both sides, large enough for every profile of a kind."""

    def __init__(self, gpu: Gpu, tensors: Iterable[Tensor], sizes: Sequence[Sizes], mapped: bool) -> None:
        """Take memory for these sizes; `mapped`: the GPU uses the host's. Raises EngineError if there is too little."""
        self._gpu, self._mapped = gpu, mapped
        self._host: dict[str, HostMemory] = {}
        self._device: list[DeviceMemory] = []
        self.addresses: dict[str, int] = {}
        try:
            for tensor in tensors:
                self._allocate(tensor.name, max(map(tensor.bytes_for, sizes)))
        except BaseException:  # whatever it was, what has been taken is given back
            self.free()
            raise

    def send(self, tensor: Tensor, array: npt.NDArray[Any], shape: Shape) -> None:
        """Begin to copy an input to the GPU, filled up with zeros to `shape`: masks are 0 there."""
        part = self._part(tensor, shape)
        whole = part.view(tensor.dtype).reshape(shape)
        if array.shape != shape:
            whole.fill(0)
        whole[tuple(map(slice, array.shape))] = array
        if not self._mapped:
            self._gpu.send(part, self.addresses[tensor.name])

    def fetch(self, tensor: Tensor, shape: Shape) -> None:
        """Begin to copy an output from the GPU."""
        if not self._mapped:
            self._gpu.fetch(self._part(tensor, shape), self.addresses[tensor.name])

    def read(self, tensor: Tensor, whole: Shape, shape: Shape) -> npt.NDArray[Any]:
        """Return a copy of an output that has been fetched, without what was filled up; integers of 64 bits."""
        array = self._part(tensor, whole).view(tensor.dtype).reshape(whole)[tuple(map(slice, shape))]
        return array.astype(np.int64 if array.dtype.kind == "i" else array.dtype)

    def free(self) -> None:
        """Give everything back."""
        steps = [*(one.free for one in self._host.values()), *(one.free for one in self._device)]
        self._host, self._device = {}, []
        self._gpu.release(steps)

    def _allocate(self, name: str, size: int) -> None:
        if name != STAYS:
            self._host[name] = self._gpu.allocate_host(size, name, self._mapped)
            if self._mapped:
                self.addresses[name] = self._host[name].address
                return
        self._device.append(self._gpu.allocate(size, name))
        self.addresses[name] = self._device[-1].address

    def _part(self, tensor: Tensor, shape: Shape) -> Bytes:
        return self._host[tensor.name].bytes[: math.prod(shape) * tensor.dtype.itemsize]
