"""TensorRT's engine of the bundled model, built with the fakes, and the folders of a machine that has it."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

from bundled import BUNDLE, engine_of
from tensorrt_fakes import fake_tensorrt

from edge_asr.engine.build import build_engine
from edge_asr.loader import engine_folder
from edge_asr.recognizer.bundle import FP32, read_bundle
from edge_asr.recognizer.manifest import TENSORRT

RELEASE = "10.3"


@functools.cache
def plan() -> Path:
    """Return the folder of the engine for the fake of RELEASE, built once in a run of the tests; not to be changed."""
    folder = Path(os.environ["XDG_DATA_HOME"]) / "engines of the tests" / TENSORRT
    with fake_tensorrt(RELEASE):
        build_engine(read_bundle(BUNDLE), TENSORRT, folder, threads=1, if_needed=True)
    return folder


def put_plan(state: Path) -> Path:
    """Put the engine where the bundled model's belongs below a state folder; return its place."""
    place = engine_folder(read_bundle(BUNDLE), state, TENSORRT)
    shutil.copytree(plan(), place)
    return place


def put_processors(state: Path) -> Path:
    """Put the engine for the processor, in fp32, where it belongs."""
    place = engine_folder(read_bundle(BUNDLE), state)
    shutil.copytree(engine_of(FP32), place)
    return place
