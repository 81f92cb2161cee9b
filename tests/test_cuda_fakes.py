"""The fake of pycuda and of libcudart: the rules that the real ones have, and faults on demand."""

from __future__ import annotations

import ctypes
import importlib
import threading
from typing import Any

import numpy as np
import pytest
from fake_machine import Machine, machine, on
from fake_machine import machine_here as machine_here
from tensorrt_fakes import fake_tensorrt

# pycuda


def test_page_locked_memory_is_read_when_the_copy_happens(here: Machine) -> None:
    device = here.driver.mem_alloc(16)
    locked, pageable = here.driver.pagelocked_zeros(4, np.float32), np.zeros(4, np.float32)
    back = np.empty(4, np.float32)
    for source, expected in ((locked, 7), (pageable, 0)):
        here.driver.memcpy_htod_async(int(device), source, here.stream)
        source[:] = 7
        here.stream.synchronize()
        here.driver.memcpy_dtoh(back, int(device))
        assert (back == expected).all()
    assert here.gpu.counts["copies of pageable memory"] == 1


def test_streams_that_do_not_block_are_not_waited_for(here: Machine) -> None:
    device = here.driver.mem_alloc(16)
    source, back = here.driver.pagelocked_zeros(4, np.float32), np.empty(4, np.float32)
    for flags, waits in ((0, True), (1, False)):
        stream = here.driver.Stream(flags)
        here.driver.memset_d8(int(device), 0xFF, 16)
        here.driver.memcpy_htod_async(int(device), source, stream)
        here.driver.memcpy_dtoh(back, int(device))
        assert (back == 0).all() == waits
        stream.synchronize()


def test_events_mark_a_place_in_a_stream(here: Machine) -> None:
    driver = here.driver
    device, source = driver.mem_alloc(16), driver.pagelocked_zeros(4, np.float32)
    event = driver.Event(driver.event_flags.BLOCKING_SYNC | driver.event_flags.DISABLE_TIMING)
    driver.memcpy_htod_async(int(device), source, here.stream)
    event.record(here.stream)
    driver.memset_d8_async(int(device), 1, 16, here.stream)
    assert not event.query(), "a copy is before it"
    event.synchronize()
    assert event.query()
    with pytest.raises(driver.LogicError):
        event.time_since(event)
    here.stream.synchronize()


def test_mapped_memory_has_an_address_of_its_own(here: Machine) -> None:
    driver = here.driver
    mapped = driver.pagelocked_zeros(64, np.uint8, mem_flags=driver.host_alloc_flags.DEVICEMAP)
    driver.memset_d8_async(mapped.base.get_device_pointer(), 5, 64, here.stream)
    assert not mapped.any()
    here.stream.synchronize()
    assert (mapped == 5).all()
    plain = driver.pagelocked_zeros(64, np.uint8)
    with pytest.raises(driver.LogicError):
        plain.base.get_device_pointer()


def test_nothing_goes_without_a_current_context(here: Machine) -> None:
    driver = here.driver
    driver.Context.pop()
    for call in (lambda: driver.mem_alloc(16), driver.mem_get_info, driver.Stream, driver.Context.synchronize):
        with pytest.raises(driver.LogicError, match="invalid device context"):
            call()
    with pytest.raises(driver.LogicError, match="cannot pop"):
        driver.Context.pop()
    here.context.push()
    assert driver.mem_get_info()[1] == here.gpu.total


def test_contexts_are_each_threads_own_and_seen_where_they_stay(here: Machine) -> None:
    errors: list[Exception] = []

    def work() -> None:
        try:
            here.driver.mem_alloc(16)
        except here.driver.LogicError as error:
            errors.append(error)
        here.context.push()

    thread = threading.Thread(target=work, name="forgets to pop")
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert "1 contexts on the stack of thread forgets to pop" in here.gpu.leaks()
    here.gpu.stacks.clear()


@on(clean=False)
def test_what_is_given_back_on_another_thread_needs_the_context_there(here: Machine) -> None:
    memory = here.driver.mem_alloc(16)
    warned: list[str] = []

    def free() -> None:
        try:
            memory.free()
        except UserWarning as warning:
            warned.append(str(warning))

    thread = threading.Thread(target=free)
    thread.start()
    thread.join()
    assert len(warned) == 1
    assert any(line.startswith("<device 16 bytes") for line in here.gpu.leaks())


def test_numbers_of_numpy_are_no_addresses(here: Machine) -> None:
    with pytest.raises(TypeError, match="did not match C"):
        here.driver.memcpy_htod_async(np.int64(1), np.zeros(4), here.stream)


# Faults


@on(oom_at=2)
def test_memory_runs_out_where_it_is_told_to(here: Machine) -> None:
    first = here.driver.mem_alloc(16)
    with pytest.raises(here.driver.MemoryError, match="out of memory") as caught:
        here.driver.mem_alloc(16)
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, here.driver.Error)
    assert here.driver.mem_alloc(16)
    first.free()
    with pytest.raises(here.driver.LogicError, match="invalid resource handle"):
        first.free()


