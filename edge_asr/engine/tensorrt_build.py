"""Plans: TensorRT compiles a network for the GPU of this machine."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edge_asr.engine.profiles import Profile
from edge_asr.errors import EngineError
from edge_asr.memory import available_bytes
from edge_asr.recognizer import cuda
from edge_asr.recognizer.cuda import Gpu
from edge_asr.recognizer.tensorrt_network import GpuFacts, machine
from edge_asr.recognizer.tensorrt_plan import tensorrt_log

log = logging.getLogger(__name__)

Report = Callable[[float], None]
"""Who wants to know which share is done."""

CACHE = "timing.cache"
"""File beside an engine: how fast kernels were here, so that the next build need not try them all again."""
WORKSPACE_SHARE = 0.25
"""Of the free memory, for kernels that are tried out: the rest is for weights, which the builder holds a few times."""
LEAST_WORKSPACE = 64 << 20
DIGEST_BYTES = 32
TELLING = 0.05
"""Progress by less is not told: TensorRT takes thousands of steps, and each may be a line in a log."""
NO_KERNEL = "Could not find any implementation"
SILENT = "it does not say why"
REMEDY = "free memory, update TensorRT, or take --target onnx"


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How a plan is built."""

    gpu: int
    cache: Path
    """The file of the timing cache."""
    workspace_mb: int | None = None
    """What kernels may take while they are tried; None: a share of what is free."""


def typing() -> str:
    """Return `strong` where TensorRT takes the types of the graph as they are, `weak` where it is told them."""
    import tensorrt

    return "strong" if _is_strong(tensorrt) else "weak"


def knows_layer_norm() -> bool:
    """Tell whether TensorRT has LayerNormalization; before 8.6 it takes only its parts."""
    import tensorrt

    return hasattr(tensorrt.INetworkDefinition, "add_normalization")


def build_plan(model: Path, profiles: Sequence[Profile], out: Path, options: PlanOptions, report: Report) -> None:
    """Compile an ONNX file, whose constants lie beside it, to the plan `out`. Raises EngineError.

    The types of the graph are kept: TensorRT from 9 on promises that, earlier releases are told layer by layer.
    """
    facts = machine(options.gpu)
    gpu = Gpu(options.gpu)
    try:
        with gpu.current():
            _build(model, profiles, out, options, facts, report)
    finally:
        gpu.close()
    report(1.0)


def _build(
    model: Path, profiles: Sequence[Profile], out: Path, options: PlanOptions, facts: GpuFacts, report: Report
) -> None:
    import tensorrt as trt

    logger = tensorrt_log()
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    described = onnx.load(str(model), load_external_data=False)
    if not parser.parse_from_file(str(model)):
        raise EngineError(_refusal(parser, described.graph, model))
    config = _config(trt, builder, profiles, facts, options)
    if not _is_strong(trt):
        _choose_types(trt, network, config, described)
    cache = _use_cache(config, options.cache, facts)
    if hasattr(config, "progress_monitor"):
        monitor = _monitor(trt, report)  # has to live as long as the build
        config.progress_monitor = monitor
    logger.errors.clear()  # of a cache that was not taken
    plan = builder.build_serialized_network(network, config)
    usual = builder.create_builder_config().get_tactic_sources()
    if plan is None and usual != config.get_tactic_sources() and any(NO_KERNEL in error for error in logger.errors):
        log.warning("TensorRT %s has no kernel of its own for %s: all libraries are asked", facts.tensorrt, model.name)
        logger.errors.clear()
        config.set_tactic_sources(usual)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        last = logger.errors[-1] if logger.errors else SILENT
        raise EngineError(f"TensorRT {facts.tensorrt} cannot build {model.name}: {_one_line(last)}; {REMEDY}")
    _write(out, memoryview(plan))
    if cache is not None:
        _keep_cache(cache, options.cache, out.with_suffix(".timing"), facts)


def free_bytes(facts: GpuFacts, gpu: int) -> int:
    """Return how much memory a builder can get on a GPU. Raises EngineError.

    On a Jetson, GPU and host share theirs, and only the host's figure counts what caches would give back.
    """
    host = available_bytes()
    return host if facts.integrated else min(host, cuda.free_bytes(gpu))


def _is_strong(trt: Any) -> bool:
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def _network_flags(trt: Any) -> int:
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return flags


def _config(trt: Any, builder: Any, profiles: Sequence[Profile], facts: GpuFacts, options: PlanOptions) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # it is for what half precision is too coarse for
    workspace = free_bytes(facts, options.gpu) * WORKSPACE_SHARE
    if options.workspace_mb is not None:
        workspace = options.workspace_mb << 20
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, max(int(workspace), LEAST_WORKSPACE))
    # Without cuBLAS and cuDNN, which 8.x would load: hundreds of megabytes.
    own = 1 << int(trt.TacticSource.EDGE_MASK_CONVOLUTIONS) | 1 << int(trt.TacticSource.JIT_CONVOLUTIONS)
    if not config.set_tactic_sources(own):
        log.warning("TensorRT %s keeps its own choice of tactic sources", facts.tensorrt)
    if hasattr(trt.PreviewFeature, "FASTER_DYNAMIC_SHAPES_0805"):  # 8.5 has it off, and 10 has nothing else
        config.set_preview_feature(trt.PreviewFeature.FASTER_DYNAMIC_SHAPES_0805, True)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"TensorRT {facts.tensorrt} refuses the profile {dict(shapes)}; update edge_asr")
    return config


