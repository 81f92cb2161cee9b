"""Networks on onnxruntime: its CPU provider, and its CUDA provider where that is configured."""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_asr.errors import BrokenEngineError, BundleError, EngineError, InterruptedRunError
from edge_asr.recognizer.network import BUCKETS, Arrays

if TYPE_CHECKING:
    import onnxruntime

ONNX_CUDA = "onnx-cuda"
"""What transcripts call the networks of onnx-fp32 on the CUDA provider."""
CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER, CUDA_DEVICE = "CUDAExecutionProvider", "cuda"
STAY = frozenset({"enc"})
"""Outputs that stay on the device: only the next network reads them."""
BATCH = "B"
"""The dimension that is never filled up: one utterance is what graphs are recorded for."""
NO_GRAPH = -1
"""The id with which onnxruntime neither records nor replays."""
ARENAS = {"as-requested": "kSameAsRequested", "power-of-two": "kNextPowerOfTwo"}
SEARCHES = {"default": "DEFAULT", "heuristic": "HEURISTIC", "exhaustive": "EXHAUSTIVE"}
TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
BROKEN = re.compile(r"\b(CUDA|CUBLAS\w*|CUDNN\w*) failure\b")
"""In a message: after it the context of the GPU is good for nothing."""
REMEDY = (
    "install CUDA and cuDNN 9 of the release that it was built for (on a Jetson: apt install cudnn9-cuda-12-6,"
    " elsewhere: pip install 'onnxruntime-gpu[cuda,cudnn]'), or set engine.cuda.enabled to false"
)


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """How the CUDA provider runs a network."""

    gpu: int = 0
    memory_limit_mb: int | None = None
    """Of its arena, not of what cuDNN takes beside it; None: no limit."""
    arena: str = "as-requested"
    """How that grows: `as-requested` or `power-of-two`."""
    search: str = "heuristic"
    """How the fastest convolution is looked for: `default`, `heuristic` or `exhaustive`, anew for each shape."""
    graphs: bool = False
    """Record the launches for one utterance of each length in BUCKETS, and replay them."""

    def for_provider(self) -> dict[str, str]:
        """Return them as onnxruntime knows them. Without TF32: its 10 bits would misplace tokens."""
        options = {
            "device_id": str(self.gpu),
            "arena_extend_strategy": ARENAS[self.arena],
            "cudnn_conv_algo_search": SEARCHES[self.search],
            "use_tf32": "0",
            "enable_cuda_graph": str(int(self.graphs)),
        }
        if self.memory_limit_mb is not None:
            options["gpu_mem_limit"] = str(self.memory_limit_mb << 20)
        return options


class OnnxNetwork:
    """A graph on one of onnxruntime's providers; see Network."""

    def __init__(self, path: Path, threads: int = 0, cuda: CudaOptions | None = None) -> None:
        """Load `path`; `threads` of one inference, 0: one for each physical core; `cuda`: on a GPU.

        Raises BundleError, or EngineError where `cuda` cannot be had.
        """
        self._path = path
        self._session = _load(path, threads, cuda)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._bound = None if cuda is None else _Bound(self._session, cuda)
        self._options = _run_options()

    @property
    def metadata(self) -> Mapping[str, str]:
        """The graph's custom metadata."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, inputs: Arrays) -> Arrays:
        """Compute. Raises EngineError where onnxruntime fails, BrokenEngineError where the GPU does.

        InterruptedRunError where it was interrupted, which takes no longer than an operator of the graph does.
        """
        try:
            if self._bound is not None:
                return self._bound.run(inputs)
            return dict(zip(self._outputs, self._session.run(None, dict(inputs), self._options), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            if self._options.terminate and self._bound is None:
                raise InterruptedRunError(f"{self._path}: interrupted") from error
            kind = BrokenEngineError if BROKEN.search(str(error)) else EngineError
            raise kind(f"{self._path}: onnxruntime failed: {_first_line(error)}") from error

    def interrupt(self) -> None:
        """End the run under way, and let none begin; see Interruptible. On a GPU they are short, and go on."""
        self._options.terminate = True

    def resume(self) -> None:
        """Let runs be completed again."""
        self._options.terminate = False

    def close(self) -> None:
        """Release the session."""
        self._bound = None
        del self._session


@dataclass(frozen=True, slots=True)
class _OnDevice:
    """An output that stays where it was computed; see DeviceArray."""

    value: onnxruntime.OrtValue

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    def numpy(self) -> npt.NDArray[Any]:
        return np.array(self.value.numpy())


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Arrays at fixed addresses, with which onnxruntime records launches once and replays them from then on."""

    binding: onnxruntime.IOBinding
    options: onnxruntime.RunOptions
    inputs: dict[str, onnxruntime.OrtValue] = field(default_factory=dict)
    outputs: dict[str, onnxruntime.OrtValue] = field(default_factory=dict)