@on(memory="1000,2000")
def test_memory_runs_out_above_its_limit(here: Machine) -> None:
    kept = here.driver.mem_alloc(600)
    assert here.driver.mem_get_info() == (400, 2000)
    with pytest.raises(here.driver.MemoryError):
        here.driver.mem_alloc(401)
    kept.free()
    assert here.driver.mem_alloc(1000)


@on(memory="1500,2000")
def test_engines_and_contexts_that_find_no_memory_are_none(here: Machine) -> None:
    plan = here.build()
    assert here.load(plan).create_execution_context() is None
    assert "out of memory" in here.log.lines[-1]
    taken = here.driver.mem_alloc(1400)
    assert here.load(plan) is None
    taken.free()


@on(clean=False, fail_at=2)
def test_a_failed_kernel_fails_all_that_follows(here: Machine) -> None:
    ready = here.ready()
    ready.run()
    here.stream.synchronize()
    assert ready.run(), "that it fails is known later"
    with pytest.raises(here.driver.LaunchError, match="launch failure"):
        here.stream.synchronize()
    assert not ready.context.execute_async_v3(here.stream.handle)
    for call in (here.driver.Stream, lambda: here.driver.mem_alloc(1), here.driver.Context.synchronize):
        with pytest.raises(here.driver.LaunchError):
            call()


@on(nan_at=2)
def test_answers_are_nan_where_they_are_told_to(here: Machine) -> None:
    ready = here.ready()
    for expected in (False, True):
        ready.run()
        here.stream.synchronize()
        assert np.isnan(ready.result).all() == expected


def test_what_is_not_given_back_is_found() -> None:
    kept = []
    with pytest.raises(AssertionError, match="device 16 bytes"), machine() as here:
        kept.append(here.driver.mem_alloc(16))


# CUDA graphs


class Cudart:
    """Libcudart as a program loads it."""

    def __init__(self, stream: Any) -> None:
        self.library: Any = ctypes.CDLL("libcudart.so.12")
        self.stream = ctypes.c_void_p(stream.handle)
        self.graph, self.executable = ctypes.c_void_p(), ctypes.c_void_p()

    def begin(self, mode: int = 1) -> int:
        return int(self.library.cudaStreamBeginCapture(self.stream, mode))

    def end(self) -> int:
        return int(self.library.cudaStreamEndCapture(self.stream, ctypes.byref(self.graph)))

    def instantiate(self) -> int:
        return int(self.library.cudaGraphInstantiateWithFlags(ctypes.byref(self.executable), self.graph, 0))

    def launch(self) -> int:
        return int(self.library.cudaGraphLaunch(self.executable, self.stream))

    def close(self) -> None:
        assert self.library.cudaGraphExecDestroy(self.executable) == 0
        assert self.library.cudaGraphDestroy(self.graph) == 0


def test_what_was_recorded_is_done_again_at_each_launch(here: Machine) -> None:
    ready, runtime = here.ready(), Cudart(here.stream)
    ready.run()
    here.stream.synchronize()
    assert runtime.begin() == 0
    assert ready.run()
    assert (runtime.end(), runtime.instantiate()) == (0, 0)
    assert here.gpu.counts["executions"] == 1, "recorded is not done"
    for factor in (3, 5):
        ready.pinned["x"][:] = ready.host["x"] * factor
        assert runtime.launch() == 0
        here.stream.synchronize()
        assert np.array_equal(ready.result, ready.host["x"] * factor * 2 + 1)
    runtime.close()


def test_shapes_that_have_not_run_cannot_be_recorded(here: Machine) -> None:
    ready, runtime = here.ready(), Cudart(here.stream)
    runtime.begin()
    assert not ready.context.execute_async_v3(here.stream.handle)
    assert runtime.end() == 901
    assert runtime.library.cudaGetErrorString(901) == b"operation failed due to a previous error during capture"


def test_waiting_and_allocating_break_a_recording(here: Machine) -> None:
    for mode, call, broken in (
        (1, here.stream.synchronize, True),
        (0, lambda: here.driver.mem_alloc(16), True),
        (2, lambda: here.driver.mem_alloc(16), False),
    ):
        runtime = Cudart(here.stream)
        runtime.begin(mode)
        if broken:
            with pytest.raises(here.driver.LogicError, match="capturing"):
                call()
        else:
            call()
        assert runtime.end() == (901 if broken else 0)
        runtime.library.cudaGraphDestroy(runtime.graph)


def test_libcudart_may_be_missing() -> None:
    with fake_tensorrt(cudart="missing"):
        importlib.import_module("pycuda.driver")
        with pytest.raises(OSError, match=r"libcudart.so.12: cannot open"):
            ctypes.CDLL("libcudart.so.12")
