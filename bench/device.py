#!/usr/bin/env python3
"""Measure one engine on this machine: built, self-tested, held against fp32, timed warm and after a pause.

For a Jetson or any other machine: `python -m bench.device --json result.json` from the repository's root.
`python -m bench.device --list docs/devices/*.json` writes the results that were sent in into docs/devices.md.
Needs `pip install -e '.[cpu]'` or `[gpu]`, and for tensorrt-fp16 what that needs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only

from bench import device_results
from bench.device_measure import ON_GPU, Effort, Task, measure, turns
from bench.device_report import full, listed
from bench.report import update
from bench.terminal import list_of, positive, progress
from edge_asr.errors import EdgeAsrError
from edge_asr.recognizer.bundle import FP32, INT8, read_bundle
from edge_asr.recognizer.manifest import AUTO, ONNX
from edge_asr.types import Samples

ROOT = Path(__file__).resolve().parents[1]
TARGETS = (AUTO, *ON_GPU, ONNX, INT8, FP32)
SECTION = "devices"
"""Of docs/devices.md: what is written anew. The rest is written by hand."""
SECONDS, BATCHES = (1.0, 2.0, 5.0, 10.0, 30.0), (1, 4, 8)
FULL = Effort(SECONDS, BATCHES, runs=100, case_s=20.0, idle_s=60.0, pauses=3)
QUICK = Effort(SECONDS, BATCHES, runs=10, case_s=3.0, idle_s=5.0, pauses=1)


def main(arguments: list[str] | None = None) -> None:
    """Measure, or list what was measured."""
    options = _arguments(arguments)
    try:
        if options.list is not None:
            _list(options.list, options.out)
        else:
            _measure(options)
    except (EdgeAsrError, ValueError) as error:
        sys.exit(f"bench.device: {error}")


def _measure(options: argparse.Namespace) -> None:
    task = _task(options)
    with progress(turns(task)) as tick:
        result = measure(task, tick)
    if options.json:
        device_results.write(options.json, result)
    print(full(result))


def _list(paths: list[Path], out: Path) -> None:
    """Write all results into their section of a document."""
    results = [device_results.read(path) for path in paths]
    document = out.read_text(encoding="utf-8") if out.exists() else ""
    out.write_text(update(document, SECTION, listed(results)), encoding="utf-8")
    print(out)


def _task(options: argparse.Namespace) -> Task:
    usual = QUICK if options.quick else FULL
    effort = Effort(
        options.seconds or usual.seconds,
        options.batches or usual.batches,
        options.runs or usual.runs,
        usual.case_s,
        usual.idle_s if options.idle is None else options.idle,
        usual.pauses,
    )
    return Task(
        bundle=read_bundle(options.model),
        target=options.target,
        engine=options.engine,
        threads=options.threads,
        gpu=options.gpu,
        effort=effort,
        sound=_sound(options.audio),
        command=_command(options),
        quick=options.quick,
        note=options.note,
    )


def _sound(path: Path | None) -> Samples | None:
    if path is None:
        return None
    from edge_asr.audio.decode import read

    samples = read(path)
    if not len(samples):
        raise ValueError(f"{path}: holds no sound")
    return samples


def _command(options: argparse.Namespace) -> str:
    """Return the command with everything that bears on the figures, and no paths of this machine."""
    words = ["python", "-m", "bench.device", "--model", options.model.name, "--target", options.target]
    words += ["--quick"] if options.quick else []
    for name in ("seconds", "batches"):
        values = getattr(options, name)
        words += [f"--{name}", ",".join(f"{value:g}" for value in values)] if values else []
    for name in ("runs", "idle", "threads"):
        value = getattr(options, name)
        words += [f"--{name}", f"{value:g}"] if value else []
    words += ["--audio", options.audio.name] if options.audio else []
    return shlex.join(words)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "engines" / "paraformer-tiny", metavar="DIR", help="the bundled model")
    add("--engine", type=Path, metavar="DIR", help="take the engine there if it fits, else build it there")
    add(
        "--target",
        choices=TARGETS,
        default=AUTO,
        help="what is measured; onnx-cuda: onnx-fp32 on a GPU, onnx-cuda-fp16: rounded (auto)",
    )
    add("--json", type=Path, metavar="FILE", help="write the result, to be sent in")
    add("--quick", action="store_true", help="fewer runs, one short pause: to try the command out")
    add("--seconds", type=list_of(float), metavar="S,...", help="lengths of audio (1,2,5,10,30)")
    add("--batches", type=list_of(int), metavar="N,...", help="utterances in a run, where the engine can (1,4,8)")
    add("--runs", type=positive(int), help="of each case (100, quick 10), or as many as 20 s allow (quick: 3)")
    add("--idle", type=_seconds, metavar="S", help="how long a pause is (60, quick 5); 0: none")
    add("--threads", type=int, default=0, help="of one inference on the processor (0: one for each physical core)")
    add("--gpu", type=int, default=0, help="which GPU (0)")
    add("--audio", type=Path, metavar="FILE", help="a recording, cut or repeated, for something like speech")
    add("--note", default="", metavar="TEXT", help="what else is to be said: a fan, random weights")
    add("--list", type=Path, nargs="+", metavar="FILE", help="write these results into docs/devices.md instead")
    add("--out", type=Path, default=ROOT / "docs" / "devices.md", metavar="FILE", help="what --list writes to")
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


_seconds.__name__ = "number of seconds"

if __name__ == "__main__":
    main()
