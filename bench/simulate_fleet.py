"""A fleet that nobody has yet, simulated: a day of requests to replicas, and devices on one broker.

python -m bench.simulate_fleet --plots docs

Times of work are measured ones (docs/scale.md says where); how they add up is simulated. Same seed, same result.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from bench.fleet_arrivals import DAY_S, HOUR_S, LENGTH_S, PEAK_H, arrivals, clients, lengths, level
from bench.fleet_broker import (
    BROKER_PER_S,
    CONNECTS_PER_S,
    DEVICE_PER_S,
    broker_load,
    measure_broker,
    measure_messages,
    replay,
    storm,
)
from bench.fleet_replicas import COSTS, STALLS, Cost, Setting, Simulation, Stalls, report
from bench.fleet_scaling import Scaling


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for."""

    days: Sequence[int]
    devices: int
    sentences: float
    peak: float
    cost: Cost
    stalls: Stalls | None
    broker_per_s: float
    connects_per_s: float
    seed: int
    quick: bool

    @property
    def hours(self) -> tuple[float, float]:
        """Of the day that are simulated."""
        return (PEAK_H - 0.5, PEAK_H + 0.25) if self.quick else (0.0, 24.0)


Watch = Callable[[str, float], None]
"""Is told what is simulated, and how much of it is done."""


def needed(rate: float, cost: Cost, busy: float = 2 / 3) -> int:
    """Return how many replicas carry a rate when each is so busy, and one that may fail."""
    return math.ceil(rate * cost.ms((LENGTH_S,)) / 1e3 / busy) + 1


def simulate_day(wanted: Wanted, per_day: int, watch: Watch) -> Simulation:
    """Go through a day with autoscaling, and a replica that dies at the peak."""
    rng, hours = np.random.default_rng(wanted.seed), wanted.hours
    times = arrivals(rng, per_day, wanted.peak, hours=hours)
    at_first = float(per_day / DAY_S * level(np.array([hours[0]]), wanted.peak)[0])
    at_peak = needed(per_day / DAY_S * wanted.peak, wanted.cost)
    setting = Setting(
        wanted.cost, Scaling(most=max(10, 2 * at_peak)), replicas=max(2, needed(at_first, wanted.cost)),
        stalls=wanted.stalls, fails_at=PEAK_H * HOUR_S, seed=wanted.seed,
    )  # fmt: skip
    done = Simulation(times, lengths(rng, len(times)), setting)
    return done.run(lambda share: watch(f"{per_day:,} requests a day", share))


def validation(wanted: Wanted, watch: Watch) -> dict[str, Any]:
    """Return what the model says of the run that docs/server-load.md has measured."""
    found: dict[str, Any] = {"measured": {"mean": 175, "p50": 99, "p95": 723, "p99": 1174}}
    for name, stalls in (("quiet", None), ("stalls", STALLS)):
        runs = []
        for seed in range(2 if wanted.quick else 6):
            rng = np.random.default_rng(wanted.seed + seed)
            times = clients(rng, 50, 4.0, 1200)
            setting = Setting(COSTS["large-int8"], replicas=1, stalls=stalls, microphone=True, seed=seed)
            # The recordings of the bundled model are all about as long.
            runs.append(report(Simulation(times, lengths(rng, len(times), 0.18), setting).run())["latency_ms"])
            watch("as measured", (seed + 1) / 6)
        found[name] = {
            key: round(float(np.median([run[key] for run in runs]))) for key in ("mean", "p50", "p95", "p99")
        }
    watch("as measured", 1.0)
    return found


