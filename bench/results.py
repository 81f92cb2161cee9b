"""What was measured, and what follows from it: medians, ratios, and the bars that the project has set itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

OURS, OURS_FP32, SHERPA_INT8 = "edge_asr int8", "edge_asr fp32", "sherpa-onnx int8"
NETWORKS = ("encoder", "decoder")
MEMORY_S = 30.0
"""How much audio memory is measured with: the longest segment that can be configured."""
FIRST_S = 2.0
"""How much audio the first answer is for."""

AGAINST_SHERPA = 3.0
AGAINST_FASTEST = 2.5
AGAINST_FASTEST_SHORT = 1.8
AGAINST_FASTEST_ON_TWO = 1.8
LONG_S, SHORT_S = 10.0, (2.0, 5.0)
OUTSIDE_SHARE = 0.03
INT8_MEMORY, FP32_MEMORY, MEMORY_BASE_MB = 2.2, 1.7, 150.0
"""How many times the published graph's size, and megabytes on top."""
FIRST_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Run:
    """One recognition."""

    ms: float
    tokens: int
    characters: int
    peak_mb: float
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    processor_ms: float | None = None
    """Of all threads together."""

    @property
    def outside_share(self) -> float | None:
        """The share of the time that was spent outside the two networks; None where stages are not known."""
        if not all(network in self.stages_ms for network in NETWORKS):
            return None
        return 1 - sum(self.stages_ms[network] for network in NETWORKS) / self.ms


@dataclass(frozen=True, slots=True)
class Case:
    """A contestant on a number of threads and a length of audio."""

    contestant: str
    threads: int
    seconds: float
    runs: tuple[Run, ...]

    @property
    def times_ms(self) -> list[float]:
        """Of every run."""
        return [run.ms for run in self.runs]

    @property
    def median_ms(self) -> float:
        """Of all runs."""
        return statistics.median(self.times_ms)

    @property
    def min_ms(self) -> float:
        """Of all runs."""
        return min(self.times_ms)

    @property
    def iqr_ms(self) -> float:
        """The interquartile range: how far the middle half of the runs is spread."""
        if len(self.runs) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.times_ms, n=4, method="inclusive")
        return third - first

    @property
    def peak_mb(self) -> float:
        """The most memory of any run."""
        return max(run.peak_mb for run in self.runs)

    @property
    def stages_ms(self) -> dict[str, float]:
        """The median of each stage; empty where the contestant tells none."""
        names = self.runs[0].stages_ms
        return {name: statistics.median(run.stages_ms.get(name, 0.0) for run in self.runs) for name in names}

    @property
    def outside_share(self) -> float | None:
        """The median share of the time that was spent outside the two networks."""
        shares = [share for run in self.runs if (share := run.outside_share) is not None]
        return statistics.median(shares) if shares else None


@dataclass(frozen=True, slots=True)
class Load:
    """The start of a contestant."""

    contestant: str
    threads: int
    ms: float
    """From the process's start until it can answer."""
    peak_mb: float
    """Until then."""
    first_answer_ms: float
    """From the process's start until it has recognised FIRST_S of audio for the first time."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A contestant that is missing from the tables, and why."""

    contestant: str
    threads: int
    reason: str


