"""A GPU through pycuda: context, stream and memory."""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_asr.errors import BrokenEngineError, EngineError
from edge_asr.recognizer.cuda_graph import RESTART, Graph, load_runtime

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: whoever uses the default stream of the process neither waits for us nor we for them."""
BAD_INSTALLATION = (ImportError, OSError, AttributeError, ValueError, RuntimeError)
"""What importing a package raises that is missing, half there, without its libraries, or made for another numpy."""
FREE_MEMORY = "end what else uses the GPU's memory, or take a smaller model"

_contexts: dict[Any, _Retained] = {}
_lock = threading.Lock()


class Gpu:
    """A GPU with a stream of our own. All of it is used within `current()`, by one thread at a time."""

    def __init__(self, number: int) -> None:
        """Open GPU `number`. Raises EngineError."""
        import pycuda.driver as driver

        self._driver = driver
        self.number = number
        self._stream: Any = None
        self._done: Any = None
        with self._errors(f"GPU {number} cannot be used", EngineError):
            self._context = _retain(driver, number)
            try:
                with self.current():
                    self._stream = driver.Stream(NON_BLOCKING)
                    # Sleeps instead of spinning: beside an inference there is a microphone to listen to.
                    self._done = driver.Event(driver.event_flags.BLOCKING_SYNC | driver.event_flags.DISABLE_TIMING)
            except EngineError:
                self.close()
                raise

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        return int(self._stream.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU's context the thread's own. Raises EngineError, BrokenEngineError for what pycuda raises."""
        with self._errors(f"GPU {self.number} failed", BrokenEngineError):
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()

    def allocate(self, size: int, purpose: str) -> DeviceMemory:
        """Return `size` bytes of the GPU's memory, aligned to 256. Raises EngineError where there are none."""
        with self._errors(f"the GPU has no {_megabytes(size)} left for {purpose}", BrokenEngineError):
            return DeviceMemory(self._driver.mem_alloc(size), size)

    def allocate_host(self, size: int, purpose: str, mapped: bool) -> HostMemory:
        """Return `size` bytes that the GPU copies by itself, or reads and writes in place where they are `mapped`."""
        flags = self._driver.host_alloc_flags.DEVICEMAP if mapped else 0
        with self._errors(f"no {_megabytes(size)} can be locked in memory for {purpose}", BrokenEngineError):
            return HostMemory(self._driver.pagelocked_empty(size, np.uint8, mem_flags=flags))

    def send(self, host: Bytes, address: int) -> None:
        """Begin to copy bytes of a HostMemory to the GPU."""
        self._driver.memcpy_htod_async(address, host, self._stream)

    def fetch(self, host: Bytes, address: int) -> None:
        """Begin to copy from the GPU into bytes of a HostMemory."""
        self._driver.memcpy_dtoh_async(host, address, self._stream)

    def fetch_now(self, host: npt.NDArray[Any], address: int) -> None:
        """Copy from the GPU into any array, when nothing is under way."""
        self._driver.memcpy_dtoh(host, address)

    def wait(self) -> None:
        """Sleep until all that was begun is done."""
        self._done.record(self._stream)
        self._done.synchronize()

    def record(self, launch: Callable[[], bool]) -> Graph:
        """Return what `launch` would do on the stream, as a graph. Raises EngineError."""
        return Graph(load_runtime(self._driver.get_version()[0]), self.stream, launch)

    def release(self, steps: Iterable[Callable[[], None]]) -> None:
        """Give things back, one after the other, on any thread. After an error of the GPU what fails is gone anyway."""
        for step in steps:
            try:
                with self.current():
                    step()
            except EngineError as error:
                log.debug("GPU %d: %s", self.number, error)

    def close(self) -> None:
        """Give stream, event and context back, once."""
        self.release([self._forget])
        _release(self._driver, self.number)

    def _forget(self) -> None:
        self._stream = self._done = None

    @contextmanager
    def _errors(self, what: str, kind: type[EngineError]) -> Iterator[None]:
        """Turn pycuda's errors into `kind`; being out of memory passes, so it is always an EngineError."""
        try:
            yield
        except self._driver.MemoryError as error:
            _let_go(error)
            raise EngineError(f"{what}: {first_line(error)}; {FREE_MEMORY}") from error
        except self._driver.Error as error:
            _let_go(error)
            raise kind(f"{what}: {first_line(error)}; {RESTART}") from error


