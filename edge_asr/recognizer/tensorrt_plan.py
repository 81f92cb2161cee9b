"""A plan of TensorRT in memory: its tensors, its profiles, and an execution context for each of those."""

from __future__ import annotations

import functools
import logging
import math
import mmap
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_asr.errors import EngineError, TooLargeError
from edge_asr.recognizer.cuda import FREE_MEMORY, DeviceMemory, Gpu
from edge_asr.recognizer.manifest import REMEDY

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
Sizes = Mapping[str, int]
"""How many utterances (B), frames (T) and tokens (N)."""

AXES: Mapping[str, str] = {
    "x": "BT.", "mask": "BT", "enc": "BT.", "alphas": "BT",
    "enc_mask": "BT", "cif": "BNT", "emb_mask": "BN", "ids": "BN", "logp": "BN",
}  # fmt: skip
"""What the dimensions of each tensor count; a point stands for one that is always the same."""
TYPES: Mapping[str, type[np.generic]] = {
    "FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64,
}  # fmt: skip
"""numpy's by TensorRT's names: its own nptype() fails on 8.5 with a numpy of today."""
LONGEST_QUOTE = 300


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of a plan."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape
    """-1 where it varies."""

    @property
    def axes(self) -> str:
        """What its dimensions count."""
        return AXES[self.name]

    def shape_for(self, sizes: Sizes) -> Shape:
        """Return its shape for so many utterances, frames and tokens."""
        return tuple(sizes.get(axis, size) for axis, size in zip(self.axes, self.shape, strict=True))

    def bytes_for(self, sizes: Sizes) -> int:
        """Return what it takes of memory."""
        return math.prod(self.shape_for(sizes)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Profile:
    """The sizes that one set of kernels is for."""

    index: int
    low: Sizes
    high: Sizes

    def holds(self, sizes: Sizes, fixed: Sizes) -> bool:
        """Tell whether inputs of these sizes can be filled up to fit; `fixed`: those that cannot be filled up."""
        return all(size <= self.high[axis] for axis, size in sizes.items()) and all(
            self.low[axis] <= size <= self.high[axis] for axis, size in fixed.items()
        )

    def __str__(self) -> str:
        return describe(self.high)


class LoadedPlan:
    """A plan on a GPU."""

    def __init__(self, path: Path, gpu: Gpu) -> None:
        """Load it. Raises EngineError where it is damaged, or was built with another TensorRT or for another GPU."""
        import tensorrt

        self._trt = tensorrt
        self.path, self._gpu = path, gpu
        self.log = tensorrt_log()
        self._runners: dict[int, _Runner] = {}
        self._runtime: Any = None
        self._engine: Any = None
        self._activations: DeviceMemory | None = None
        with gpu.current():
            try:
                self._load()
                self._describe()
            except BaseException:  # whatever it was: what has been loaded is given back here, within the context
                self.close()
                raise

    @property
    def activation_bytes(self) -> int:
        """What its contexts need of memory for what they compute on the way."""
        if hasattr(self._engine, "device_memory_size_v2"):
            return int(self._engine.device_memory_size_v2)
        return int(self._engine.device_memory_size)

    def share(self, activations: DeviceMemory) -> None:
        """Let its contexts use that memory, of at least `activation_bytes`."""
        self._activations = activations

    def profile_for(self, sizes: Sizes, fixed: Sizes) -> Profile:
        """Return the first profile that holds the sizes. Raises TooLargeError where there is none."""
        for profile in self.profiles:
            if profile.holds(sizes, fixed):
                return profile
        most = "; ".join(map(str, self.profiles))
        raise TooLargeError(f"{self.path}: {describe({**sizes, **fixed})} are too many, it takes at most: {most}")

    def bind(self, profile: Profile, sizes: Sizes, addresses: Mapping[str, int]) -> Mapping[str, Shape]:
        """Prepare a context for inputs of these sizes at these addresses; return the shapes of the outputs."""
        if profile.index not in self._runners:
            self._runners[profile.index] = self._new_runner(profile.index)
        return self._runners[profile.index].bind(sizes, addresses)

    def launch(self, profile: Profile) -> bool:
        """Begin to compute what was bound; return whether that began."""
        self.log.errors.clear()
        return self._runners[profile.index].launch(self._gpu.stream)

    def check(self, fine: bool, what: str) -> None:
        """Raise EngineError, saying what TensorRT does, unless all is fine."""
        if not fine:
            raise self.error(what)

    def error(self, what: str) -> EngineError:
        """Return the error to raise, with what TensorRT said and the remedy."""
        remedy = FREE_MEMORY if self.log.lacked_memory() else REMEDY
        return EngineError(f"{self.path}: TensorRT {self._trt.__version__} {what}{self.log.quote()}; {remedy}")

    def close(self) -> None:
        """Forget contexts and engine, in this order; within the GPU's context. Twice does no harm."""
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
        self._engine = None
        self._runtime = None

    def _load(self) -> None:
        self.log.errors.clear()
        try:
            self._runtime = self._trt.Runtime(self.log)
        except TypeError as error:  # of pybind11, where the factory answers nothing
            raise EngineError(f"TensorRT cannot use GPU {self._gpu.number}{self.log.quote()}") from error
        try:
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                self._engine = self._runtime.deserialize_cuda_engine(content)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            raise EngineError(f"{self.path}: cannot be read ({error}); {REMEDY}") from error
        why = "" if self.log.lacked_memory() else ": damaged, or for another TensorRT or GPU"
        self.check(self._engine is not None, f"cannot load it{why}")

    def _describe(self) -> None:
        try:
            tensors = [self._tensor(self._engine.get_tensor_name(i)) for i in range(self._engine.num_io_tensors)]
            self.inputs = {one.name: one for one in tensors if self._is_input(one.name)}
            self.outputs = {one.name: one for one in tensors if one.name not in self.inputs}
            self.profiles = [self._profile(i) for i in range(self._engine.num_optimization_profiles)]
        except (KeyError, ValueError) as error:
            raise EngineError(f"{self.path}: no plan of edge-asr ({error}); {REMEDY}") from error

    def _tensor(self, name: str) -> Tensor:
        """Raises KeyError, ValueError where it is none of our networks'."""
        shape = tuple(self._engine.get_tensor_shape(name))
        if len(shape) != len(AXES[name]):
            raise ValueError(f"{name} {shape}")
        return Tensor(name, np.dtype(TYPES[self._engine.get_tensor_dtype(name).name]), shape)

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def _profile(self, index: int) -> Profile:
        low: dict[str, int] = {}
        high: dict[str, int] = {}
        for name, tensor in self.inputs.items():
            least, _, most = self._engine.get_tensor_profile_shape(name, index)
            for axis, smallest, largest in zip(tensor.axes, least, most, strict=True):
                if axis != ".":
                    low[axis] = max(smallest, low.get(axis, smallest))
                    high[axis] = min(largest, high.get(axis, largest))
        if not {"B", "T"} <= set(high):
            raise ValueError(f"profile {index} {high}")
        return Profile(index, low, high)

    def _new_runner(self, index: int) -> _Runner:
        """Return a runner that uses the shared memory: both networks run one after the other."""
        assert self._activations is not None, "share() comes first"
        self.log.errors.clear()
        runner = _Runner(self, self._create_context())
        try:
            runner.prepare(index, self._activations, self._gpu.stream)
        except EngineError:
            runner.close()
            raise
        return runner

    def _create_context(self) -> Any:
        if hasattr(self._trt, "ExecutionContextAllocationStrategy"):  # from 10 on
            return self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return self._engine.create_execution_context_without_device_memory()


class _Runner:
    """An execution context. Nobody else holds it, no traceback either: at close() it is gone."""

    def __init__(self, plan: LoadedPlan, context: Any) -> None:
        self._plan, self._context = plan, context

    def prepare(self, profile: int, activations: DeviceMemory, stream: int) -> None:
        """Give it its memory and its profile, for good."""
        self._plan.check(self._context is not None, "cannot make an execution context")
        if hasattr(self._context, "set_device_memory"):
            self._context.set_device_memory(activations.address, activations.size)
        else:
            self._context.device_memory = activations.address
        try:
            chosen = self._context.set_optimization_profile_async(profile, stream)
        except RuntimeError:  # what its bindings raise instead of answering False
            chosen = False
        self._plan.check(chosen, f"cannot choose profile {profile}")

    def bind(self, sizes: Sizes, addresses: Mapping[str, int]) -> Mapping[str, Shape]:
        """Tell it shapes and addresses; return the shapes of the outputs."""
        plan = self._plan
        plan.log.errors.clear()
        for name, tensor in plan.inputs.items():
            shape = tensor.shape_for(sizes)
            plan.check(self._context.set_input_shape(name, shape), f"refuses {name} {shape}")
        for name, address in addresses.items():
            plan.check(self._context.set_tensor_address(name, address), f"refuses the address of {name}")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError:  # what its bindings raise where shapes disagree
            missing = list(plan.inputs)
        plan.check(not missing, "cannot tell the shapes of its outputs")
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in plan.outputs}
        for name, shape in shapes.items():
            plan.check(shape == plan.outputs[name].shape_for(sizes), f"would answer {name} {shape}")
        return shapes

    def launch(self, stream: int) -> bool:
        """Begin to compute; return whether that began."""
        return bool(self._context.execute_async_v3(stream))

    def close(self) -> None:
        self._context = None


def describe(sizes: Sizes) -> str:
    """Return sizes for people."""
    tokens = f", {sizes['N']} tokens" if "N" in sizes else ""
    return f"{sizes['B']} x {sizes['T']} frames{tokens}"


def tensorrt_log() -> Any:
    """Return the logger of this process: TensorRT keeps the first that it is given, whatever is asked later."""
    import tensorrt

    return _logger(tensorrt)


@functools.cache
def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # without TensorRT there is no such class
        """Remembers errors, to be quoted; the rest is for those who look closely."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, msg: str) -> None:
            """Called by TensorRT, on any thread."""
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg)
            if severity not in (trt.ILogger.Severity.INFO, trt.ILogger.Severity.VERBOSE):
                log.debug("TensorRT: %s", msg)

        def lacked_memory(self) -> bool:
            """Tell whether an error was for want of memory."""
            return any("memory" in line.lower() and "illegal" not in line.lower() for line in list(self.errors))

        def quote(self) -> str:
            """Return the first error since they were cleared, the cause of the others, in brackets."""
            said: Sequence[str] = list(self.errors)
            return f" ({' '.join(said[0].split())[:LONGEST_QUOTE]})" if said else ""

    return Logger()
