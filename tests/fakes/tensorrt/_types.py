"""Enumerations, shapes, loggers and memory."""

from __future__ import annotations

import fake_gpu
import numpy as np

from tensorrt._release import NUMBER, make_enum, of_release

BuilderFlag = make_enum("BuilderFlag")
DataType = make_enum("DataType")
LayerType = make_enum("LayerType")
MemoryPoolType = make_enum("MemoryPoolType")
NetworkDefinitionCreationFlag = make_enum("NetworkDefinitionCreationFlag")
OnnxParserFlag = make_enum("OnnxParserFlag")
PreviewFeature = make_enum("PreviewFeature")
ProfilingVerbosity = make_enum("ProfilingVerbosity")
TacticSource = make_enum("TacticSource")
TensorIOMode = make_enum("TensorIOMode")
TensorLocation = make_enum("TensorLocation")
_Severity = make_enum("Severity")

NUMPY = {
    name: np.dtype(kind)
    for name, kind in {
        "FLOAT": np.float32,
        "HALF": np.float16,
        "INT8": np.int8,
        "INT32": np.int32,
        "INT64": np.int64,
        "BOOL": np.bool_,
        "UINT8": np.uint8,
    }.items()
    if hasattr(DataType, name)
}
DataType.itemsize = property(lambda self: NUMPY[self.name].itemsize)
ALIASES = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
"""Names of the module, and numpy's, for members of DataType."""


def nptype(data_type):
    """Return numpy's type of a DataType."""
    return NUMPY[data_type.name].type


def data_type(dtype):
    """Return the DataType that an ONNX tensor of a numpy type becomes: before 10 there are no 64-bit integers."""
    name = ALIASES[str(np.dtype(dtype))]
    return DataType["INT32" if name == "INT64" and NUMBER < (10,) else name]


class Dims:
    """A shape; compares with tuples."""

    MAX_DIMS = 8

    def __init__(self, shape=()):
        self._shape = tuple(int(size) for size in shape)
        if len(self._shape) > self.MAX_DIMS:
            raise ValueError("The number of dimensions exceeds the maximum")

    def __len__(self):
        return len(self._shape)

    def __getitem__(self, index):
        return self._shape[index]

    def __iter__(self):
        return iter(self._shape)

    def __eq__(self, other):
        return self._shape == tuple(other)

    __hash__ = None

    def __str__(self):
        return str(self._shape)

    __repr__ = __str__


class _Overridable(type):
    """pybind11 refuses objects whose own __init__ forgot the base's."""

    def __call__(cls, *arguments, **options):
        made = super().__call__(*arguments, **options)
        if not getattr(made, "_base_is_made", False):
            raise TypeError(f"{cls.__mro__[-2].__name__}.__init__() must be called when overriding __init__")
        return made


class ILogger(metaclass=_Overridable):
    """Takes what TensorRT says."""

    Severity = _Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = tuple(_Severity)

    def __init__(self):
        self._base_is_made = True

    def log(self, severity, msg):
        raise RuntimeError('Tried to call pure virtual function "ILogger::log"')


class Logger(ILogger):
    """Writes on the console."""

    Severity = _Severity

    def __init__(self, min_severity=_Severity.WARNING):
        super().__init__()
        self.min_severity = min_severity

    def log(self, severity, msg):
        if severity.value <= self.min_severity.value:
            print(f"[TRT] [{severity.name[0]}] {msg}")  # noqa: T201


class IProgressMonitor(metaclass=_Overridable):
    """Follows a build, on the builder's own threads."""

    def __init__(self):
        self._base_is_made = True

    def phase_start(self, phase_name, parent_phase, num_steps):
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phase_start"')

    def step_complete(self, phase_name, step):
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::step_complete"')

    def phase_finish(self, phase_name):
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phase_finish"')


class IHostMemory(bytes):
    """Bytes that only the buffer protocol shows."""

    @property
    def nbytes(self):
        return memoryview(self).nbytes

    @property
    def dtype(self):
        return DataType.INT8

    def _no(self, *_):
        raise TypeError("object of type 'tensorrt_bindings.tensorrt.IHostMemory' has no such method")

    __len__ = __iter__ = __getitem__ = __contains__ = __add__ = __eq__ = _no
    __hash__ = object.__hash__

    def __getattribute__(self, name):
        if not name.startswith("__") and name not in ("nbytes", "dtype"):
            raise AttributeError(f"'tensorrt_bindings.tensorrt.IHostMemory' object has no attribute '{name}'")
        return bytes.__getattribute__(self, name)


of_release(IHostMemory)


def require_logger(logger):
    if not isinstance(logger, ILogger):
        raise TypeError("incompatible constructor arguments: an ILogger is needed")


def require_gpu(kind, logger):
    """Raise what pybind11 raises where a factory answers nothing."""
    require_logger(logger)
    gpu = fake_gpu.gpu
    if not gpu.present or gpu.error is not None:
        logger.log(
            ILogger.ERROR,
            "[checkMacros.cpp::catchCudaError::181] Error Code 1: Cuda Runtime (no CUDA-capable device is detected)",
        )
        raise TypeError(f"pybind11::init(): factory function returned nullptr ({kind})")
