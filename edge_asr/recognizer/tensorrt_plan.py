"""A plan of TensorRT in memory: its tensors, its profiles, and execution contexts for the sizes that come."""

from __future__ import annotations

import functools
import logging
import math
import mmap
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_asr.errors import EngineError, TooLargeError
from edge_asr.recognizer.cuda import FREE_MEMORY, DeviceMemory, Gpu
from edge_asr.recognizer.cuda_graph import Graph
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
MOST_RUNNERS = 12
"""Of a plan. Speech of all lengths needs 12 of the encoder, commands about as many of the decoder. What a context takes
beside the shared memory nobody says, so there are no more; the one not needed for the longest time goes."""


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

    @property
    def alone(self) -> bool:
        """Whether it is for single utterances, not for batches."""
        return self.high["B"] == 1

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
        self._runners: OrderedDict[Any, Runner] = OrderedDict()
        self._runtime: Any = None
        self._engine: Any = None
        with gpu.current():
            try:
                self._load()
                self._describe()
            except BaseException:  # whatever it was: what has been loaded is given back here, within the context
                self.close()
                raise

    @property
    def shares_profiles(self) -> bool:
        """Whether several contexts may use one profile; before 10, the second is refused."""
        return hasattr(self._trt, "ExecutionContextAllocationStrategy")  # came with it

    def activation_bytes(self, alone: bool) -> int:
        """Return what contexts need for what they compute on the way, of the profiles for single utterances or all.

        Before 10.3 nobody says it but for all profiles together.
        """
        sizes = [self._bytes_of(profile) for profile in self.profiles if profile.alone or not alone]
        return max(sizes, default=0)

    def _bytes_of(self, profile: Profile) -> int:
        # The older calls first, wherever they exist: with those of 10 some releases crash.
        if hasattr(self._engine, "get_device_memory_size_for_profile"):
            return int(self._engine.get_device_memory_size_for_profile(profile.index))
        if hasattr(self._engine, "device_memory_size"):
            return int(self._engine.device_memory_size)
        return int(self._engine.get_device_memory_size_for_profile_v2(profile.index))

    def profile_for(self, sizes: Sizes, fixed: Sizes) -> Profile:
        """Return the first profile that holds the sizes. Raises TooLargeError where there is none."""
        for profile in self.profiles:
            if profile.holds(sizes, fixed):
                return profile
        most = "; ".join(map(str, self.profiles))
        raise TooLargeError(f"{self.path}: {describe(sizes)} are too many, it takes at most: {most}")

    def runner(self, profile: Profile, sizes: Sizes, activations: DeviceMemory) -> Runner:
        """Return a context for inputs of these sizes, which computes in memory that it shares with others.

        After each change of shapes TensorRT arranges much anew in the next run, and a recorded graph is void; so what
        is spoken alone has a context for each size, where one profile may have several.
        """
        key = (profile.index, *sorted(sizes.items())) if profile.alone and self.shares_profiles else profile.index
        if key not in self._runners:
            while len(self._runners) >= MOST_RUNNERS:
                self._runners.popitem(last=False)[1].close()
            self._runners[key] = self._new_runner(profile.index, activations)
        self._runners.move_to_end(key)
        return self._runners[key]

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

    def _new_runner(self, profile: int, activations: DeviceMemory) -> Runner:
        self.log.errors.clear()
        runner = Runner(self, self._create_context())
        try:
            runner.prepare(profile, activations, self._gpu.stream)
        except EngineError:
            runner.close()
            raise
        return runner

    def _create_context(self) -> Any:
        if hasattr(self._trt, "ExecutionContextAllocationStrategy"):  # from 10 on
            return self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return self._engine.create_execution_context_without_device_memory()


class Runner:
    """An execution context. Nobody else holds it, no traceback either: at close() it is gone."""

    def __init__(self, plan: LoadedPlan, context: Any) -> None:
        self._plan, self._context = plan, context
        self._bound: tuple[Sizes, Mapping[str, int]] | None = None
        self._shapes: Mapping[str, Shape] = {}
        self._graph: Graph | None = None

    def prepare(self, profile: int, activations: DeviceMemory, stream: int) -> None:
        """Give it its memory and its profile, for good."""
        self._plan.check(self._context is not None, "cannot make an execution context")
        self._share(activations)
        try:
            chosen = self._context.set_optimization_profile_async(profile, stream)
        except RuntimeError:  # what its bindings raise instead of answering False
            chosen = False
        self._plan.check(chosen, f"cannot choose profile {profile}")

    def bind(self, sizes: Sizes, addresses: Mapping[str, int]) -> Mapping[str, Shape]:
        """Tell it shapes and addresses, unless it knows them; return the shapes of the outputs."""
        if self._bound != (sizes, addresses):
            self._bound = None
            self._drop_graph()  # it is of other shapes or addresses
            self._shapes = self._set(sizes, addresses)
            self._bound = (dict(sizes), dict(addresses))
        return self._shapes

    def launch(self, gpu: Gpu) -> None:
        """Begin to compute what was bound. Raises EngineError."""
        if self._graph is not None:
            self._graph.launch()
        elif not self._enqueue(gpu):
            gpu.wait()  # raises where the GPU is to blame
            raise self._plan.error("cannot run it")

    def record(self, gpu: Gpu) -> None:
        """Record what has just been launched, once, to be launched as one from now on. Raises EngineError."""
        if self._graph is None:
            gpu.wait()  # TensorRT does some of its work in the first run of a shape only
            self._graph = gpu.record(lambda: self._enqueue(gpu))

    def close(self) -> None:
        """Give back the graph and then what it was recorded of."""
        self._drop_graph()
        self._context = None

    def _share(self, activations: DeviceMemory) -> None:
        engine = self._context.engine  # not where errors are raised: a traceback would keep it
        if hasattr(engine, "device_memory_size"):
            # set_device_memory() came with 10 and crashes there, on some releases.
            self._context.device_memory = activations.address
        else:
            self._context.set_device_memory(activations.address, activations.size)

    def _enqueue(self, gpu: Gpu) -> bool:
        self._plan.log.errors.clear()
        return bool(self._context.execute_async_v3(gpu.stream))

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _set(self, sizes: Sizes, addresses: Mapping[str, int]) -> Mapping[str, Shape]:
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
