#!/usr/bin/env python3
"""Time edge_asr, sherpa-onnx and funasr-onnx on one bundle, taking turns; write a table and a plot.

Needs `pip install -e '.[cpu,bench]'`, without scripts/constraints.txt: funasr-onnx wants numpy 1.26 or older.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only

from bench import report
from bench.contestants import CONTESTANTS, Samples
from bench.measure import Bench, Entry, OutError, enter, turns, write_sounds
from bench.results import OURS, OURS_FP32, LeftOut, Results
from bench.terminal import list_of, positive, progress, say
from edge_asr.errors import AudioError, EdgeAsrError
from edge_asr.recognizer.bundle import FP32, INT8, Bundle, read_bundle
from edge_asr.recognizer.manifest import this_machine

ROOT = Path(__file__).resolve().parents[1]
NOISE = "white noise"


def main() -> None:
    """Measure and write."""
    options = _arguments()
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("against_peers: matplotlib is not installed: pip install -e '.[cpu,bench]'")
    try:
        _run(options, read_bundle(options.bundle))
    except EdgeAsrError as error:
        sys.exit(f"against_peers: {error}")


def _run(options: argparse.Namespace, bundle: Bundle) -> None:
    circumstances = _circumstances(options, bundle)
    names = [f"{project} {precision}" for project, precision in CONTESTANTS]
    results = Results(names, options.threads, options.seconds)
    for ours, kind in ((OURS, INT8), (OURS_FP32, FP32)):
        if kind in bundle.files:
            results.graph_mb[ours] = bundle.files[kind].stat().st_size / 1e6
    with tempfile.TemporaryDirectory(prefix="edge_asr-bench-") as folder:
        work = Path(folder)
        sounds = write_sounds(options.seconds, _sound(options.audio), work)
        entries = _entries(bundle, options.engines or work / "engines", work, results)
        count = turns(len(entries), len(options.seconds), len(options.threads), options.runs)
        with progress(count) as tick:
            bench = Bench(entries, results, sounds, tick)
            for threads in options.threads:
                bench.measure(threads, options.runs, options.pin)
    if options.json:
        everything = {"circumstances": dataclasses.asdict(circumstances), "results": dataclasses.asdict(results)}
        options.json.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plot = report.write(options.out, results, circumstances)
    for out in results.left_out:
        say(f"left out: {out.contestant}, {out.threads} threads: {out.reason}")
    print(options.out, plot, sep="\n")


def _entries(bundle: Bundle, engines: Path, work: Path, results: Results) -> list[Entry]:
    entries = []
    for project, precision in CONTESTANTS:
        say(f"preparing {project} {precision}")
        try:
            entries.append(enter(project, precision, bundle, engines, work))
        except OutError as error:
            results.left_out += [LeftOut(f"{project} {precision}", n, str(error)) for n in results.threads]
    return entries


def _sound(path: Path | None) -> Samples | None:
    if path is None:
        return None
    from edge_asr.audio.decode import read

    samples = read(path)
    if not len(samples):
        raise AudioError(f"{path}: holds no sound")
    return samples


def _circumstances(options: argparse.Namespace, bundle: Bundle) -> report.Circumstances:
    runtime = f"Python {'.'.join(platform.python_version_tuple()[:2])}, onnxruntime {_runtime()}"
    label = options.label or runtime
    return report.Circumstances(
        date=datetime.date.today().isoformat(),
        label=label,
        section=options.section or _slug(label),
        bundle=bundle.name,
        sound=f"{options.audio.name}, over and over" if options.audio else NOISE,
        machine=this_machine(),
        cores=os.cpu_count() or 0,
        load_average=os.getloadavg()[0],
        python=platform.python_version(),
        command=_command(options, bundle),
        rounds=options.runs,
        pinned=options.pin,
    )


def _runtime() -> str:
    """Return the version of the onnxruntime that we run on."""
    names = ("onnxruntime", "onnxruntime-gpu")
    with contextlib.suppress(PackageNotFoundError):
        return version(names[0])
    with contextlib.suppress(PackageNotFoundError):
        return version(names[1])
    return "unknown"


def _slug(text: str) -> str:
    """Return a name for a section: in HTML comments and file names."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "run"


def _command(options: argparse.Namespace, bundle: Bundle) -> str:
    """Return the command with everything that bears on the figures, and no paths of this machine."""
    lists = {"--seconds": options.seconds, "--threads": options.threads}
    words = ["python", "bench/against_peers.py", bundle.name, "--runs", str(options.runs)]
    for name, values in lists.items():
        words += [name, ",".join(f"{value:g}" for value in values)]
    words.append("--pin" if options.pin else "--no-pin")
    if options.audio:
        words += ["--audio", options.audio.name]
    return shlex.join(words)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="folder of a published model")
    add("--seconds", type=list_of(float), default=[2.0, 5.0, 10.0], metavar="S,...", help="lengths of audio (2,5,10)")
    add("--threads", type=list_of(int), default=[1, 2], metavar="N,...", help="threads of one inference (1,2)")
    add("--runs", type=positive(int), default=9, help="rounds of each case (9)")
    add("--pin", action=argparse.BooleanOptionalAction, default=sys.platform == "linux",
        help="pin processes to as many cores as there are threads")  # fmt: skip
    add("--audio", type=Path, metavar="FILE", help="a recording, cut or repeated to each length, for white noise")
    add("--out", type=Path, default=ROOT / "docs" / "benchmarks.md", metavar="FILE", help="docs/benchmarks.md")
    add("--label", help="title of the section: Python and onnxruntime unless given")
    add("--section", type=_slug, help="name of the section to replace: the label's unless given")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--engines", type=Path, metavar="DIR", help="keep our engines there, take those that are; else built anew")
    return parser.parse_args()


if __name__ == "__main__":
    main()
