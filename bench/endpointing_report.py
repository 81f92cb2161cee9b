"""Run the simulation of endpointing on sentences that nothing was chosen on; write its sections and its picture.

python -m bench.endpointing_report --out docs/latency.md [--recordings FOLDER]
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from bench.endpointing import Heard, Listening, Recognizer
from bench.paused import COMMANDS, Tape, recorded, synthetic
from bench.report import table, update
from edge_asr.budget import percentiles
from edge_asr.loader import load_whole
from edge_asr.recognizer.bundle import read_bundle
from edge_asr.speech.completeness import Completeness, ContentEndpoint, normalize
from edge_asr.speech.energy import end_of_sound
from edge_asr.speech.segmenter import ENDPOINTS, Rules
from edge_asr.speech.vad import SileroDetector, SteadyDetector
from edge_asr.types import CHUNK_SAMPLES

BUNDLE = Path(__file__).resolve().parent.parent / "engines" / "paraformer-tiny"
SECTION = "cut-rate"
SWEEP = range(3, 26)
SEED = 2
"""Of the sentences that are reported; nothing was chosen on them."""
ALONE, STEADY = "Silero alone", "by the level too"
COLOURS = {(ALONE, False): "#d55e00", (ALONE, True): "#eaae80", (STEADY, False): "#0072b2", (STEADY, True): "#009e73"}
NOISES_DB = (40, 30, 20, 15)
HEAD = (
    "end of speech", "preset", "content", "pauses cut", "sentences cut", "`endpoint_ms` p50", "p95", "`total_ms` p50",
    "p95", "p99", "decode at the pause is the final", "end lost",
)  # fmt: skip

Sets = Mapping[str, Sequence[Listening]]


@dataclass(frozen=True, slots=True)
class Figures:
    """What a set of sentences comes to under some rules."""

    pauses_cut: float
    sentences_cut: float
    endpoint_ms: Mapping[str, float | None]
    total_ms: Mapping[str, float | None]
    at_pause: float
    lost: int


def figures(heard: Sequence[Heard]) -> Figures:
    """Sum up; percentiles are over all sentences whose end was found, cut or not."""
    cuts = [cut for one in heard for cut in one.cut]
    found = [one for one in heard if one.endpoint_ms is not None and one.total_ms is not None]
    return Figures(
        pauses_cut=_share(cuts),
        sentences_cut=_share([any(one.cut) or one.elsewhere > 0 for one in heard]),
        endpoint_ms=percentiles(one.endpoint_ms or 0.0 for one in found),
        total_ms=percentiles(one.total_ms or 0.0 for one in found),
        at_pause=_share([one.at_pause for one in found]),
        lost=len(heard) - len(found),
    )


def _share(found: Sequence[bool]) -> float:
    return sum(found) / max(1, len(found))


def run(listening: Iterable[Listening], endpoint: int, content: ContentEndpoint | None) -> Figures:
    """Hear every tape."""
    return figures([one.hear(Rules(endpoint=endpoint), content) for one in listening])


def presets(sets: Sets) -> str:
    """Return the table of presets: content not looked at, looked at, looked at with every sentence listed."""
    rows = []
    for detector, listening in sets.items():
        phrases = frozenset(normalize(one.tape.text) for one in listening)
        for preset, chunks in ENDPOINTS.items():
            known = ("on, all are known phrases", ContentEndpoint(chunks, phrases))
            for name, content in (("off", None), ("on", ContentEndpoint(chunks)), known):
                rows.append([detector, preset, name, *cells(run(listening, chunks, content))])
    return table(HEAD, rows)


def cells(found: Figures) -> list[str]:
    """Return a row of the table."""
    wanted = (found.endpoint_ms["p50"], found.endpoint_ms["p95"], *(found.total_ms[p] for p in ("p50", "p95", "p99")))
    milliseconds = ["" if value is None else f"{value:.0f}" for value in wanted]
    return [percent(found.pauses_cut), percent(found.sentences_cut), *milliseconds, percent(found.at_pause),
            str(found.lost)]  # fmt: skip


def percent(share: float) -> str:
    """Return a share with one decimal."""
    return f"{100 * share:.1f} %"


def judgements(listening: Iterable[Listening]) -> str:
    """Return the table of what texts were judged to be, inside sentences and at their ends."""
    counted = Counter(pair for one in listening for pair in one.judgements(ContentEndpoint(ENDPOINTS["aggressive"])))
    rows = []
    for at_end, name in ((False, "at pauses inside"), (True, "at ends")):
        total = max(1, sum(counted[at_end, kind] for kind in Completeness))
        rows.append([name, str(total), *(percent(counted[at_end, kind] / total) for kind in Completeness)])
    whole, wrong = counted[True, Completeness.COMPLETE], counted[False, Completeness.COMPLETE]
    precision = f"Of what was judged complete, {percent(whole / max(1, whole + wrong))} was."
    return f"{table(('', 'decodes', *(kind.value for kind in Completeness)), rows)}\n\n{precision}"


def lags(sets: Sets) -> str:
    """Return the table of how late speech is seen to end, by voice."""
    chunks = ENDPOINTS["default"]
    rows = []
    for name, listening in sets.items():
        by_voice: dict[str, list[float]] = {}
        for one in listening:
            ended = one.hear(Rules(endpoint=chunks), None).endpoint_ms
            if ended is not None:
                by_voice.setdefault(one.tape.voice, []).append(ended - chunks * 32)
        everything = [lag for lags in by_voice.values() for lag in lags]
        for voice, found in [("all", everything), *sorted(by_voice.items())]:
            shares = percentiles(found)
            rows.append([name, voice, *(f"{shares[share]:.0f}" for share in ("p50", "p95", "p99"))])
    return table(("", "voice", "p50, ms", "p95", "p99"), rows)


def noises(folder: Path, count: int, recognizer: Recognizer) -> str:
    """Return the table of what noise does: to cuts, to latency, to the end of sound."""
    rows = []
    for below_db in NOISES_DB:
        tapes = list(synthetic(folder, count, COMMANDS, True, below_db, seed=below_db))
        for name, detector in ((ALONE, SileroDetector()), (STEADY, SteadyDetector(SileroDetector()))):
            listening = [Listening(tape, detector, recognizer) for tape in tapes]
            row = [f"{below_db} dB", name]
            for preset in ("aggressive", "default"):
                found = run(listening, ENDPOINTS[preset], ContentEndpoint(ENDPOINTS[preset]))
                row += [percent(found.pauses_cut), *(f"{found.total_ms[share]:.0f}" for share in ("p50", "p95"))]
            rows.append([*row, *end_errors(listening)])
    head = ("noise below speech", "end of speech", "aggressive: pauses cut", "`total_ms` p50", "p95",
            "default: pauses cut", "`total_ms` p50", "p95", "error of `end_of_sound`, ms: p50", "p95")  # fmt: skip
    return table(head, rows)


def end_errors(listening: Iterable[Listening]) -> list[str]:
    """Return how far `end_of_sound` is from the end, in milliseconds: p50 and p95 of the distance."""
    distances = []
    for one in listening:
        start, end = one.hear(Rules(), None).segment
        if end:
            sound = one.tape.samples[start * CHUNK_SAMPLES : end * CHUNK_SAMPLES]
            distances.append(abs(start * CHUNK_SAMPLES + end_of_sound(sound) - one.tape.end) / 16)
    found = percentiles(distances)
    return [f"{found[share]:.0f}" for share in ("p50", "p95")]


def draw(path: Path, sets: Sets) -> None:
    """Write the curve of the cut rate against `total_ms`, p50 and p95; dots are the presets."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    curves = {
        (name, content): [run(listening, n, ContentEndpoint(n) if content else None) for n in SWEEP]
        for name, listening in sets.items()
        for content in (False, True)
    }
    with mpl.rc_context({"svg.hashsalt": "edge_asr", "font.size": 9, "font.family": "DejaVu Sans"}):
        drawing = Figure(figsize=(9, 4.2), layout="constrained", facecolor="white")
        for axes, share in zip(drawing.subplots(1, 2, sharey=True), ("p50", "p95"), strict=True):
            for key, found in curves.items():
                across, up = [one.total_ms[share] for one in found], [100 * one.pauses_cut for one in found]
                label = f"{key[0]}, content {'on' if key[1] else 'off'}"
                axes.plot(across, up, label=label, color=COLOURS[key], linewidth=1.6)
                at = [n - SWEEP[0] for n in ENDPOINTS.values()]
                axes.plot([across[n] for n in at], [up[n] for n in at], "o", color=COLOURS[key], markersize=4)
            axes.axhline(2, color="#999999", linewidth=0.8, linestyle=":")
            axes.axhline(5, color="#999999", linewidth=0.8, linestyle=":")
            axes.set_xlabel(f"total_ms, {share}")
            axes.set_xlim(150, 950)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        drawing.axes[0].set_ylabel("pauses of 200-450 ms that end the segment, %")
        drawing.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def section(sets: Mapping[str, Sets], picture: str, noise: str, fresh: float, conditions: str) -> str:
    """Return the section of the document."""
    commands = sets["commands"]
    parts = [
        "## Cut rate against latency",
        conditions,
        f"![Cut rate against total_ms]({picture})",
        "Dots are the presets; the dotted lines are 2 % and 5 %.",
    ]
    for name, detectors in sets.items():
        pauses = sum(len(one.tape.pauses) for one in detectors[STEADY])
        parts.append(f"### {name}: {len(detectors[STEADY])} sentences, {pauses} pauses")
        parts.append(presets(detectors))
    parts += [
        f"Final texts equal to a fresh decode of the segment: {percent(fresh)} (commands, aggressive, content on).",
        "### What the text at a pause was judged to be (commands)",
        judgements(commands[STEADY]),
        "### From the end of sound to the end of the last chunk of speech",
        lags(commands),
        "### Noise (content on)",
        noise,
    ]
    return "\n\n".join(parts)


