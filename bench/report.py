"""The report: a section of Markdown for each run, and its plot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results import FIRST_S, MEMORY_S, OURS, SHERPA_INT8, Bar, Case, Results, bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ABOUT = "about this file"
"""The section that every run writes anew: what the file is. Names of other sections have no spaces."""
ABOUT_TEXT = """\
# Benchmarks

Written by `bench/against_peers.py`; a run replaces its own section and leaves the others.

Everybody gets the same bundle and the same samples, and is timed from samples to text, features included. Each
contestant is a process of its own, because they bring different builds of onnxruntime. All are loaded, then they
take turns, and only one works at a time: a round is one recognition by each, in an order that rotates, so that
whatever slows the machine down for a while slows everybody down. The first round of a length warms up and does not
count. `edge_asr` runs engines that it built from the bundle, sherpa-onnx and funasr-onnx run the published graphs,
all of them with their defaults apart from the number of threads. funasr-onnx adds dither to its features unless the
bundle's configuration forbids it, and leaves the last token out where `predictor_bias` is 1: its text may differ.
"""
UNITS = "ms"
PALETTE = {
    "edge_asr int8": "#0072b2",
    "edge_asr fp32": "#7fb8dc",
    "sherpa-onnx int8": "#d55e00",
    "sherpa-onnx fp32": "#eaae80",
    "funasr-onnx int8": "#009e73",
    "funasr-onnx fp32": "#80ceb9",
}


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Under which conditions a run took place."""

    date: str
    label: str
    section: str
    bundle: str
    sound: str
    machine: str
    cores: int
    load_average: float
    python: str
    command: str
    rounds: int
    pinned: bool


def update(document: str, section: str, text: str) -> str:
    """Return a document in which a section has this text: in its old place, or at the end."""
    start, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    block = f"{start}\n{text.strip()}\n{end}"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(document):
        return pattern.sub(lambda _: block, document, count=1)
    before = document.strip()
    return f"{before}\n\n{block}\n" if before else f"{block}\n"


def write(out: Path, results: Results, circumstances: Circumstances) -> Path:
    """Put a run's section into the file `out`, and its plot beside it; return the plot."""
    out.parent.mkdir(parents=True, exist_ok=True)
    plot = out.with_name(f"{out.stem}-{circumstances.section}.svg")
    draw(plot, results)
    document = out.read_text(encoding="utf-8") if out.exists() else ""
    document = update(document, ABOUT, ABOUT_TEXT)
    document = update(document, circumstances.section, section(results, circumstances, plot.name))
    out.write_text(document, encoding="utf-8")
    return plot


def section(results: Results, circumstances: Circumstances, plot: str) -> str:
    """Return a run's Markdown."""
    parts = [
        f"## {circumstances.label}",
        _conditions(results, circumstances),
        f"![Median milliseconds of each contestant at each length]({plot})",
        *(_times(results, threads) for threads in results.threads),
        _memory(results),
        _bars(bars(results)),
        _details(results),
    ]
    return "\n\n".join(parts)


def _conditions(results: Results, circumstances: Circumstances) -> str:
    pinned = "pinned to as many cores as there are threads" if circumstances.pinned else "not pinned"
    quiet = results.quiet_share()
    rows = [
        ("date", circumstances.date),
        ("bundle", circumstances.bundle),
        ("sound", circumstances.sound),
        ("machine", f"{circumstances.machine}; {circumstances.cores} logical cores"),
        ("load average before the run", f"{circumstances.load_average:.2f}"),
        *([("share of the time on 1 thread that it ran", f"{quiet:.1%}")] if quiet is not None else []),
        ("Python", circumstances.python),
        *((project, _versions(project, versions)) for project, versions in results.versions.items()),
        ("runs", f"{circumstances.rounds} rounds after one that warms up; processes {pinned}"),
        ("command", f"`{circumstances.command}`"),
    ]
    return table(("", ""), rows)


def _versions(project: str, versions: Mapping[str, str]) -> str:
    others = ", ".join(f"{name} {number}" for name, number in versions.items() if name != project)
    return f"{versions[project]} with {others}"


def _times(results: Results, threads: int) -> str:
    title = f"### {threads} thread{'s' if threads > 1 else ''}: median {UNITS}"
    lengths = results.seconds
    rows = [(name, *_medians(results, name, threads)) for name in results.contestants]
    fastest = [_fastest(results, threads, seconds) for seconds in lengths]
    sherpa = [_times_as_long(results.ratio(SHERPA_INT8, threads, seconds)) for seconds in lengths]
    rows += [(f"fastest peer / {OURS}", *fastest), (f"{SHERPA_INT8} / {OURS}", *sherpa)]
    parts = [title, table(("", *(f"{seconds:g} s" for seconds in lengths)), rows)]
    return "\n\n".join(parts)


