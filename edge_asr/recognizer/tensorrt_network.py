"""Networks on TensorRT: a plan for each, both on one stream of one GPU."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_asr.errors import EngineError
from edge_asr.recognizer import cuda
from edge_asr.recognizer.cuda import DeviceMemory, Gpu
from edge_asr.recognizer.gpu_buffers import STAYS, Buffers
from edge_asr.recognizer.network import BUCKETS, Arrays
from edge_asr.recognizer.tensorrt_plan import LoadedPlan, Profile, Runner, Shape, Sizes, Tensor

log = logging.getLogger(__name__)

OLDEST = (8, 5)
FRAMES_PER_TOKEN = 4
"""About as many as in speech."""
LEGACY_TEGRA = Path("/etc/nv_tegra_release")


@dataclass(frozen=True, slots=True)
class TensorRtOptions:
    """How plans run."""

    gpu: int = 0
    cuda_graphs: bool = False
    """Record the launches for one utterance of each bucket of lengths, and replay them."""
    mapped_memory: bool = False
    """Let the GPU read and write the host's memory instead of copying."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What a plan depends on."""

    tensorrt: str
    cuda: str
    """CUDA that pycuda was made for, `12.6`."""
    driver: str
    """The newest CUDA that the driver knows."""
    gpu: str
    sm: str
    """Compute capability, `8.7`."""
    multiprocessors: int
    """How many are switched on: boards of one name, and power modes of one board, differ in that."""
    total_bytes: int
    integrated: bool
    """Its memory is the host's."""
    l4t: str | None
    """First line of /etc/nv_tegra_release; None where the machine is no Jetson."""

    @property
    def memory_gb(self) -> int:
        """All of its memory, rounded: another release of the system keeps another bit of it to itself."""
        return round(self.total_bytes / 2**30)


def unavailable(gpu: int = 0) -> str | None:
    """Return in one line why this machine cannot run TensorRT on that GPU, None where it can."""
    try:
        import tensorrt

        version = str(tensorrt.__version__)
        numbers = tuple(map(int, version.split(".")[:2]))
    except cuda.BAD_INSTALLATION as error:
        return f"TensorRT is not installed, or cannot be loaded ({cuda.first_line(error)})"
    if numbers < OLDEST:
        return f"TensorRT {version} is too old, the oldest that will do is 8.5.2"
    return cuda.unavailable(gpu)


def machine(gpu: int = 0) -> GpuFacts:
    """Return what plans depend on here, without touching the GPU. Raises EngineError where TensorRT or GPU lacks."""
    if (why := unavailable(gpu)) is not None:
        raise EngineError(why)
    import tensorrt

    facts = cuda.facts(gpu)
    return GpuFacts(
        tensorrt=str(tensorrt.__version__), cuda=facts.cuda, driver=facts.driver, gpu=facts.name, sm=facts.sm,
        multiprocessors=facts.multiprocessors, total_bytes=facts.total_bytes, integrated=facts.integrated, l4t=_l4t(),
    )  # fmt: skip


def load_networks(
    encoder_plan: Path, decoder_plan: Path, metadata: Mapping[str, str], options: TensorRtOptions
) -> tuple[TensorRtNetwork, TensorRtNetwork]:
    """Load encoder and decoder; `metadata`: what the encoder says of itself, for plans have no room for it.

    Both share a stream, and memory for what they compute on the way: they run one after the other. Raises EngineError.
    """
    if (why := unavailable(options.gpu)) is not None:
        raise EngineError(why)
    device = _Device(options)
    try:
        with contextlib.ExitStack() as undo:
            plans = []
            for path in (encoder_plan, decoder_plan):
                plans.append(LoadedPlan(path, device.gpu))
                undo.callback(device.gpu.release, [plans[-1].close])
            device.take_memory(plans)
            encoder = TensorRtNetwork(plans[0], device, metadata)
            undo.callback(encoder.close)
            decoder = TensorRtNetwork(plans[1], device, {})
            undo.callback(decoder.close)
            encoder.warm_up(decoder)
            undo.pop_all()
    finally:
        device.release()
    return encoder, decoder


