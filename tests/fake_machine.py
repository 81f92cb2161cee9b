"""A machine with the fakes of TensorRT and pycuda, and a small network for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper
from tensorrt_fakes import RELEASES, fake_tensorrt

WIDTH = 4
PROFILES = ((1, 4, 8), (4, 8, 16))
"""Frames at least, as a rule, at most."""


def model(*nodes: onnx.NodeProto, opset: int = 13) -> onnx.ModelProto:
    """Return a graph that doubles `x`, adds `mask` to it, and says where each row is greatest."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "T", WIDTH])
    mask = helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["B", "T", 1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "T", WIDTH])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "T"])
    double = [
        helper.make_node("Mul", ["x", "two"], ["doubled"], name="double"),
        helper.make_node("Add", ["doubled", "mask"], ["y"], name="add"),
        helper.make_node("ArgMax", ["y"], ["ids"], name="best", axis=2, keepdims=0),
    ]
    two = helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])
    graph = helper.make_graph([*double, *nodes], "fake", [x, mask], [y, ids], [two])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


class Log:
    """What TensorRT said."""

    def __init__(self, trt: Any) -> None:
        self.lines: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(this, severity: Any, msg: str) -> None:  # noqa: N805
                self.lines.append(f"{severity.name}: {msg}")

        self.logger = Logger()


class Machine:
    """A fake machine with a context, a stream, and the ways to build and to load."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu
        self.trt: Any = importlib.import_module("tensorrt")
        self.driver: Any = importlib.import_module("pycuda.driver")
        self.log = Log(self.trt)
        self.driver.init()
        self.context = self.driver.Device(0).retain_primary_context()
        self.context.push()
        self.stream = self.driver.Stream(1)

    def network(self, graph: onnx.ModelProto) -> tuple[Any, Any, Any, bool]:
        builder = self.trt.Builder(self.log.logger)
        flags = self.trt.NetworkDefinitionCreationFlag
        wanted = [getattr(flags, name) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, name)]
        network = builder.create_network(sum(1 << int(flag) for flag in wanted))
        parser = self.trt.OnnxParser(network, self.log.logger)
        return builder, network, parser, parser.parse(graph.SerializeToString())

    def build(self, graph: onnx.ModelProto | None = None, change: Callable[[Any], object] | None = None) -> Any:
        """Return a plan, None where there is none; `change` has a last look at the configuration."""
        builder, network, _, parsed = self.network(graph or model())
        assert parsed, self.log.lines
        config = builder.create_builder_config()
        for frames in PROFILES:
            profile = builder.create_optimization_profile()
            profile.set_shape("x", *((1, size, WIDTH) for size in frames))
            profile.set_shape("mask", *((1, size, 1) for size in frames))
            config.add_optimization_profile(profile)
        if change is not None:
            change(config)
        return builder.build_serialized_network(network, config)

    def load(self, plan: Any) -> Any:
        return self.trt.Runtime(self.log.logger).deserialize_cuda_engine(plan)

    def ready(self, frames: int = 3, profile: int = 0) -> Ready:
        return Ready(self, self.load(self.build()), frames, profile)


class Ready:
    """A context with all that it needs."""

    def __init__(self, machine: Machine, engine: Any, frames: int, profile: int) -> None:
        driver, self.machine = machine.driver, machine
        self.context = engine.create_execution_context()
        self.context.set_optimization_profile_async(profile, machine.stream.handle)
        self.shapes = {"x": (1, frames, WIDTH), "mask": (1, frames, 1)}
        for name, shape in self.shapes.items():
            assert self.context.set_input_shape(name, shape)
        values = np.arange(frames * WIDTH, dtype=np.float32).reshape(1, frames, WIDTH)
        self.host = {"x": values, "mask": np.ones((1, frames, 1), np.float32)}
        self.pinned = {name: driver.pagelocked_empty(array.shape, array.dtype) for name, array in self.host.items()}
        self.result = driver.pagelocked_zeros(values.shape, np.float32)
        sizes = {name: array.nbytes for name, array in self.host.items()}
        self.memory = {name: driver.mem_alloc(size) for name, size in {**sizes, "y": values.nbytes}.items()}
        self.memory["ids"] = driver.mem_alloc(8 * frames)
        for name, memory in self.memory.items():
            assert self.context.set_tensor_address(name, int(memory))

    @property
    def expected(self) -> npt.NDArray[np.float32]:
        return self.host["x"] * 2 + 1

    def run(self) -> bool:
        """Begin all; nothing is done before somebody waits."""
        for name, array in self.pinned.items():
            array[:] = self.host[name]
            self.machine.driver.memcpy_htod_async(int(self.memory[name]), array, self.machine.stream)
        begun = bool(self.context.execute_async_v3(self.machine.stream.handle))
        self.machine.driver.memcpy_dtoh_async(self.result, int(self.memory["y"]), self.machine.stream)
        return begun


@contextmanager
def machine(release: str = "10.3", **settings: Any) -> Iterator[Machine]:
    with fake_tensorrt(release, **settings) as gpu:
        made = Machine(gpu)
        try:
            yield made
        finally:
            made.stream = None
            made.driver.Context.pop()
            del made


@pytest.fixture(name="here")
def machine_here(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Yield a machine with 10.3, or as the parameter says; by its end, what the test made is gone."""
    with machine(**getattr(request, "param", {})) as made:
        yield made


def on(release: str = "10.3", **settings: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("here", [{"release": release, **settings}], ids=[release], indirect=True)


on_each_release = pytest.mark.parametrize("here", [{"release": one} for one in RELEASES], ids=RELEASES, indirect=True)