def curve(wanted: Wanted, watch: Watch) -> list[dict[str, Any]]:
    """Return what one replica does at steady rates, in shares of what it can do at most."""
    found, most = [], 1e3 / wanted.cost.ms((LENGTH_S,))
    steps = (0.3, 0.6, 0.9) if wanted.quick else (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
    for done, busy in enumerate(steps):
        rng = np.random.default_rng(wanted.seed)
        times = arrivals(rng, busy * most * DAY_S, peak=1, hours=(0, 1))
        setting = Setting(wanted.cost, replicas=1, stalls=wanted.stalls, warm_up_s=300, seed=wanted.seed)
        found.append({"busy": busy, "per_s": round(busy * most, 1),
                      **report(Simulation(times, lengths(rng, len(times)), setting).run())})  # fmt: skip
        watch("one replica", (done + 1) / len(steps))
    return found


def fleet(wanted: Wanted, watch: Watch) -> dict[str, Any]:
    """Return what the broker of the devices has to do: all day, after a restart, after an hour without it."""
    rows = wanted.sentences * wanted.peak / 24
    load = broker_load(wanted.devices, wanted.sentences, wanted.peak)
    found: dict[str, Any] = {"devices": wanted.devices, "load": load, "storms": {}}
    for number, down_s in enumerate((5.0, 60.0, HOUR_S)):
        found["storms"][f"{down_s:g}"] = storm(wanted.devices, down_s, wanted.connects_per_s, wanted.seed)
        watch("the broker", (number + 1) / 4)
    came = found["storms"][f"{HOUR_S:g}"]["came_s"]
    live = load["peak"]["in_per_s"]
    found["replay"] = replay(came, rows, wanted.broker_per_s, live, DEVICE_PER_S)
    watch("the broker", 1.0)
    return found


def simulate(wanted: Wanted, watch: Watch = lambda name, share: None) -> tuple[dict[str, Any], dict[int, Simulation]]:
    """Return all figures, and the days as they went."""
    days = {per_day: simulate_day(wanted, per_day, watch) for per_day in wanted.days}
    peaks = {per_day: per_day / DAY_S * wanted.peak for per_day in wanted.days}
    figures = {
        "seed": wanted.seed,
        "quick": wanted.quick,
        "cost": dataclasses.asdict(wanted.cost),
        "validation": validation(wanted, watch),
        "replica": curve(wanted, watch),
        "days": {
            str(per_day): {"peak_per_s": round(peaks[per_day], 1), "needed": needed(peaks[per_day], wanted.cost),
                           **report(done)}
            for per_day, done in days.items()
        },
        "fleet": fleet(wanted, watch),
    }  # fmt: skip
    return figures, days


COLOURS = ("#0072b2", "#d55e00", "#009e73")


def draw(folder: Path, figures: dict[str, Any], days: dict[int, Simulation]) -> None:
    """Write the three pictures."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "edge_asr", "font.size": 9, "font.family": "DejaVu Sans"}):
        _draw_replica(folder / "scale-replica.svg", figures["replica"])
        _draw_days(folder / "scale-day.svg", days)
        _draw_storm(folder / "scale-storm.svg", figures["fleet"])


def _panels(path: Path, rows: int, columns: int, height: float) -> Iterator[Any]:
    """Yield the panels of a drawing, and write it when all are drawn."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, height), layout="constrained", facecolor="white")
    for axes in drawing.subplots(rows, columns, squeeze=False).flat:
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    drawing.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _draw_replica(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    for number, axes in enumerate(_panels(path, 1, 2, 3.2)):
        across = [row["per_s"] for row in rows]
        axes.set_xlabel("requests a second, one replica")
        if number:
            axes.plot(across, [100 * row["refused_share"] for row in rows], label="given up", color=COLOURS[1])
            axes.plot(across, [100 * row["busy"]["mean"] for row in rows], label="busy", color=COLOURS[0])
            axes.set_ylabel("%")
            continue
        for share, colour in zip(("p50", "p95", "p99"), COLOURS, strict=True):
            axes.plot(across, [row["latency_ms"][share] for row in rows], label=share, color=colour)
        axes.set_yscale("log")
        axes.set_ylabel("ms from the first request to the answer")


def _draw_days(path: Path, days: dict[int, Simulation]) -> None:
    panels = _panels(path, 2, len(days), 5.0)
    for per_day, done in days.items():
        axes, rows = next(panels), done.rows[::4]
        hours = [row.at / HOUR_S for row in rows]
        per_s = np.diff([row.asked for row in rows], prepend=0) / (4 * done.setting.row_s)
        axes.plot(hours, per_s, color="#bbbbbb", linewidth=0.6)
        axes.set_title(f"{per_day:,} requests a day", fontsize=10)
        axes.set_ylabel("requests a second")
        beside = axes.twinx()
        beside.step(hours, [row.ready for row in rows], color=COLOURS[0])
        beside.set_ylabel("replicas", color=COLOURS[0])
        beside.set_ylim(bottom=0)
    for done in days.values():
        axes, rows = next(panels), done.rows[::4]
        axes.plot([row.at / HOUR_S for row in rows], [row.p95_ms for row in rows], color=COLOURS[1], linewidth=0.6)
        axes.set_yscale("log")
        axes.set_ylabel("p95 of two minutes, ms")
        axes.set_xlabel("hour of the day")
    next(panels, None)


def _draw_storm(path: Path, fleet: dict[str, Any]) -> None:
    for number, axes in enumerate(_panels(path, 1, 2, 3.0)):
        if number:
            axes.plot(fleet["replay"]["rows_per_s"], color=COLOURS[2])
            axes.set_ylabel("transcripts a second, after an hour")
        else:
            for (down_s, found), colour in zip(fleet["storms"].items(), COLOURS, strict=True):
                axes.plot(found["asked_per_s"], color=colour, label=f"away for {down_s} s")
            axes.set_ylabel("connections asked for, a second")
        axes.set_xlabel("seconds since the broker is back")


def show(console: Console, figures: dict[str, Any]) -> None:
    """Print the tables."""
    table = Table("requests a day", "peak/s", "replicas", "p50, p95, p99 ms", "gave up", "busy", title="days")
    for name, day in figures["days"].items():
        times, replicas = day["latency_ms"], day["replicas"]
        table.add_row(
            f"{int(name):,}", f"{day['peak_per_s']:.1f}", f"{replicas['least']} to {replicas['most']}",
            f"{times['p50']:.0f}, {times['p95']:.0f}, {times['p99']:.0f}", f"{100 * day['refused_share']:.3f} %",
            f"{100 * day['busy']['mean']:.0f} %",
        )  # fmt: skip
    console.print(table)
    fleet = figures["fleet"]
    table = Table(
        "broker away", "asked/s at most", "50 %, 95 %, all are back, s", title=f"{fleet['devices']:,} devices"
    )
    for down_s, found in fleet["storms"].items():
        back = ", ".join(f"{value:.0f}" for value in found["back_s"].values())
        table.add_row(f"{down_s} s", str(found["asked_per_s_most"]), back)
    console.print(table)
    mean, peak = (fleet["load"][when] for when in ("mean", "peak"))
    console.print(
        f"broker: {mean['in_per_s']} messages a second, {peak['in_per_s']} at the peak ({peak['in_kb_per_s']} kB)"
    )
    console.print(f"outboxes: {fleet['replay']['rows']:,} transcripts in {fleet['replay']['drained_s']} s")


def _stalls(given: str) -> Stalls | None:
    if given == "none":
        return None
    try:
        every_s, for_s = map(float, given.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given}: give EVERY:FOR in seconds, or none") from None
    if every_s <= 0 or for_s < 0:
        raise argparse.ArgumentTypeError(f"{given}: seconds are positive")
    return Stalls(every_s, for_s)


def _cost(given: str) -> Cost:
    return COSTS[given] if given in COSTS else Cost.parse(given)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulate_fleet", description=__doc__)
    parser.add_argument(
        "--requests-per-day", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000], metavar="N"
    )
    parser.add_argument("--devices", type=int, default=10_000, help="appliances with microphones, on one broker")
    parser.add_argument("--sentences", type=float, default=100.0, help="of a device a day")
    parser.add_argument("--peak", type=float, default=10.0, help="rate at the peak, of the mean of the day")
    parser.add_argument("--cost", type=_cost, default="large-int8",
                        help=f"{', '.join(COSTS)}, or ms as REQUEST:RUN:SECOND[:SHARE:MOST]")  # fmt: skip
    parser.add_argument("--stalls", type=_stalls, default=STALLS, metavar="EVERY:FOR",
                        help="a replica stands still each EVERY s, for FOR s at the mean; none: never")  # fmt: skip
    parser.add_argument(
        "--broker-per-s", type=float, default=BROKER_PER_S, help="messages of QoS 1 that the broker takes"
    )
    parser.add_argument(
        "--connects-per-s", type=float, default=CONNECTS_PER_S, help="connections that the broker takes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="three quarters of an hour round the peak, and less of all"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the pictures there; needs matplotlib")
    parser.add_argument("--measure", action="store_true", help="measure messages and Mosquitto here instead (4 min)")
    return parser.parse_args(given)


def measure() -> dict[str, Any]:
    """Return what the simulation of the broker stands on."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="edge_asr-fleet-") as folder:
        found["speaking"] = asyncio.run(measure_messages(60, Path(folder)))
        found["silent"] = asyncio.run(measure_messages(120, Path(folder), silent=True))
        found["broker"] = asyncio.run(measure_broker(10, 1_570, Path(folder)))
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Simulate, and show or print it."""
    options = arguments(given)
    if options.measure:
        print(json.dumps(measure()))
        return 0
    wanted = Wanted(
        options.requests_per_day, options.devices, options.sentences, options.peak, options.cost, options.stalls,
        options.broker_per_s, options.connects_per_s, options.seed, options.quick,
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=options.json) as progress:
        tasks: dict[str, TaskID] = {}

        def watch(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=1.0)
            progress.update(tasks[name], completed=share)

        figures, days = simulate(wanted, watch)
    if options.plots:
        draw(options.plots, figures, days)
    if options.json:
        print(json.dumps(figures))
    else:
        show(Console(), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
