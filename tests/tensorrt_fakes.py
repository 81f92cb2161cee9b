"""The fakes of TensorRT and pycuda in `fakes/`: here, and in the child processes that are started meanwhile."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "fakes"
RELEASES = ("8.5", "10.3", "10.13", "10.16", "11.4")
"""Those that the engine is to run on."""
PACKAGES = ("tensorrt", "pycuda", "fake_gpu")


@contextlib.contextmanager
def fake_tensorrt(release: str = "10.3", *, clean: bool = True, **settings: object) -> Iterator[Any]:
    """Make `tensorrt` and `pycuda` the fakes of a release; yield the simulated GPU, see `fakes/fake_gpu`.

    `settings` become environment variables: `gpu="none"` FAKE_GPU, `sm="7.2"` FAKE_GPU_SM, `memory="FREE,TOTAL"`
    FAKE_GPU_MEMORY, `cudart="missing"` FAKE_CUDART and so on. `clean`: fail where something was not given back, or
    where memory was touched that is nobody's.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_TENSORRT", release)
        for name, value in settings.items():
            patch.setenv({"gpu": "FAKE_GPU", "cudart": "FAKE_CUDART"}.get(name, f"FAKE_GPU_{name.upper()}"), str(value))
        patch.syspath_prepend(str(FOLDER))
        forget()
        gpu = importlib.import_module("fake_gpu").gpu
        try:
            yield gpu
            if clean:
                if gpu.leaks():
                    gc.collect()  # what refers to itself is given back late
                assert not gpu.violations, gpu.violations
                assert not gpu.leaks(), gpu.leaks()
        finally:
            importlib.import_module("fake_gpu.cudart").uninstall()
            forget()


def forget() -> None:
    """Let the next import of the fakes make them anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
