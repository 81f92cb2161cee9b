"""The fake of TensorRT: it computes, and it has the rules of the real one."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_machine import WIDTH, Log, Machine, machine, model, on, on_each_release
from fake_machine import machine_here as machine_here
from onnx import TensorProto, helper
from tensorrt_fakes import FOLDER, RELEASES, fake_tensorrt

# It computes


@on_each_release
def test_a_plan_computes_when_somebody_waits(here: Machine) -> None:
    ready = here.ready()
    assert ready.run()
    assert not ready.result.any(), "nothing is done before"
    here.stream.synchronize()
    assert np.array_equal(ready.result, ready.expected)
    kind = ready.context.engine.get_tensor_dtype("ids").name
    assert kind == ("INT32" if here.trt.__version__.startswith("8.") else "INT64"), "8.x has no 64-bit integers"


def test_outputs_have_the_shape_that_inputs_give_them(here: Machine) -> None:
    context = here.load(here.build()).create_execution_context()
    assert tuple(context.get_tensor_shape("y")) == (-1, -1, WIDTH)
    assert context.infer_shapes() == ["x", "mask"]
    context.set_input_shape("x", (1, 5, WIDTH))
    context.set_input_shape("mask", (1, 5, 1))
    assert context.infer_shapes() == []
    assert (tuple(context.get_tensor_shape("y")), tuple(context.get_tensor_shape("ids"))) == ((1, 5, WIDTH), (1, 5))


def test_child_processes_get_the_same_fakes() -> None:
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import tensorrt; print(tensorrt.__version__)"
    environment = {**os.environ, "FAKE_TENSORRT": "11.4"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "11.4.0.106", result.stderr


def test_nothing_is_left_of_the_fakes() -> None:
    with fake_tensorrt():
        importlib.import_module("pycuda.driver")
    assert not {"tensorrt", "pycuda", "fake_gpu"} & set(sys.modules)
    assert str(FOLDER) not in sys.path
    assert ctypes.CDLL.__name__ == "CDLL"


# Releases differ


@pytest.mark.parametrize(
    ("name", "releases"),
    [
        ("BuilderFlag.FP16", ("8.5", "10.3", "10.13", "10.16")),
        ("BuilderFlag.OBEY_PRECISION_CONSTRAINTS", ("8.5", "10.3", "10.13", "10.16")),
        ("NetworkDefinitionCreationFlag.EXPLICIT_BATCH", ("8.5", "10.3", "10.13", "10.16")),
        ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", ("10.3", "10.13", "10.16", "11.4")),
        ("ILayer.precision", ("8.5", "10.3", "10.13", "10.16")),
        ("INetworkDefinition.add_normalization", ("10.3", "10.13", "10.16", "11.4")),
        ("ICudaEngine.create_execution_context_without_device_memory", ("8.5", "10.3", "10.13", "10.16")),
        ("ICudaEngine.device_memory_size", ("8.5", "10.3", "10.13", "10.16")),
        ("ICudaEngine.device_memory_size_v2", ("10.3", "10.13", "10.16", "11.4")),
        ("IExecutionContext.set_device_memory", ("10.3", "10.13", "10.16", "11.4")),
        ("IExecutionContext.device_memory", RELEASES),
        ("IBuilderConfig.progress_monitor", ("10.3", "10.13", "10.16", "11.4")),
        ("IProgressMonitor", ("10.3", "10.13", "10.16", "11.4")),
        ("ExecutionContextAllocationStrategy.USER_MANAGED", ("10.3", "10.13", "10.16", "11.4")),
    ],
)
def test_members_come_and_go_with_releases(name: str, releases: tuple[str, ...]) -> None:
    assert tuple(release for release in RELEASES if name in members(release)) == releases


@functools.cache
def members(release: str) -> frozenset[str]:
    """Return the names of the module and of what is in it, `Builder.create_network`."""
    with fake_tensorrt(release):
        trt = importlib.import_module("tensorrt")
        inner = {f"{kind}.{name}" for kind, found in vars(trt).items() for name in dir(found)}
        return frozenset({*vars(trt), *inner})


def test_integers_of_enumerations_shift() -> None:
    values = {}
    for release in RELEASES:
        with fake_tensorrt(release):
            flags = importlib.import_module("tensorrt").BuilderFlag
            values[release] = (int(flags.TF32), int(flags.SAFETY_SCOPE))
    assert values["8.5"] != values["10.3"]


@on("8.5")
def test_what_a_release_lacks_cannot_be_set_either(here: Machine) -> None:
    config = here.trt.Builder(here.log.logger).create_builder_config()
    with pytest.raises(AttributeError, match="builder_optimization_level"):
        config.builder_optimization_level = 3


# Building


def test_layer_normalization_is_refused_before_it_was_known() -> None:
    node = helper.make_node("LayerNormalization", ["x", "scale"], ["z"], name="norm")
    graph = model(node, opset=17)
    graph.graph.initializer.append(helper.make_tensor("scale", TensorProto.FLOAT, [WIDTH], [1.0] * WIDTH))
    for release, expected in (("8.5", False), ("10.3", True)):
        with machine(release) as here:
            _, _, parser, parsed = here.network(graph)
            assert parsed == expected
            assert parser.num_errors == (not expected)
            if not parsed:
                assert "LayerNormalization" in parser.get_error(0).desc()
                assert parser.get_error(0).node() == 3


def test_what_is_no_onnx_is_refused(here: Machine) -> None:
    builder = here.trt.Builder(here.log.logger)
    parser = here.trt.OnnxParser(builder.create_network(), here.log.logger)
    assert not parser.parse(b"nonsense")
    assert parser.num_errors == 1


@on("8.5")
def test_networks_of_8_need_the_flag_for_batches(here: Machine) -> None:
    parser = here.trt.OnnxParser(here.trt.Builder(here.log.logger).create_network(), here.log.logger)
    assert not parser.parse(model().SerializeToString())
    assert "explicit batch" in parser.get_error(0).desc()


def test_strongly_typed_networks_take_no_flags_of_precision(here: Machine) -> None:
    assert here.build(change=lambda config: config.set_flag(here.trt.BuilderFlag.FP16)) is None
    assert any("strongly typed" in line for line in here.log.lines)


@on("8.5")
def test_a_layer_of_integers_cannot_be_pinned_to_floats(here: Machine) -> None:
    builder, network, _, _ = here.network(model())
    config = builder.create_builder_config()
    layers = {network.get_layer(index).name: network.get_layer(index) for index in range(network.num_layers)}
    layers["best"].precision = here.trt.DataType.FLOAT
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *[(1, 2, WIDTH)] * 3)
    profile.set_shape("mask", *[(1, 2, 1)] * 3)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is None
    layers["best"].reset_precision()
    assert builder.build_serialized_network(network, config) is not None


def test_dynamic_inputs_need_a_profile(here: Machine) -> None:
    builder, network, _, _ = here.network(model())
    assert builder.build_serialized_network(network, builder.create_builder_config()) is None
    assert any("no optimization profile" in line for line in here.log.lines)


def test_the_shapes_of_a_profile_are_in_order(here: Machine) -> None:
    profile = here.trt.Builder(here.log.logger).create_optimization_profile()
    with pytest.raises(RuntimeError, match="inconsistent"):
        profile.set_shape("x", (1, 4, WIDTH), (1, 2, WIDTH), (1, 8, WIDTH))


@on(memory="300,1000000")
def test_a_build_needs_memory(here: Machine) -> None:
    assert here.build() is None


def test_a_monitor_is_called_on_another_thread_and_may_end_the_build(here: Machine) -> None:
    calls: list[tuple[object, ...]] = []

    class Monitor(here.trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self, steps: int) -> None:
            here.trt.IProgressMonitor.__init__(self)
            self.steps = steps

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            calls.append((phase_name, parent_phase, num_steps, threading.current_thread() is threading.main_thread()))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.steps -= 1
            return self.steps >= 0

        def phase_finish(self, phase_name: str) -> None:
            calls.append((phase_name,))

    def use(monitor: Any) -> Callable[[Any], object]:
        return lambda config: setattr(config, "progress_monitor", monitor)

    assert here.build(change=use(Monitor(steps=100))) is not None
    assert calls[0] == ("Building Engine", None, 2, False)
    assert calls[-1] == ("Building Engine",)
    assert here.build(change=use(Monitor(steps=2))) is None


def test_a_subclass_that_forgets_the_base_is_refused(here: Machine) -> None:
    class Forgetful(here.trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called"):
        Forgetful()


def test_a_timing_cache_fits_its_release_and_gpu() -> None:
    with machine("10.3") as here:
        config = here.trt.Builder(here.log.logger).create_builder_config()
        cache = config.create_timing_cache(b"")
        assert config.set_timing_cache(cache, False)
        kept = bytes(memoryview(cache.serialize()))
        assert config.create_timing_cache(kept[:-1]) is None
    for release, sm, fits in (("10.3", "8.7", True), ("10.13", "8.7", False), ("10.3", "7.2", False)):
        with machine(release, sm=sm) as here:
            config = here.trt.Builder(here.log.logger).create_builder_config()
            assert config.set_timing_cache(config.create_timing_cache(kept), False) == fits


def test_a_plan_shows_its_bytes_and_nothing_else(here: Machine) -> None:
    plan = here.build()
    assert len(memoryview(plan)) == plan.nbytes > 100
    with pytest.raises(TypeError):
        len(plan)
    with pytest.raises(AttributeError):
        plan.hex()


# Loading


def test_plans_that_do_not_fit_are_none_with_a_line() -> None:
    with machine("10.3") as here:
        plan = bytes(memoryview(here.build()))
        flipped = bytearray(plan)
        flipped[len(plan) // 2] ^= 1
        for wrong in (flipped, plan[:-1], b"", b"nonsense"):
            assert here.load(wrong) is None
            assert here.log.lines.pop().startswith("ERROR: IRuntime::deserializeCudaEngine")
        assert here.load(plan) is not None
    for release, sm in (("10.13", "8.7"), ("10.3", "7.2")):
        with machine(release, sm=sm) as here:
            assert here.load(plan) is None
            assert len(here.log.lines) == 1


def test_without_a_gpu_there_is_no_runtime() -> None:
    with fake_tensorrt(gpu="none"):
        trt: Any = importlib.import_module("tensorrt")
        driver: Any = importlib.import_module("pycuda.driver")
        log = Log(trt)
        for kind in (trt.Runtime, trt.Builder):
            with pytest.raises(TypeError, match="factory function returned nullptr"):
                kind(log.logger)
        with pytest.raises(driver.RuntimeError, match="no CUDA-capable device"):
            driver.init()
        with pytest.raises(driver.LogicError, match="initialization error"):
            driver.Device(0)


def test_without_a_driver_or_a_library_the_import_fails() -> None:
    with fake_tensorrt(gpu="nodriver"), pytest.raises(ImportError, match="libcuda"):
        importlib.import_module("pycuda.driver")
    with fake_tensorrt("broken"), pytest.raises(OSError, match="libnvdla_compiler"):
        importlib.import_module("tensorrt")


# Running


def test_shapes_outside_a_profile_are_refused(here: Machine) -> None:
    context = here.load(here.build()).create_execution_context()
    assert context.set_input_shape("x", (1, 8, WIDTH))
    assert not context.set_input_shape("x", (1, 9, WIDTH))
    assert not context.set_input_shape("x", (2, 8, WIDTH))
    assert not context.set_input_shape("x", (8, WIDTH))
    assert not context.set_input_shape("y", (1, 8, WIDTH))
    context.set_optimization_profile_async(1, here.stream.handle)
    assert context.infer_shapes() == ["x", "mask"], "another profile, and all shapes are to be set again"
    assert context.set_input_shape("x", (1, 16, WIDTH))
    with pytest.raises(RuntimeError, match="optimization profile"):
        context.set_optimization_profile_async(2, here.stream.handle)


def test_inputs_that_disagree_are_refused(here: Machine) -> None:
    ready = here.ready()
    ready.context.set_input_shape("mask", (1, 4, 1))
    with pytest.raises(RuntimeError, match="infer_shapes error code"):
        ready.context.infer_shapes()
    assert not ready.context.execute_async_v3(here.stream.handle)


def test_addresses_are_aligned_and_all_of_them_set(here: Machine) -> None:
    context = here.load(here.build()).create_execution_context()
    for name, size in (("x", WIDTH), ("mask", 1)):
        context.set_input_shape(name, (1, 2, size))
    memory = here.driver.mem_alloc(1024)
    assert not context.execute_async_v3(here.stream.handle)
    assert "address of x is not set" in here.log.lines[-1]
    assert not context.set_tensor_address("x", int(memory) + 4)
    assert here.gpu.violations.pop().endswith("not aligned to 256 bytes")
    assert context.set_tensor_address("x", int(memory) + 256)
    assert not context.set_tensor_address("z", int(memory))


@on_each_release
def test_contexts_without_memory_must_be_given_enough(here: Machine) -> None:
    ready = here.ready()
    engine, trt = ready.context.engine, here.trt
    if hasattr(engine, "create_execution_context_without_device_memory"):
        context = engine.create_execution_context_without_device_memory()
    else:
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    profile = 1 if here.trt.__version__.startswith("8.") else 0
    context.set_optimization_profile_async(profile, here.stream.handle)
    for name, width in (("x", WIDTH), ("mask", 1)):
        context.set_input_shape(name, (1, 4, width))
    memory = {name: here.driver.mem_alloc(256) for name in ("x", "mask", "y", "ids")}
    for name, one in memory.items():
        context.set_tensor_address(name, int(one))
    assert not context.execute_async_v3(here.stream.handle)
    assert "bytes of device memory" in here.log.lines[-1]
    modern = not hasattr(engine, "device_memory_size")
    needed = engine.get_device_memory_size_for_profile_v2(profile) if modern else engine.device_memory_size
    activations, little = here.driver.mem_alloc(needed), here.driver.mem_alloc(8)
    for one, size in ((little, 8), (activations, needed)):
        assert not context.execute_async_v3(here.stream.handle)
        if modern:
            context.set_device_memory(int(one), size)
        else:
            context.device_memory = int(one)
    assert context.execute_async_v3(here.stream.handle)
    here.stream.synchronize()


@pytest.mark.parametrize(
    ("here", "shared"),
    [({"release": "8.5"}, False), ({"release": "10.3"}, True)],
    indirect=["here"],
    ids=["8.5", "10.3"],
)
def test_before_10_a_profile_is_one_contexts(here: Machine, shared: bool) -> None:
    engine = here.load(here.build())
    first, second = engine.create_execution_context(), engine.create_execution_context()
    assert (first.active_optimization_profile, second.active_optimization_profile) == (0, 0 if shared else -1)
    assert second.set_input_shape("x", (1, 4, WIDTH)) == shared
    if not shared:
        with pytest.raises(RuntimeError):
            second.set_optimization_profile_async(0, here.stream.handle)
    assert second.set_optimization_profile_async(1, here.stream.handle)


@on(clean=False)
def test_memory_ends_where_it_ends(here: Machine) -> None:
    ready = here.ready()
    small = here.driver.mem_alloc(16)
    ready.context.set_tensor_address("y", int(small))
    assert ready.run()
    with pytest.raises(here.driver.LogicError, match="illegal memory access"):
        here.stream.synchronize()
    assert here.gpu.violations[0].startswith("tensor y: 48 bytes at offset 0 of <device 16 bytes")
    with pytest.raises(here.driver.LogicError, match="illegal memory access"):
        here.driver.mem_alloc(16)


def test_fresh_memory_is_no_zeros(here: Machine) -> None:
    ready = here.ready()
    assert ready.context.execute_async_v3(here.stream.handle), "nobody has copied the inputs"
    here.driver.memcpy_dtoh_async(ready.result, int(ready.memory["y"]), here.stream)
    here.stream.synchronize()
    assert np.isnan(ready.result).all()
