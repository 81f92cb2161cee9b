"""Runtime, engine, execution context: a plan at work in the device's memory."""

from __future__ import annotations

import enum
import math
import operator
import weakref

import fake_gpu
import numpy as np
import onnx
import onnxruntime
from fake_gpu import CudaError

from tensorrt._graph import Graph
from tensorrt._plan import deserialize
from tensorrt._release import NUMBER, RELEASE, exists, of_release, plain
from tensorrt._types import NUMPY, Dims, ILogger, TensorIOMode, TensorLocation, data_type, require_gpu

ADDRESS_ALIGNMENT = 256
PROFILES_ARE_SHARED = NUMBER >= (10,)
CRASHES = exists("ICudaEngine", "device_memory_size")
"""Whether the newer calls about a context's memory crash on some devices, where the older ones still exist."""


class ExecutionContextAllocationStrategy(enum.Enum):
    """Where a context takes its memory from."""

    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class Runtime:
    """Reads plans."""

    def __init__(self, logger):
        require_gpu("Runtime", logger)
        self._logger = logger

    logger = plain("logger", read_only=True)

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            plan = deserialize(memoryview(serialized_engine))
        except ValueError as error:
            return self._refuse(f"Serialization assertion failed. {error}")
        if plan.release != RELEASE:
            return self._refuse(f"Version tag does not match: the plan is of {plan.release}, this is {RELEASE}")
        gpu = fake_gpu.gpu
        if tuple(plan.sm) != gpu.sm:
            return self._refuse(
                f"The engine plan file is of an incompatible device, compute {plan.sm}, here is {gpu.sm}"
            )
        try:
            return ICudaEngine(plan, self.logger)
        except CudaError as error:
            return self._refuse(f"Cuda Runtime ({error})")

    def _refuse(self, why):
        self.logger.log(ILogger.ERROR, f"IRuntime::deserializeCudaEngine: Error Code 1: {why}")


of_release(Runtime)


class ICudaEngine:
    """A loaded plan."""

    def __init__(self, plan, logger):
        self._plan, self._logger = plan, logger
        self._graph = Graph(onnx.load_model_from_string(plan.graph))
        self._session = None
        self._weights = fake_gpu.gpu.allocate(max(len(plan.graph), 1), "engine")
        fake_gpu.gpu.live["engines"] += 1
        self._busy = set()

    name = plain("name", "Unnamed Network 0", read_only=True)

    def __del__(self):
        if hasattr(self, "_weights"):
            fake_gpu.gpu.release(self._weights)
            fake_gpu.gpu.live["engines"] -= 1

    @property
    def num_io_tensors(self):
        return len(self._graph.tensors)

    @property
    def num_layers(self):
        return len(self._graph.model.graph.node)

    @property
    def num_optimization_profiles(self):
        return max(len(self._plan.profiles), 1)

    def get_tensor_name(self, index):
        names = list(self._graph.tensors)
        if not 0 <= index < len(names):
            raise IndexError(index)
        return names[index]

    def get_tensor_mode(self, name):
        if name in self._graph.inputs:
            return TensorIOMode.INPUT
        return TensorIOMode.OUTPUT if name in self._graph.outputs else self._unknown(name, TensorIOMode.NONE)

    def get_tensor_dtype(self, name):
        return data_type(self._graph.tensors[name].dtype) if name in self._graph.tensors else self._unknown(name, None)

    def get_tensor_shape(self, name):
        return Dims(self._graph.tensors[name].shape) if name in self._graph.tensors else self._unknown(name, Dims())

    def get_tensor_location(self, name):
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name, profile_index):
        if not 0 <= profile_index < len(self._plan.profiles) or name not in self._graph.inputs:
            return self._unknown(name, [])
        return [Dims(shape) for shape in self._plan.profiles[profile_index][name]]

    def _unknown(self, name, answer):
        self._logger.log(ILogger.ERROR, f"ICudaEngine: Error Code 3: API Usage Error (no tensor {name})")
        return answer

    def _activation_size(self, profile):
        """Return how much memory a context needs: it grows with the greatest shapes."""
        shapes = self._plan.profiles[profile] if self._plan.profiles else {}
        total = sum(math.prod(shape[2]) for shape in shapes.values())
        return (total * 16 + 511) // 512 * 512 + 512

    @property
    def _most_activations(self):
        return max(self._activation_size(index) for index in range(self.num_optimization_profiles))

    device_memory_size = _most_activations

    @property
    def device_memory_size_v2(self):
        forbid_newer("getDeviceMemorySizeV2")
        return self._most_activations

    def get_device_memory_size_for_profile(self, profile_index):
        return self._activation_size(profile_index)

    def get_device_memory_size_for_profile_v2(self, profile_index):
        forbid_newer("getDeviceMemorySizeForProfileV2")
        return self._activation_size(profile_index)

    def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
        if NUMBER < (10,) and strategy is not ExecutionContextAllocationStrategy.STATIC:
            raise TypeError("create_execution_context(): incompatible function arguments")
        return self._context(strategy is ExecutionContextAllocationStrategy.USER_MANAGED)

    def create_execution_context_without_device_memory(self):
        return self._context(True)

    def _context(self, user_managed):
        try:
            return IExecutionContext(self, user_managed)
        except CudaError as error:
            self._logger.log(
                ILogger.ERROR, f"ICudaEngine::createExecutionContext: Error Code 1: Cuda Runtime ({error})"
            )
            return None

    def _run(self, inputs):
        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 4
            self._session = onnxruntime.InferenceSession(self._plan.graph, options, providers=["CPUExecutionProvider"])
        names = list(self._graph.outputs)
        return dict(zip(names, self._session.run(names, inputs), strict=True))