class GpuArray:
    """An output that stays on the GPU, until its network runs again or is closed; see DeviceArray."""

    def __init__(self, owner: TensorRtNetwork, tensor: Tensor, address: int, shape: Shape, whole: Shape) -> None:
        """`whole`: the shape that it has in memory, filled up."""
        self.shape, self.whole, self.address = shape, whole, address
        self.dtype = tensor.dtype
        self._owner, self._run = owner, owner.runs

    def numpy(self) -> npt.NDArray[Any]:
        """Fetch a copy. Raises EngineError."""
        gpu = self.check().gpu
        array = np.empty(self.whole, self.dtype)
        with gpu.current():
            gpu.fetch_now(array, self.address)
        return array[tuple(map(slice, self.shape))]

    def check(self) -> _Device:
        """Return where it lies. Raises EngineError where other values lie there by now."""
        if self._owner.runs != self._run:
            raise EngineError("the encoder's output is gone: it has run again, or was closed, before it was read")
        return self._owner.device


class _Device:
    """A GPU, and the memory that contexts share while they compute; given back by the last who uses it."""

    def __init__(self, options: TensorRtOptions) -> None:
        self.options, self.gpu = options, Gpu(options.gpu)
        self._users = 1
        self._sizes: dict[bool, int] = {}
        self._activations: dict[bool, DeviceMemory] = {}

    def take_memory(self, plans: list[LoadedPlan]) -> None:
        """Take a block that is large enough for each plan, for single utterances."""
        for alone in (True, False):
            self._sizes[alone] = max(1, *(plan.activation_bytes(alone) for plan in plans))
        with self.gpu.current():
            self.activations(True)

    def activations(self, alone: bool) -> DeviceMemory:
        """Return the block for single utterances, or that for batches: a server of commands never takes the latter.

        Neither moves, for contexts know where it lies. Where TensorRT tells one size for all profiles there is one.
        """
        if not alone and self._sizes[False] <= self._sizes[True]:
            return self.activations(True)
        if alone not in self._activations:
            self._activations[alone] = self.gpu.allocate(self._sizes[alone], "what the networks compute on the way")
        return self._activations[alone]

    def retain(self) -> None:
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if self._users:
            return
        self.gpu.release([block.free for block in self._activations.values()])
        self.gpu.close()


@dataclass(frozen=True, slots=True)
class _Work:
    """One run: which profile, for which sizes, where everything lies."""

    profile: Profile
    asked: Sizes
    sizes: Sizes
    """Filled up to what the profile takes, or the bucket."""
    buffers: Buffers
    addresses: Mapping[str, int]