def _medians(results: Results, name: str, threads: int) -> list[str]:
    """Return a contestant's row; what is missing says why."""
    cells = [_number(results.median_ms(name, threads, seconds)) for seconds in results.seconds]
    if "" not in cells:
        return cells
    first = cells.index("")
    return [_reason(results, name, threads) if number == first else cell for number, cell in enumerate(cells)]


def _reason(results: Results, name: str, threads: int) -> str:
    found = [out.reason for out in results.left_out if (out.contestant, out.threads) == (name, threads)]
    return f"left out: {without_folders(found[0])}" if found else "not measured"


def without_folders(text: str) -> str:
    """Return a message in which absolute paths are names only: where files lie concerns no reader."""
    return re.sub(r"(?<![\w.:/])(?:/[^\s/'\":,]+)*/([^\s/'\":,]+)", r"\1", text)


def _fastest(results: Results, threads: int, seconds: float) -> str:
    fastest = results.fastest_peer(threads, seconds)
    ratio = results.ratio_of_fastest(threads, seconds)
    return f"{_times_as_long(ratio)} ({fastest.contestant})" if fastest and ratio is not None else ""


def _memory(results: Results) -> str:
    threads = min(results.threads)
    lengths = results.seconds
    title = (
        f"### Memory and load, {threads} thread{'s' if threads > 1 else ''}\n\nMB of resident memory at its peak:"
        " while loading, then while recognising so many seconds, in this order in one process. ms from the start of"
        f" the process until it can answer, and until it has answered for the first time, {FIRST_S:g} s of audio,"
        " with its files in the file cache."
    )
    head = (
        "",
        "load, ms",
        "first answer, ms",
        "load, MB",
        *(f"{seconds:g} s" for seconds in lengths),
        f"memory run, {MEMORY_S:g} s",
    )
    return f"{title}\n\n{table(head, [_memory_row(results, name, threads) for name in results.contestants])}"


def _memory_row(results: Results, name: str, threads: int) -> list[str]:
    load = results.load(name, threads)
    if load is None:
        return [name, _reason(results, name, threads)]
    cases = [results.case(name, threads, seconds) for seconds in results.seconds]
    cases.append(next((case for case in results.memory if case.contestant == name), None))
    started = [f"{value:.0f}" for value in (load.ms, load.first_answer_ms, load.peak_mb)]
    return [name, *started, *(f"{case.peak_mb:.0f}" if case else "" for case in cases)]


def _bars(found: Iterable[Bar]) -> str:
    verdicts = {True: "reached", False: "missed", None: "not measured"}
    rows = [(bar.what, bar.wanted, bar.measured, verdicts[bar.reached]) for bar in found]
    text = f"### The project's own bars\n\nOf {OURS}; `x` is how many times longer the other one takes."
    return f"{text}\n\n{table(('', 'wanted', 'measured', ''), rows)}"


def _details(results: Results) -> str:
    head = ("", "threads", "audio", "median", "minimum", "IQR", "tokens", "characters", "features", "encoder", "CIF",
            "decoder", "outside the networks")  # fmt: skip
    details = table(head, [_detail(case) for case in results.cases])
    return (
        f"<details><summary>Every case: {UNITS}, interquartile range, what was found, stages</summary>"
        f"\n\n{details}\n\n</details>"
    )


def _detail(case: Case) -> list[str]:
    stages = case.stages_ms
    share = case.outside_share
    return [
        case.contestant, str(case.threads), f"{case.seconds:g} s", _number(case.median_ms), _number(case.min_ms),
        _number(case.iqr_ms), str(case.runs[-1].tokens), str(case.runs[-1].characters),
        *(f"{stages[name]:.2f}" if name in stages else "" for name in ("features", "encoder", "cif", "decoder")),
        "" if share is None else f"{share:.2%}",
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _times_as_long(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; short rows are filled up."""
    filled = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    lines = [list(head), ["---"] * len(head), *filled]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def draw(path: Path, results: Results) -> None:
    """Write the plot: a panel for each number of threads, at each length a bar for each contestant."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "edge_asr", "font.size": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9, 3.2 * len(results.threads)), layout="constrained", facecolor="white")
        panels = figure.subplots(len(results.threads), 1, squeeze=False)[:, 0]
        for axes, threads in zip(panels, results.threads, strict=True):
            _panel(axes, results, threads)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _panel(axes: Axes, results: Results, threads: int) -> None:
    width = 0.84 / len(results.contestants)
    for number, name in enumerate(results.contestants):
        offset = (number - (len(results.contestants) - 1) / 2) * width
        places = [index + offset for index in range(len(results.seconds))]
        heights = [results.median_ms(name, threads, seconds) or 0.0 for seconds in results.seconds]
        drawn = axes.bar(places, heights, width * 0.94, label=name, color=PALETTE.get(name, "#999999"))
        axes.bar_label(drawn, [f"{height:.0f}" if height else "" for height in heights], fontsize=7, padding=1)
    axes.set_xticks(range(len(results.seconds)), [f"{seconds:g} s of audio" for seconds in results.seconds])
    axes.set_ylabel(f"median {UNITS}")
    axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