@dataclass(slots=True)
class Results:
    """Everything that one run of the bench has measured."""

    contestants: Sequence[str]
    threads: Sequence[int]
    seconds: Sequence[float]
    cases: list[Case] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    memory: list[Case] = field(default_factory=list)
    """One run with MEMORY_S of audio for each contestant, on the fewest threads."""
    left_out: list[LeftOut] = field(default_factory=list)
    graph_mb: dict[str, float] = field(default_factory=dict)
    """Size of the published graph that each of our engines was built of."""
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of each project: itself and what it computes with."""

    def case(self, contestant: str, threads: int, seconds: float) -> Case | None:
        """Return a case; None where it was not measured."""
        wanted = (contestant, threads, seconds)
        return next((case for case in self.cases if (case.contestant, case.threads, case.seconds) == wanted), None)

    def load(self, contestant: str, threads: int) -> Load | None:
        """Return how a contestant started; None where that was not measured."""
        return next((load for load in self.loads if (load.contestant, load.threads) == (contestant, threads)), None)

    def median_ms(self, contestant: str, threads: int, seconds: float) -> float | None:
        """Return the median of a case; None where it was not measured."""
        case = self.case(contestant, threads, seconds)
        return case.median_ms if case else None

    def fastest_peer(self, threads: int, seconds: float) -> Case | None:
        """Return the case of whoever is fastest but us; None where no peer was measured."""
        peers = [case for name in self.peers if (case := self.case(name, threads, seconds))]
        return min(peers, key=lambda case: case.median_ms, default=None)

    @property
    def peers(self) -> list[str]:
        """Everybody but us."""
        return [name for name in self.contestants if name not in (OURS, OURS_FP32)]

    def ratio(self, peer: str, threads: int, seconds: float) -> float | None:
        """Return how many times longer a peer takes than we do in int8."""
        return _quotient(self.median_ms(peer, threads, seconds), self.median_ms(OURS, threads, seconds))

    def ratio_of_fastest(self, threads: int, seconds: float) -> float | None:
        """Return how many times longer the fastest peer takes than we do in int8."""
        fastest = self.fastest_peer(threads, seconds)
        return _quotient(fastest.median_ms if fastest else None, self.median_ms(OURS, threads, seconds))

    def gain_of_two_threads(self, seconds: float) -> float | None:
        """Return how many times faster we are on two threads than on one."""
        return _quotient(self.median_ms(OURS, 1, seconds), self.median_ms(OURS, 2, seconds))

    def quiet_share(self) -> float | None:
        """Return for how much of the time on one thread that thread ran: less than 1 where others took the core."""
        runs = [run for case in self.cases if case.threads == 1 for run in case.runs]
        shares = [run.processor_ms / run.ms for run in runs if run.processor_ms is not None]
        return min(1.0, statistics.fmean(shares)) if shares else None

    def peak_mb(self, contestant: str) -> float | None:
        """Return the most memory that a contestant ever needs for MEMORY_S of audio, loading included."""
        case = next((case for case in self.memory if case.contestant == contestant), None)
        if case is None:
            return None
        load = self.load(contestant, case.threads)
        return max(case.peak_mb, load.peak_mb if load else 0.0)


@dataclass(frozen=True, slots=True)
class Bar:
    """What the project wants of itself, and what came out."""

    what: str
    wanted: str
    measured: str
    reached: bool | None
    """None: not measured."""


def bars(results: Results) -> list[Bar]:
    """Hold the results against the project's bars."""
    on_one = [
        _at_least(f"{LONG_S:g} s, 1 thread: {SHERPA_INT8}", AGAINST_SHERPA, results.ratio(SHERPA_INT8, 1, LONG_S)),
        _at_least(f"{LONG_S:g} s, 1 thread: fastest peer", AGAINST_FASTEST, results.ratio_of_fastest(1, LONG_S)),
        *(
            _at_least(f"{s:g} s, 1 thread: fastest peer", AGAINST_FASTEST_SHORT, results.ratio_of_fastest(1, s))
            for s in SHORT_S
        ),
    ]
    lengths = (*SHORT_S, LONG_S)
    return [
        *on_one,
        *_each(lengths, lambda s: _at_least(
            f"{s:g} s, 2 threads: fastest peer on 2", AGAINST_FASTEST_ON_TWO, results.ratio_of_fastest(2, s))),
        *_each(lengths, lambda s: _at_least(
            f"{s:g} s: 2 threads, never slower than 1", 1.0, results.gain_of_two_threads(s))),
        *_each(lengths, lambda s: _outside(results, s)),
        _memory(results, OURS, "int8", INT8_MEMORY),
        _memory(results, OURS_FP32, "fp32", FP32_MEMORY),
        _first_answer(results),
    ]  # fmt: skip


def _each(lengths: Iterable[float], bar: Callable[[float], Bar]) -> list[Bar]:
    return [bar(seconds) for seconds in lengths]


def _at_least(what: str, wanted: float, measured: float | None) -> Bar:
    reached = None if measured is None else measured >= wanted
    return Bar(what, f"at least {wanted:g} x", "" if measured is None else f"{measured:.2f} x", reached)


def _outside(results: Results, seconds: float) -> Bar:
    case = results.case(OURS, 1, seconds)
    share = case.outside_share if case else None
    measured, reached = ("", None) if share is None else (f"{share:.2%}", share < OUTSIDE_SHARE)
    return Bar(f"{seconds:g} s, 1 thread: outside the two networks", f"below {OUTSIDE_SHARE:.0%}", measured, reached)


def _memory(results: Results, contestant: str, precision: str, factor: float) -> Bar:
    """Hold our memory against the size of the graph that was published in this precision."""
    ours, size = results.peak_mb(contestant), results.graph_mb.get(contestant)
    what = f"memory with {MEMORY_S:g} s, {contestant}"
    if ours is None or size is None:
        return Bar(what, f"at most {factor:g} x the {precision} graph + {MEMORY_BASE_MB:g} MB", "", None)
    limit = factor * size + MEMORY_BASE_MB
    return Bar(
        what, f"at most {limit:.0f} MB ({factor:g} x {size:.0f} + {MEMORY_BASE_MB:g})", f"{ours:.0f} MB", ours <= limit
    )


def _first_answer(results: Results) -> Bar:
    """Hold our start against what somebody waits for: loading, and the first recognition, which takes longer."""
    load = results.load(OURS, min(results.threads))
    what, wanted = f"start to first answer for {FIRST_S:g} s, {OURS}", f"below {FIRST_ANSWER_S:g} s"
    if load is None:
        return Bar(what, wanted, "", None)
    seconds = load.first_answer_ms / 1e3
    return Bar(what, wanted, f"{seconds:.2f} s", seconds < FIRST_ANSWER_S)


def _quotient(dividend: float | None, divisor: float | None) -> float | None:
    return None if dividend is None or divisor is None else dividend / divisor