class TensorRtNetwork:
    """A plan of TensorRT; see Network."""

    def __init__(self, plan: LoadedPlan, device: _Device, metadata: Mapping[str, str]) -> None:
        """Take memory for what is spoken alone; what batches need comes with the first batch. Raises EngineError."""
        self.metadata, self.device = metadata, device
        self.largest_batch = max(profile.high["B"] for profile in plan.profiles)
        """Utterances that a run takes, by the profiles that the plan was built with."""
        self.runs = 0
        self._plan = plan
        self._records = device.options.cuda_graphs and plan.shares_profiles
        if device.options.cuda_graphs and not self._records:
            # A graph is void when its context gets other shapes, and here all lengths of a profile share a context.
            log.warning("%s: no CUDA graphs, which need TensorRT 10 or newer", plan.path)
        self._buffers: dict[bool, Buffers] = {}
        self._closed = False
        with device.gpu.current():
            self._buffers_of(plan.profiles[0])
        device.retain()

    def run(self, inputs: Arrays) -> Arrays:
        """Compute. `enc` stays on the GPU: it is a GpuArray, which the decoder wants. Raises EngineError."""
        if self._closed:
            raise EngineError(f"{self._plan.path}: is closed")
        with self.device.gpu.current():
            work = self._work(inputs)
            self.runs += 1
            for name, tensor in self._plan.inputs.items():
                if name != STAYS:
                    work.buffers.send(tensor, inputs[name], tensor.shape_for(work.sizes))
            return self._fetch(work, self._compute(work))

    def warm_up(self, decoder: TensorRtNetwork) -> None:
        """Run this encoder and then `decoder` in each profile for single utterances. Raises EngineError.

        Kernels are loaded and memory is taken in the first run: what is lacking shows now, not at the first long
        sentence, which need not wait either.
        """
        for profile in self._plan.profiles:
            if profile.alone:
                frames = profile.high["T"]
                sizes = {"B": 1, "T": frames, "N": max(1, frames // FRAMES_PER_TOKEN)}
                enc = self.run(self._silence(sizes))[STAYS]
                decoder.run({**decoder._silence(sizes), STAYS: enc})

    def _silence(self, sizes: Sizes) -> Arrays:
        """Return zeros, and masks that count all of them."""
        return {
            name: np.full(tensor.shape_for(sizes), "mask" in name, np.float32)
            for name, tensor in self._plan.inputs.items()
        }

    def close(self) -> None:
        """Release everything, on any thread; after an error of the GPU as well. Twice does no harm."""
        if self._closed:
            return
        self._closed = True
        self.runs += 1  # nothing that lies on the GPU is of use any more
        buffers = [one.free for one in self._buffers.values()]
        self.device.gpu.release([self._plan.close, *buffers])
        self._buffers.clear()
        self.device.release()

    def _work(self, inputs: Arrays) -> _Work:
        asked, fixed, addresses = self._sizes(inputs)
        profile = self._plan.profile_for(asked, fixed)
        filled = {axis: self._filled(axis, size, profile) for axis, size in asked.items()} | fixed
        buffers = self._buffers_of(profile)
        return _Work(profile, asked, filled, buffers, {**buffers.addresses, **addresses})

    def _sizes(self, inputs: Arrays) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """Return the sizes of inputs; those that cannot be filled up any more; and where what is on the GPU lies."""
        asked: dict[str, int] = {}
        fixed: dict[str, int] = {}
        addresses: dict[str, int] = {}
        for name, tensor in self._plan.inputs.items():
            array = inputs[name]
            if any(
                asked.setdefault(axis, size) != size
                for axis, size in zip(tensor.axes, array.shape, strict=True)
                if axis != "."
            ):
                raise EngineError(f"{self._plan.path}: {name} {array.shape} does not go with the other inputs")
            if name == STAYS:
                if not isinstance(array, GpuArray) or array.check() is not self.device:
                    raise EngineError(f"{self._plan.path}: wants {name} of the encoder that was loaded with it")
                addresses[name] = array.address
                fixed |= {axis: size for axis, size in zip(tensor.axes, array.whole, strict=True) if axis != "."}
        return asked, fixed, addresses

    def _filled(self, axis: str, size: int, profile: Profile) -> int:
        if profile.alone and axis != "B":
            size = next((bucket for bucket in BUCKETS if bucket >= size), profile.high[axis])
        return min(max(size, profile.low[axis]), profile.high[axis])

    def _buffers_of(self, profile: Profile) -> Buffers:
        """Return the memory for its inputs and outputs; profiles for one utterance share theirs, those for more too."""
        alone = profile.alone
        if alone not in self._buffers:
            sizes = [one.high for one in self._plan.profiles if one.alone == alone]
            inputs = [tensor for name, tensor in self._plan.inputs.items() if name != STAYS]
            wanted = [*inputs, *self._plan.outputs.values()]
            self._buffers[alone] = Buffers(self.device.gpu, wanted, sizes, self.device.options.mapped_memory)
        return self._buffers[alone]

    def _compute(self, work: _Work) -> Mapping[str, Shape]:
        """Begin to compute; return the shapes of the outputs."""
        alone = work.profile.alone
        runner = self._plan.runner(work.profile, work.sizes, self.device.activations(alone))
        shapes = runner.bind(work.sizes, work.addresses)
        runner.launch(self.device.gpu)
        if self._records and alone:
            self._record(runner)
        return shapes

    def _record(self, runner: Runner) -> None:
        """Record what has just run, for the next time. Where that fails, it is launched as ever."""
        try:
            runner.record(self.device.gpu)
        except EngineError as error:
            log.warning("no CUDA graphs, launching each kernel instead: %s", error)
            self._records = False

    def _fetch(self, work: _Work, shapes: Mapping[str, Shape]) -> Arrays:
        outputs = self._plan.outputs
        for name, shape in shapes.items():
            if name != STAYS:
                work.buffers.fetch(outputs[name], shape)
        self.device.gpu.wait()
        results: dict[str, Any] = {}
        for name, whole in shapes.items():
            tensor = outputs[name]
            shape = tensor.shape_for(work.asked)
            if name == STAYS:
                results[name] = GpuArray(self, tensor, work.addresses[name], shape, whole)
            else:
                results[name] = work.buffers.read(tensor, whole, shape)
        return results


def _l4t() -> str | None:
    with contextlib.suppress(OSError):
        return LEGACY_TEGRA.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].strip() or None
    return None