def _let_go(error: BaseException | None) -> None:
    """Empty the frames of functions that `error`, and what it came from, have left.

    They hold streams, events and memory, which must go while their context is current, not when the error is forgotten.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class DeviceMemory:
    """Memory of the GPU."""

    def __init__(self, allocation: Any, size: int) -> None:
        """Own pycuda's `allocation`, of `size` bytes."""
        self._allocation, self.size = allocation, size
        self.address = int(allocation)

    def free(self) -> None:
        """Give it back."""
        self._allocation.free()


class HostMemory:
    """Memory of the host that stays where it is, so that the GPU can copy it by itself."""

    def __init__(self, array: Any) -> None:
        """Own pycuda's page-locked `array`."""
        self._allocation = array.base
        self.bytes: Bytes = array

    @property
    def address(self) -> int:
        """Where the GPU sees it, if it is mapped."""
        return int(self._allocation.get_device_pointer())

    def free(self) -> None:
        """Give it back; nobody may look at `bytes` any more."""
        self.bytes = np.zeros(0, np.uint8)
        self._allocation.free()


@dataclass(frozen=True, slots=True)
class Facts:
    """What pycuda says of a GPU without touching it."""

    cuda: str
    """CUDA that pycuda was made for, `12.6`."""
    driver: str
    """The newest CUDA that the driver knows."""
    name: str
    sm: str
    """Compute capability, `8.7`."""
    multiprocessors: int
    total_bytes: int
    integrated: bool
    """Its memory is the host's."""


def facts(number: int) -> Facts:
    """Return what GPU `number` is. Raises EngineError where there is none."""
    if (why := unavailable(number)) is not None:
        raise EngineError(why)
    import pycuda.driver as driver

    device = driver.Device(number)
    newest = driver.get_driver_version()
    return Facts(
        cuda=".".join(map(str, driver.get_version()[:2])),
        driver=f"{newest // 1000}.{newest % 1000 // 10}",
        name=device.name(),
        sm=".".join(map(str, device.compute_capability())),
        multiprocessors=device.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT),
        total_bytes=device.total_memory(),
        integrated=bool(device.get_attribute(driver.device_attribute.INTEGRATED)),
    )


def free_bytes(number: int) -> int:
    """Return how much of a GPU's memory is free, which takes a context. Raises EngineError."""
    import pycuda.driver as driver

    gpu = Gpu(number)
    try:
        with gpu.current():
            free, _ = driver.mem_get_info()
    finally:
        gpu.close()
    return int(free)


def unavailable(number: int) -> str | None:
    """Return in one line why GPU `number` cannot be used through pycuda, None where it can."""
    try:
        import pycuda.driver as driver
    except BAD_INSTALLATION as error:
        return f"pycuda cannot be loaded ({first_line(error)})"
    try:
        driver.init()
        count = driver.Device.count()
    except driver.Error as error:
        return f"CUDA finds no GPU ({first_line(error)})"
    return None if number < count else f"there is no GPU {number} (engine.gpu), only {count} of them, counted from 0"


@dataclass(slots=True)
class _Retained:
    """The primary context of a GPU, which onnxruntime and TensorRT use too, and how many of us do."""

    context: Any
    users: int = 0


def _retain(driver: Any, number: int) -> Any:
    with _lock:
        key = (driver, number)
        if key not in _contexts:
            driver.init()
            _contexts[key] = _Retained(driver.Device(number).retain_primary_context())
        _contexts[key].users += 1
        return _contexts[key].context


def _release(driver: Any, number: int) -> None:
    """Give the context back if nobody uses it any more.

    pycuda does so only on the thread that retained it, or where it is current; and CUDA leaves it current then. So it
    is done on a thread that ends with it.
    """
    with _lock:
        retained = _contexts[driver, number]
        retained.users -= 1
        if retained.users:
            return
        del _contexts[driver, number]

        def detach() -> None:
            with contextlib.suppress(driver.Error):  # after an error of the GPU it is gone anyway
                retained.context.push()
                retained.context.detach()

        thread = threading.Thread(target=detach, name="release-gpu")
        thread.start()
        thread.join()


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MB"


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