of_release(ICudaEngine)


class IExecutionContext:
    """One user of an engine: shapes, addresses, a profile."""

    engine = plain("engine", read_only=True)
    name = plain("name", "Unnamed Execution Context 0")

    def __init__(self, engine, user_managed):
        gpu = fake_gpu.gpu
        gpu.check()
        self._engine = engine
        self._logger = engine._logger
        self._user_managed = user_managed
        self._own = None if user_managed else gpu.allocate(engine._most_activations, "activations")
        self._memory, self._memory_size = (0, 0) if user_managed else (self._own.address, self._own.size)
        self._profile = 0 if PROFILES_ARE_SHARED or 0 not in engine._busy else -1
        engine._busy.add(self._profile)
        self._shapes, self._addresses = {}, {}
        self._settled = False
        """Has run with these shapes: only then may it be captured."""
        self._changes = 0
        """How often shapes, addresses or the profile changed: what was captured before is void."""
        gpu.live["execution contexts"] += 1

    def __del__(self):
        if not hasattr(self, "_settled"):
            return
        self.engine._busy.discard(self._profile)
        if self._own is not None:
            fake_gpu.gpu.release(self._own)
        fake_gpu.gpu.live["execution contexts"] -= 1

    def _fail(self, function, why):
        self._logger.log(ILogger.ERROR, f"IExecutionContext::{function}: Error Code 3: API Usage Error ({why})")
        return False

    @property
    def active_optimization_profile(self):
        return self._profile

    def set_optimization_profile_async(self, profile_index, stream_handle):
        why = self._why_not_profile(profile_index, stream_handle)
        if why:
            self._fail("setOptimizationProfileAsync", why)
            raise RuntimeError("Error in set optimization profile async.")
        if profile_index != self._profile:
            self.engine._busy.discard(self._profile)
            self.engine._busy.add(profile_index)
            self._profile, self._shapes, self._settled = profile_index, {}, False
            self._changes += 1
        return True

    def _why_not_profile(self, index, stream):
        gpu, engine = fake_gpu.gpu, self.engine
        if not 0 <= index < engine.num_optimization_profiles:
            return f"no profile {index}"
        if stream not in gpu.streams or gpu.error is not None:
            return f"no stream {stream!r}"
        taken = not PROFILES_ARE_SHARED and index in engine._busy and index != self._profile
        return f"another context uses profile {index}" if taken else ""

    # Memory of the context

    @property
    def device_memory(self):
        raise AttributeError("unreadable attribute")

    @device_memory.setter
    def device_memory(self, memory):
        self._set_memory("setDeviceMemory", memory, fake_gpu.gpu.bytes_from(operator.index(memory)))

    def set_device_memory(self, memory, size):
        forbid_newer("setDeviceMemoryV2")
        self._set_memory("setDeviceMemoryV2", memory, size)

    def _set_memory(self, function, memory, size):
        memory, size = operator.index(memory), operator.index(size)
        if not self._user_managed:
            self._fail(function, "the context has its own memory")
        elif memory % ADDRESS_ALIGNMENT:
            self._fail(function, f"{memory:#x} is not aligned to {ADDRESS_ALIGNMENT} bytes")
        else:
            self._memory, self._memory_size = memory, size
            self._changes += 1

    def update_device_memory_size_for_shapes(self):
        return self.engine._activation_size(max(self._profile, 0))

    # Shapes and addresses

    def set_input_shape(self, name, shape):
        shape = tuple(int(size) for size in shape)
        if name not in self.engine._graph.inputs:
            return self._fail("setInputShape", f"{name} is no input")
        if self._profile < 0:
            return self._fail("setInputShape", "no profile is set")
        profiles = self.engine._plan.profiles
        fixed = self.engine._graph.inputs[name].shape
        least, _, most = profiles[self._profile][name] if profiles else (fixed,) * 3
        if len(shape) != len(least) or any(
            not low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        ):
            return self._fail(
                "setInputShape",
                f"{list(shape)} for {name} is not within {least} and {most} of profile {self._profile}",
            )
        if self._shapes.get(name) != shape:
            self._shapes[name], self._settled = shape, False
            self._changes += 1
        return True

    def _all_shapes(self):
        fixed = {name: one.shape for name, one in self.engine._graph.inputs.items() if -1 not in one.shape}
        return {**fixed, **self._shapes}

    def get_tensor_shape(self, name):
        graph, shapes = self.engine._graph, self._all_shapes()
        if name in graph.inputs:
            return Dims(shapes.get(name, graph.inputs[name].shape))
        if name not in graph.outputs:
            return self._fail("getTensorShape", f"no tensor {name}") or Dims()
        if len(shapes) < len(graph.inputs):
            return Dims(graph.outputs[name].shape)
        try:
            return Dims(graph.output_shape(name, shapes))
        except ValueError as error:
            return self._fail("getTensorShape", str(error)) or Dims()

    def infer_shapes(self):
        shapes = self._all_shapes()
        missing = [name for name in self.engine._graph.inputs if name not in shapes]
        if not missing:
            try:
                self.engine._graph.bind(shapes)
            except ValueError as error:
                self._fail("inferShapes", str(error))
                raise RuntimeError("infer_shapes error code: -1") from None
        return missing

    @property
    def all_binding_shapes_specified(self):
        return len(self._all_shapes()) == len(self.engine._graph.inputs)

    def set_tensor_address(self, name, memory):
        memory = operator.index(memory)
        if name not in self.engine._graph.tensors:
            return self._fail("setTensorAddress", f"no tensor {name}")
        if memory % ADDRESS_ALIGNMENT:
            fake_gpu.gpu.violations.append(f"address of {name}: {memory:#x} is not aligned to 256 bytes")
            return self._fail("setTensorAddress", f"{memory:#x} is not aligned to {ADDRESS_ALIGNMENT} bytes")
        if self._addresses.get(name) != memory:
            self._addresses[name] = memory
            self._changes += 1
        return True

    def get_tensor_address(self, name):
        return self._addresses.get(name, 0)

    # Execution

    def execute_async_v3(self, stream_handle):
        gpu = fake_gpu.gpu
        why = self._why_not()
        if why:
            return self._fail("enqueueV3", why)
        try:
            stream = gpu.stream(stream_handle)
            gpu.check()
        except CudaError as error:
            return self._fail("enqueueV3", f"Cuda Runtime ({error})")
        if stream.capture is not None and not self._settled:
            stream.capture_broken = True
            return self._fail("enqueueV3", "the stream is capturing; run these shapes once before")
        gpu.counts["first runs of shapes"] += not self._settled
        self._settled = True
        captured = stream.capture is not None
        gpu.enqueue(stream, self._work(self._all_shapes(), dict(self._addresses), captured))
        return True

    def _why_not(self):
        """Return why it cannot run now, empty where it can."""
        graph = self.engine._graph
        if self._profile < 0:
            return "no profile is set"
        shapes = self._all_shapes()
        for name in graph.inputs:
            if name not in shapes:
                return f"the shape of {name} is not set"
        for name in graph.tensors:
            if not self._addresses.get(name):
                return f"the address of {name} is not set"
        try:
            graph.bind(shapes)
        except ValueError as error:
            return str(error)
        needed = self.engine._activation_size(self._profile)
        return "" if self._memory_size >= needed else f"{self._memory_size} bytes of device memory, {needed} are needed"

    def _work(self, shapes, addresses, captured):
        memory, size = self._memory, self.engine._activation_size(self._profile)
        graph, gpu = self.engine._graph, fake_gpu.gpu
        # Work that is done, or failed, holds nobody: a GPU knows no Python objects.
        engine, context, changes = weakref.ref(self.engine), weakref.ref(self), self._changes
        outputs = {name: graph.output_shape(name, shapes) for name in graph.outputs}

        def view(name, shape):
            dtype = NUMPY[data_type(graph.tensors[name].dtype).name]
            length = math.prod(shape) * dtype.itemsize
            return gpu.view(addresses[name], length, f"tensor {name}").view(dtype).reshape(shape)

        def work():
            nan = gpu.executed()
            if captured and (context() is None or context()._changes != changes):
                gpu.violations.append("a graph was launched after its context had changed, or was gone")
                nan = True
            inputs = {name: view(name, shape).astype(graph.inputs[name].dtype) for name, shape in shapes.items()}
            gpu.view(memory, size, "activations").fill(fake_gpu.GARBAGE)
            for name, value in engine()._run(inputs).items():
                if value.shape != outputs[name]:
                    raise AssertionError(f"{name}: computed {value.shape}, announced {outputs[name]}")
                target = view(name, value.shape)
                target[...] = np.nan if nan and target.dtype.kind == "f" else value

        return work


of_release(IExecutionContext)


def forbid_newer(function):
    """Remember a call that may crash."""
    if CRASHES:
        fake_gpu.gpu.violations.append(f"{function} crashes on some devices, there is an older call")
