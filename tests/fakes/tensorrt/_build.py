"""The builder: from a network to a plan."""

from __future__ import annotations

import hashlib
import json
import sys
import threading

import fake_gpu

from tensorrt._network import INetworkDefinition
from tensorrt._plan import Plan, serialize
from tensorrt._release import RELEASE, of_release, plain
from tensorrt._types import (
    BuilderFlag,
    DataType,
    Dims,
    IHostMemory,
    ILogger,
    IProgressMonitor,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    PreviewFeature,
    ProfilingVerbosity,
    TacticSource,
    require_gpu,
)


class IOptimizationProfile:
    """Shapes that a plan is to run, and those that it is to be best at."""

    def __init__(self):
        self._shapes = {}

    extra_memory_target = plain("extra_memory_target", 1.0)

    def set_shape(self, input, min, opt, max):  # noqa: A002
        least, best, most = (tuple(Dims(shape)) for shape in (min, opt, max))
        if not len(least) == len(best) == len(most) or any(
            not low <= middle <= high for low, middle, high in zip(least, best, most, strict=True)
        ):
            raise RuntimeError("Shape provided for opt is inconsistent with other shapes.")
        self._shapes[input] = (least, best, most)

    def get_shape(self, input):  # noqa: A002
        return [Dims(shape) for shape in self._shapes.get(input, ())]

    def __bool__(self):
        return True


of_release(IOptimizationProfile)


class ITimingCache:
    """What the builder has measured."""

    def __init__(self, release, sm, entries):
        self._release, self._sm, self._entries = release, list(sm), dict(entries)

    def serialize(self):
        body = json.dumps([self._release, self._sm, self._entries]).encode()
        return IHostMemory(b"ftch" + hashlib.sha256(body).digest() + body)

    def combine(self, input_cache, ignore_mismatch):
        if not ignore_mismatch and (input_cache._release, input_cache._sm) != (self._release, self._sm):
            return False
        self._entries |= input_cache._entries
        return True

    def reset(self):
        self._entries.clear()
        return True

    @staticmethod
    def _read(data):
        data = bytes(data)
        if not data:
            return ITimingCache(RELEASE, fake_gpu.gpu.sm, {})
        if data[:4] != b"ftch" or hashlib.sha256(data[36:]).digest() != data[4:36]:
            return None
        return ITimingCache(*json.loads(data[36:]))


of_release(ITimingCache)


class IBuilderConfig:
    """How to build."""

    builder_optimization_level = plain("builder_optimization_level", 3)
    profiling_verbosity = plain("profiling_verbosity", ProfilingVerbosity.LAYER_NAMES_ONLY)
    avg_timing_iterations = plain("avg_timing_iterations", 1)
    max_aux_streams = plain("max_aux_streams", 0)
    flags = plain("flags", 1 << BuilderFlag.TF32.value)

    def __init__(self):
        self._pools = {}
        self._profiles = []
        self._cache = None
        self._tactics = None
        self._monitor = None
        self._previews = {}

    def set_flag(self, flag):
        self.flags |= 1 << _flag(flag).value

    def clear_flag(self, flag):
        self.flags &= ~(1 << _flag(flag).value)

    def get_flag(self, flag):
        return bool(self.flags >> _flag(flag).value & 1)

    def set_memory_pool_limit(self, pool, pool_size):
        if not isinstance(pool, MemoryPoolType) or not isinstance(pool_size, int):
            raise TypeError("set_memory_pool_limit(): incompatible function arguments")
        self._pools[pool] = pool_size

    def get_memory_pool_limit(self, pool):
        return self._pools.get(pool, fake_gpu.gpu.total)

    def add_optimization_profile(self, profile):
        if not profile._shapes:
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self):
        return len(self._profiles)

    def set_tactic_sources(self, tactic_sources):
        if not isinstance(tactic_sources, int) or tactic_sources >> len(TacticSource.__members__):
            return False
        self._tactics = tactic_sources
        return True

    def get_tactic_sources(self):
        return (1 << len(TacticSource.__members__)) - 1 if self._tactics is None else self._tactics

    def set_preview_feature(self, feature, enable):
        if not isinstance(feature, PreviewFeature):
            raise TypeError("set_preview_feature(): incompatible function arguments")
        self._previews[feature.name] = enable

    def get_preview_feature(self, feature):
        return self._previews.get(feature.name, False)

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache._read(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        if not isinstance(cache, ITimingCache):
            raise TypeError("set_timing_cache(): incompatible function arguments")
        if not ignore_mismatch and (cache._release, cache._sm) != (RELEASE, list(fake_gpu.gpu.sm)):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache

    @property
    def progress_monitor(self):
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, monitor):
        if monitor is not None and not isinstance(monitor, IProgressMonitor):
            raise TypeError("incompatible function arguments: an IProgressMonitor is needed")
        self._monitor = monitor


of_release(IBuilderConfig)


def _flag(flag):
    if not isinstance(flag, BuilderFlag):
        raise TypeError("incompatible function arguments: a BuilderFlag is needed")
    return flag


