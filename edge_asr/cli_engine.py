"""What `build-engine` does: an engine that fits is kept, or one is built, with words and a bar around it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edge_asr.config import Config
from edge_asr.errors import EngineError
from edge_asr.loader import engine_folder, existing
from edge_asr.recognizer.bundle import read_bundle
from edge_asr.recognizer.manifest import FILE, resolved

if TYPE_CHECKING:
    from edge_asr.engine.candidate import Progress


def build(config: Config, if_needed: bool) -> None:
    """Build the engine of the configured model and print its manifest's path. Raises BundleError or EngineError."""
    bundle, wanted = read_bundle(config.model), config.engine
    target = resolved(wanted.target, wanted.gpu)
    folder = wanted.dir or engine_folder(bundle, config.state_dir, target)
    manifest = existing(bundle, folder, target, wanted.gpu, wanted.tensorrt) if if_needed else None
    if manifest is None:
        try:
            from edge_asr.engine.build import build_engine
        except ImportError as error:
            raise EngineError(f"an engine cannot be built without {error.name}: pip install 'edge-asr[cpu]'") from error
        with _shown() as progress:
            manifest = build_engine(
                bundle, wanted.target, folder, wanted.threads, progress, if_needed, wanted.gpu, wanted.tensorrt
            )
    _say(f"{bundle.name}: {manifest.engine}; {manifest.why}")
    print(folder / FILE)


@contextmanager
def _shown() -> Iterator[Progress]:
    """Yield a progress that fits standard error: a bar in a terminal, lines elsewhere."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda step, share: _say(f"{share * 100:3.0f} % {step}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda step, share: bar.update(task, description=step, completed=share)


def _say(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)