def _choose_types(trt: Any, network: Any, config: Any, model: onnx.ModelProto) -> None:
    """Give each layer the type of the node that it was made of: TensorRT 8 would take whatever is fastest."""
    if hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    if hasattr(trt.BuilderFlag, "OBEY_PRECISION_CONSTRAINTS"):
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    halves = _halves(model)
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        layers.append(layer)
        # A node may become several layers; the last one gives its output.
        made = [name for i in range(layer.num_outputs) if (name := layer.get_output(i).name) in halves]
        if made:
            kind = trt.DataType.HALF if halves[made[0]] else trt.DataType.FLOAT
            for one in layers:
                _pin(trt, one, kind)
            layers.clear()


def _pin(trt: Any, layer: Any, kind: Any) -> None:
    """Fix the type of a layer that computes with floats; constants have that of their weights."""
    floats = (trt.DataType.FLOAT, trt.DataType.HALF)
    outputs = [i for i in range(layer.num_outputs) if layer.get_output(i).dtype in floats]
    if outputs and layer.num_inputs and hasattr(trt.ILayer, "precision"):
        layer.precision = kind
        for index in outputs:
            layer.set_output_type(index, kind)


def _halves(model: onnx.ModelProto) -> dict[str, bool]:
    """Tell by the name of each constant, and of what each node gives, whether it is in half precision.

    Where a node gives no floats (ArgMax), what it takes decides; where it takes none either, it is not there.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.input, *inferred.output, *inferred.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update({constant.name: constant.data_type for constant in model.graph.initializer})
    half, floats = onnx.TensorProto.FLOAT16, (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    halves = {name: kind == half for name, kind in types.items() if kind in floats}
    for node in model.graph.node:
        known = [halves[name] for name in (*node.output, *node.input) if name in halves]
        halves.update({name: known[0] for name in node.output if known})
    return halves


def _refusal(parser: Any, graph: onnx.GraphProto, model: Path) -> str:
    """Return the parser's first complaint in a line; the others are logged."""
    lines = [_complaint(parser.get_error(index), graph) for index in range(parser.num_errors)]
    for line in lines[1:]:
        log.warning("%s: %s", model.name, line)
    return f"TensorRT cannot read {model.name}: {lines[0] if lines else SILENT}; update TensorRT, or take --target onnx"


def _complaint(error: Any, graph: onnx.GraphProto) -> str:
    number = error.node()
    known = 0 <= number < len(graph.node)
    node = f"{graph.node[number].op_type} {graph.node[number].name}: " if known else ""
    return node + _one_line(error.desc())


class Phases:
    """Which share of a build is done, from phases within steps of phases."""

    def __init__(self) -> None:
        self.share = 0.0
        self._phases: dict[str, tuple[float, float]] = {}
        """By name: where the next step starts, and how much of the whole a step is."""

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase takes the place of the current step of its parent, or all that is left."""
        start, room = self._phases.get(parent or "", (self.share, 1 - self.share))
        self._phases[name] = (start, room / max(steps, 1))

    def step(self, name: str) -> float:
        """A step is done; return the share of the whole, which never falls."""
        start, size = self._phases.get(name, (self.share, 0.0))
        self._phases[name] = (start + size, size)
        self.share = max(self.share, min(start + size, 1.0))
        return self.share

    def finish(self, name: str) -> None:
        """A phase is over."""
        self._phases.pop(name, None)


def _monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases, self._told = Phases(), 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            share = self._phases.step(phase_name)
            if share >= self._told + TELLING:
                self._told = share
                report(share)
            return True  # go on

    return Monitor()


def _use_cache(config: Any, path: Path, facts: GpuFacts) -> Any:
    """Give the builder what is known of this GPU's kernels; return its cache. What is of no use is left alone."""
    try:
        kept = path.read_bytes()
    except OSError:
        kept = b""
    known = kept[DIGEST_BYTES:]
    if kept[:DIGEST_BYTES] != _cache_digest(known, facts):
        known = b""
    for content in (known, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _keep_cache(cache: Any, path: Path, draft: Path, facts: GpuFacts) -> None:
    known = bytes(memoryview(cache.serialize()))
    _write(draft, _cache_digest(known, facts) + known)
    draft.replace(path)


def _cache_digest(known: bytes, facts: GpuFacts) -> bytes:
    """Return the hash that a cache begins with: another release of TensorRT or GPU, or a flipped bit, changes it."""
    here = f"{facts.tensorrt} {facts.gpu} {facts.sm} {facts.multiprocessors} {facts.memory_gb} "
    return hashlib.sha256(here.encode() + known).digest()


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
