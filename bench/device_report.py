"""Results of bench.device for people: one in full, and several as a list."""

from __future__ import annotations

from collections.abc import Sequence

from bench.device_results import GOAL_MB, Latency, Result
from bench.report import table

SHOWN_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Lengths that the list has a column for."""
ABSENT = "–"


def listed(results: Sequence[Result]) -> str:
    """Return a row for each result, and then each in full, as Markdown."""
    if not results:
        return "Nobody has sent in a result yet."
    ordered = sorted(results, key=lambda result: (result.machine.name, result.model.name, result.date))
    lengths = [f"{seconds:g} s" for seconds in SHOWN_S]
    head = ("device", "model", "engine", *lengths, "after a pause", "memory", "power", "text", "date")
    rows = [_row(result) for result in ordered]
    intro = "Median milliseconds for one utterance of each length; then what else was measured."
    return "\n\n".join([intro, table(head, rows), *(full(result) for result in ordered)])


def full(result: Result) -> str:
    """Return everything that was measured, as Markdown."""
    title = f"### {_device(result)}: {result.model.name}, {result.engine.name}"
    cases = table(_HEAD, [_case(each) for each in result.latency])
    folded = f"<details><summary>Every case</summary>\n\n{cases}\n\n</details>"
    parts = [title, table(("", ""), _facts(result)), folded]
    if result.left_out:
        parts.append("\n".join(f"* Left out: {reason}" for reason in result.left_out))
    return "\n\n".join(parts)


_HEAD = (
    "audio",
    "batch",
    "CUDA graphs",
    "mapped",
    "runs",
    "tokens",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "floor ms",
    "stages",
)


def _row(result: Result) -> list[str]:
    first = result.latency[0] if result.latency else None
    way = (first.cuda_graphs, first.mapped_memory) if first else None
    medians = {
        each.seconds: f"{each.p50_ms:.1f}"
        for each in result.latency
        if each.batch == 1 and (each.cuda_graphs, each.mapped_memory) == way
    }
    marks = [word for word, true in (("throttled", result.sensors.throttled), ("quick", result.quick)) if true]
    return [
        _device(result) + (f" ({', '.join(marks)})" if marks else ""),
        result.model.name,
        result.engine.name,
        *(medians.get(seconds, ABSENT) for seconds in SHOWN_S),
        _after_pause(result),
        _megabytes(result.memory.total_mb),
        _watts(result.sensors.board_w),
        _same(result),
        result.date,
    ]


def _after_pause(result: Result) -> str:
    if not result.after_idle:
        return ABSENT
    first = result.after_idle[0]
    return f"{first.first_ms:.1f} ({first.seconds:g} s, idle {first.idle_s:g} s)"


def _device(result: Result) -> str:
    return result.machine.known_as or result.machine.name


def _facts(result: Result) -> list[tuple[str, str]]:
    machine, engine, sensors = result.machine, result.engine, result.sensors
    versions = ", ".join(f"{name} {number}" for name, number in result.software.items())
    pauses = "; ".join(
        f"{each.seconds:g} s of audio after {each.idle_s:g} s: {each.first_ms:.1f} ms, then {each.second_ms:.1f} ms"
        for each in result.after_idle
    )
    throttled = {None: "nothing here tells", False: "no", True: "**yes**: the figures are of a machine slowed down"}
    heat = ", ".join(f"{zone} {value:.1f} °C" for zone, value in sensors.highest_c.items())
    rails = ", ".join(f"{rail} {watts:g} W" for rail, watts in sensors.mean_w.items())
    facts = [
        ("date", f"{result.date}{', quick' if result.quick else ''}; load average before {result.load_average:g}"),
        ("machine", machine.name),
        ("processor", f"{machine.cpu}; {machine.cores} cores, {_megabytes(machine.memory_mb)}"),
        ("L4T", machine.l4t or ""),
        ("power mode", machine.power_mode or ""),
        ("governor", ", ".join(machine.governors)),
        ("versions", f"{versions}; kernel {machine.kernel}"),
        ("weights", f"{result.model.weights / 1e6:.1f} million, {engine.megabytes:g} MB on disk"),
        ("engine", f"{engine.target} asked for; {engine.threads or 'default'} threads; self-test: {engine.self_test}"),
        ("built in", "" if engine.build_s is None else f"{engine.build_s:g} s"),
        ("loaded in", f"{engine.load_s:g} s"),
        ("text against fp32", _same(result)),
        ("after a pause", pauses),
        ("memory", _memory(result)),
        ("throttled", throttled[sensors.throttled]),
        ("highest temperatures", heat),
        ("power", f"{rails}{f'; in pauses {sensors.idle_board_w:g} W' if sensors.idle_board_w else ''}"),
        ("GPU clock", "" if sensors.highest_gpu_mhz is None else f"{sensors.highest_gpu_mhz:.0f} MHz at most"),
        ("command", f"`{result.command}`"),
        ("note", result.note),
    ]
    return [(name, text) for name, text in facts if text]


def _memory(result: Result) -> str:
    memory = result.memory
    parts = {"process": memory.resident_mb, "graphics card": memory.gpu_mb, "taken from the machine": memory.taken_mb}
    shown = ", ".join(f"{name} {_megabytes(value)}" for name, value in parts.items() if value is not None)
    return f"{shown} (goal for the large model: {GOAL_MB:.0f} MB)" if shown else ""


def _same(result: Result) -> str:
    check = result.check
    if check is None:
        return "it is fp32"
    same = f"{check.same_tokens} of {check.tokens} tokens in {check.sounds} sounds"
    off = "" if check.largest_difference is None else f", log-probabilities within {check.largest_difference:.2g}"
    return same + off


def _case(each: Latency) -> list[str]:
    stages = ", ".join(f"{name} {ms:.1f}" for name, ms in each.stages_ms.items())
    return [
        f"{each.seconds:g} s",
        str(each.batch),
        _switch(each.cuda_graphs),
        _switch(each.mapped_memory),
        str(each.runs),
        str(each.tokens),
        *(f"{ms:.2f}" for ms in (each.p50_ms, each.p95_ms, each.p99_ms)),
        ABSENT if each.floor_ms is None else f"{each.floor_ms:.2f}",
        stages,
    ]


def _switch(on: bool | None) -> str:
    return ABSENT if on is None else "on" if on else "off"


def _megabytes(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.0f} MB"


def _watts(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f} W"