class _BuildError(Exception):
    """Why there is no plan."""


class Builder:
    """Makes plans."""

    def __init__(self, logger):
        require_gpu("Builder", logger)
        self._logger = logger

    logger = plain("logger", read_only=True)
    platform_has_fast_fp16 = plain("platform_has_fast_fp16", True, read_only=True)
    platform_has_tf32 = plain("platform_has_tf32", True, read_only=True)

    def create_network(self, flags=0):
        if flags >> (max(flag.value for flag in NetworkDefinitionCreationFlag) + 1):
            self.logger.log(ILogger.ERROR, "Unknown flag for a network")
            return None
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        try:
            return IHostMemory(serialize(_build(network, config)))
        except _BuildError as error:
            self.logger.log(ILogger.ERROR, f"IBuilder::buildSerializedNetwork: Error Code 4: {error}")
            return None


of_release(Builder)


def _build(network, config):
    """Return the Plan. Raises _BuildError."""
    graph = network._graph
    if graph is None:
        raise _BuildError("Network must have at least one output")
    flags = [flag.name for flag in BuilderFlag if config.get_flag(flag)]
    _check_typing(network, flags)
    profiles = [_check_profile(graph, profile) for profile in config._profiles]
    if not profiles and any(-1 in one.shape for one in graph.inputs.values()):
        raise _BuildError("Network has dynamic or shape inputs, but no optimization profile has been defined")
    data = graph.model.SerializeToString()
    gpu = fake_gpu.gpu
    if gpu.available < 2 * len(data):
        raise _BuildError("Internal Error (Could not find any implementation due to insufficient memory)")
    everything = (1 << len(TacticSource.__members__)) - 1
    if gpu.bare and config.get_tactic_sources() != everything:
        raise _BuildError("Internal Error (Could not find any implementation for node {ForeignNode[norm]}.)")
    _report(getattr(config, "progress_monitor", None), len(profiles) or 1)
    if config._cache is not None:
        config._cache._entries[hashlib.sha256(data).hexdigest()] = len(data)
    return Plan(
        release=RELEASE,
        sm=list(gpu.sm),
        profiles=profiles,
        flags=flags,
        previews=sorted(name for name, on in config._previews.items() if on),
        strongly_typed=network._strong,
        workspace=config._pools.get(MemoryPoolType.WORKSPACE),
        tactic_sources=config._tactics,
        fp32_layers=[one.name for one in network._layers if one._precision is DataType.FLOAT],
        graph=data,
    )


def _check_typing(network, flags):
    typed = {"FP16", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS", "BF16", "INT8"} & set(flags)
    if network._strong and typed:
        raise _BuildError(f"API Usage Error ({', '.join(sorted(typed))} cannot be set for a strongly typed network)")
    if network._complaints:
        raise _BuildError(network._complaints[0])
    for layer in network._layers:
        if layer._precision in (DataType.FLOAT, DataType.HALF) and layer._is_integer:
            raise _BuildError(f"{layer.name}: a layer of integers is constrained to {layer._precision.name}")


def _check_profile(graph, profile):
    for name in profile._shapes:
        if name not in graph.inputs:
            raise _BuildError(f"a profile names {name}, which is no input")
    for name, tensor in graph.inputs.items():
        shapes = profile._shapes.get(name)
        if shapes is None and -1 in tensor.shape:
            raise _BuildError(f"{name}: dynamic input is missing dimensions in a profile")
        for shape in shapes or ():
            if len(shape) != len(tensor.shape) or any(
                fixed not in (-1, size) for fixed, size in zip(tensor.shape, shape, strict=True)
            ):
                raise _BuildError(f"{name}: a profile has {shape}, the network {tensor.shape}")
    return {name: profile._shapes.get(name, (tensor.shape,) * 3) for name, tensor in graph.inputs.items()}


def _report(monitor, profiles, steps=3):
    """Tell the monitor, on another thread. Raises _BuildError where it wants no more."""
    wanted = [True]

    def call(name, *arguments):
        try:
            return getattr(monitor, name)(*arguments)
        except Exception as error:  # noqa: BLE001  the bindings print what a callback raises, and go on
            print(f"[ERROR] Exception caught in {name}(): {error}", file=sys.stderr)  # noqa: T201
            return False

    def run():
        call("phase_start", "Building Engine", None, profiles)
        for profile in range(profiles):
            name = f"Computing profile {profile}"
            call("phase_start", name, "Building Engine", steps)
            for step in range(steps):
                wanted[0] = wanted[0] and bool(call("step_complete", name, step))
            call("phase_finish", name)
            wanted[0] = wanted[0] and bool(call("step_complete", "Building Engine", profile))
        call("phase_finish", "Building Engine")

    if monitor is None:
        return
    thread = threading.Thread(target=run, name="fake builder")
    thread.start()
    thread.join()
    if not wanted[0]:
        raise _BuildError("Internal Error (the build was cancelled by its progress monitor)")