def _options() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, help="the document of which this writes a section")
    arguments.add_argument("--sentences", type=int, default=400, help="commands; a quarter as many are numbers")
    arguments.add_argument("--noise-db", type=float, default=30.0, help="noise below speech")
    arguments.add_argument("--recordings", type=Path, help="folder of recordings of people with transcripts.tsv")
    arguments.add_argument("--date", default=f"{datetime.now(timezone.utc):%Y-%m-%d}")
    return arguments.parse_args()


def _transcribed(folder: Path) -> dict[Path, str]:
    lines = (folder / "transcripts.tsv").read_text(encoding="utf-8").splitlines()
    return {folder / name: text for name, text in (line.split("\t") for line in lines)}


def _tapes(folder: Path, options: argparse.Namespace) -> dict[str, list[Tape]]:
    count = options.sentences
    found = {
        "commands": list(synthetic(folder, count, COMMANDS, True, options.noise_db, SEED)),
        "numbers": list(synthetic(folder, count // 4, ("number", "digits"), True, options.noise_db, SEED)),
        "the bundled samples": list(recorded(_transcribed(BUNDLE / "samples"))),
    }
    if options.recordings is not None:
        found["people"] = list(recorded(_transcribed(options.recordings)))
    return found


def _conditions(options: argparse.Namespace) -> str:
    command = " ".join(["python -m bench.endpointing_report", *(_named(argument) for argument in sys.argv[1:])])
    rows = [
        ("date", options.date),
        ("machine", f"{platform.machine()}, {os.cpu_count()} logical cores; no real time: decodes are timed"),
        ("model", "the bundled one, whole, one thread"),
        ("noise", f"pink, {options.noise_db:g} dB below speech; 40 dB where recordings bring their own"),
        ("pauses", "1 or 2 a sentence, 200 to 450 ms, uniform, between words; in recordings where it is quietest"),
        ("command", f"`{command}`"),
    ]
    return table(("", ""), rows)


def _named(argument: str) -> str:
    return Path(argument).name if argument.startswith("/") else argument


def main() -> None:
    """Measure and write."""
    options = _options()
    recognizer = load_whole(read_bundle(BUNDLE), threads=1)
    with tempfile.TemporaryDirectory() as folder:
        sets: dict[str, dict[str, list[Listening]]] = {}
        for name, tapes in _tapes(Path(folder), options).items():
            sets[name] = {
                ALONE: [Listening(tape, SileroDetector(), recognizer) for tape in tapes],
                STEADY: [Listening(tape, SteadyDetector(SileroDetector()), recognizer) for tape in tapes],
            }
        noise = noises(Path(folder), options.sentences // 2, recognizer)
    commands = sets["commands"]
    chunks = ENDPOINTS["aggressive"]
    heard = [(one, one.hear(Rules(endpoint=chunks), ContentEndpoint(chunks))) for one in commands[STEADY]]
    fresh = _share([one.fresh(found) for one, found in heard if found.endpoint_ms is not None])
    picture = options.out.with_name(f"{options.out.stem}-cut-rate.svg")
    draw(picture, commands)
    text = section(sets, picture.name, noise, fresh, _conditions(options))
    document = options.out.read_text(encoding="utf-8") if options.out.exists() else "# Latency\n"
    options.out.write_text(update(document, SECTION, text), encoding="utf-8")


if __name__ == "__main__":
    main()