class _Bound:
    """A session whose inputs and outputs are bound to memory: what the next network reads stays on the device."""

    def __init__(self, session: onnxruntime.InferenceSession, cuda: CudaOptions) -> None:
        self._session, self._gpu, self._graphs = session, cuda.gpu, cuda.graphs
        self._inputs = {each.name: each.shape for each in session.get_inputs()}
        self._outputs = {each.name: (each.shape, TYPES[each.type]) for each in session.get_outputs()}
        self._launched = _run_options(NO_GRAPH)
        self._recorded: dict[Any, _Recorded] = {}

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        sizes = self._sizes(inputs)
        if self._graphs and sizes.get(BATCH) == 1 and max(sizes.values()) <= BUCKETS[-1]:
            return self._replay(inputs, sizes)
        binding = self._session.io_binding()
        for name, array in inputs.items():
            if isinstance(array, _OnDevice):
                binding.bind_ortvalue_input(name, array.value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))  # copied to the GPU right here
        for name in self._outputs:
            binding.bind_output(name, *((CUDA_DEVICE, self._gpu) if name in STAY else ("cpu", 0)))
        self._session.run_with_iobinding(binding, self._launched)
        values = zip(self._outputs, binding.get_outputs(), strict=True)
        return {name: _OnDevice(value) if name in STAY else value.numpy() for name, value in values}

    def _sizes(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """Return how long each named dimension is: the longest, for what stayed on the device is filled up already."""
        sizes: dict[str, int] = {}
        for name, array in inputs.items():
            for dimension, size in zip(self._inputs[name], array.shape, strict=True):
                if isinstance(dimension, str):
                    sizes[dimension] = max(size, sizes.get(dimension, 0))
        return sizes

    def _replay(self, inputs: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Compute with everything filled up to its bucket: masks and CIF are 0 there, so that nothing changes."""
        filled = {name: size if name == BATCH else BUCKETS[bisect_left(BUCKETS, size)] for name, size in sizes.items()}
        kept = {name: array.value for name, array in inputs.items() if isinstance(array, _OnDevice)}
        key = (*sorted(filled.items()), *(value.data_ptr() for value in kept.values()))
        if key not in self._recorded:
            self._recorded[key] = self._bind(filled, kept)
        recorded = self._recorded[key]
        for name, value in recorded.inputs.items():
            value.update_inplace(_filled_up(inputs[name], tuple(value.shape())))
        self._session.run_with_iobinding(recorded.binding, recorded.options)
        return {
            name: _OnDevice(value) if name in STAY else value.numpy()[self._part(name, sizes)].copy()
            for name, value in recorded.outputs.items()
        }

    def _bind(self, sizes: Mapping[str, int], kept: Mapping[str, onnxruntime.OrtValue]) -> _Recorded:
        from onnxruntime import OrtValue

        recorded = _Recorded(self._session.io_binding(), _run_options(len(self._recorded) + 1))
        place = (CUDA_DEVICE, self._gpu)
        for name, dimensions in self._inputs.items():
            value = kept.get(name)
            if value is None:
                shape = _shape(dimensions, sizes)
                value = recorded.inputs[name] = OrtValue.ortvalue_from_shape_and_type(shape, np.float32, *place)
            recorded.binding.bind_ortvalue_input(name, value)
        for name, (dimensions, kind) in self._outputs.items():
            value = OrtValue.ortvalue_from_shape_and_type(_shape(dimensions, sizes), kind, *place)
            recorded.binding.bind_ortvalue_output(name, value)
            recorded.outputs[name] = value
        return recorded

    def _part(self, output: str, sizes: Mapping[str, int]) -> tuple[slice, ...]:
        """Return which part of an output was asked for."""
        return tuple(slice(size) for size in _shape(self._outputs[output][0], sizes))


def runtime_version() -> str:
    """Return onnxruntime's version."""
    import onnxruntime

    return str(onnxruntime.__version__)


def _shape(dimensions: list[str | int], sizes: Mapping[str, int]) -> list[int]:
    return [sizes[dimension] if isinstance(dimension, str) else dimension for dimension in dimensions]


def _filled_up(array: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return an array with zeros beyond its ends."""
    if array.shape == shape:
        return np.ascontiguousarray(array)
    whole = np.zeros(shape, np.float32)
    whole[tuple(map(slice, array.shape))] = array
    return whole


def _run_options(graph: int | None = None) -> onnxruntime.RunOptions:
    import onnxruntime

    options = onnxruntime.RunOptions()
    if graph is not None:
        options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _load(path: Path, threads: int, cuda: CudaOptions | None) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            "onnxruntime is not installed: pip install 'edge-asr[cpu]', or 'edge-asr[gpu]' with a GPU"
        ) from error
    if not path.is_file():
        raise BundleError(f"{path}: no such file; copy the bundle again")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised, and said by us
    # Threads that wait for each other within an inference spin, which is a fifth faster than sleeping; between two
    # sentences that would cost an idle appliance a core.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if cuda is not None:
        return _load_on_gpu(path, options, cuda)
    try:
        # Without its fallback, which would say on standard output that it tries again what cannot work.
        return onnxruntime.InferenceSession(str(path), options, providers=[CPU_PROVIDER], enable_fallback=False)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise BundleError(
            f"{path}: onnxruntime cannot load it, the file is damaged or no ONNX graph; copy the bundle again"
            f" ({_first_line(error)})"
        ) from error


def _load_on_gpu(path: Path, options: onnxruntime.SessionOptions, cuda: CudaOptions) -> onnxruntime.InferenceSession:
    """Load onto the GPU and nowhere else: onnxruntime itself goes on without it, and says so in its log only."""
    import onnxruntime

    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise EngineError(
            "this onnxruntime knows no CUDA: pip uninstall onnxruntime, then pip install 'edge-asr[gpu]' (on a Jetson"
            " from the index that is made for its JetPack), or set engine.cuda.enabled to false"
        )
    onnxruntime.set_default_logger_severity(4)  # what fails is raised, and said by us
    _find_libraries()
    providers = [(CUDA_PROVIDER, cuda.for_provider())]  # what it has no kernel for goes to the CPU all the same
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=False)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise EngineError(
            f"onnxruntime cannot run {path.name} on GPU {cuda.gpu} ({_first_line(error)}); {REMEDY}"
        ) from error
    if CUDA_PROVIDER not in session.get_providers():
        raise EngineError(f"onnxruntime cannot use GPU {cuda.gpu} ({_missing()}); {REMEDY}")
    return session


def _find_libraries() -> None:
    """Load CUDA and cuDNN from Python packages, if they are there: the linker does not look for them."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            onnxruntime.preload_dlls()


def _missing() -> str:
    """Return why the CUDA provider is not there, which onnxruntime only logs."""
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return _first_line(error)
    return "its libraries are there, but no GPU with a driver"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
