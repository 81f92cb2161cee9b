"""The bench against peers: what follows from its measurements, and how a contestant's start is measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from bundled import BUNDLE

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench is not part of the package

from bench import measure, report
from bench.contestants import EDGE_ASR, INT8
from bench.results import OURS, OURS_FP32, SHERPA_INT8, Bar, Case, LeftOut, Load, Results, Run, bars
from edge_asr.recognizer.bundle import read_bundle

FP32_PEER = "funasr-onnx fp32"
STAGES = {"features": 0.2, "encoder": 70.0, "cif": 0.3, "decoder": 28.0}
CIRCUMSTANCES = report.Circumstances(
    date="2026-11-22", label="A label", section="a-label", bundle="tiny", sound="white noise", machine="a machine",
    cores=2, load_average=0.0, python="3.11.7", command="python bench/against_peers.py tiny", rounds=3, pinned=True,
)  # fmt: skip


def case(contestant: str, threads: int, seconds: float, *times: float, peak_mb: float = 100.0) -> Case:
    stages = STAGES if contestant == OURS else {}
    return Case(contestant, threads, seconds, tuple(Run(ms, 40, 41, peak_mb, stages) for ms in times))


def results(*cases: Case) -> Results:
    return Results((OURS, SHERPA_INT8, FP32_PEER), (1, 2), (2.0, 5.0, 10.0), list(cases))


def bar(found: Results, what: str) -> Bar:
    [bar] = [bar for bar in bars(found) if bar.what == what]
    return bar


# What follows from runs


def test_a_case_sums_up_its_runs() -> None:
    measured = case(SHERPA_INT8, 1, 10, 5, 1, 3, 2, 4)
    assert (measured.median_ms, measured.min_ms, measured.iqr_ms) == (3, 1, 2)


def test_a_single_run_is_not_spread() -> None:
    assert case(SHERPA_INT8, 1, 10, 5).iqr_ms == 0


def test_the_share_outside_the_networks_is_of_the_whole_time() -> None:
    assert case(OURS, 1, 10, 100).outside_share == pytest.approx(0.02)
    assert case(SHERPA_INT8, 1, 10, 100).outside_share is None


def test_the_fastest_peer_is_none_of_ours() -> None:
    found = results(case(OURS, 1, 10, 10), case(SHERPA_INT8, 1, 10, 40), case(FP32_PEER, 1, 10, 30))
    fastest = found.fastest_peer(1, 10)
    assert fastest is not None
    assert fastest.contestant == FP32_PEER
    assert found.ratio_of_fastest(1, 10) == 3
    assert found.ratio(SHERPA_INT8, 1, 10) == 4


def test_a_thread_that_had_to_wait_for_its_core_shows() -> None:
    runs = (Run(10, 40, 41, 100, {}, 9.0), Run(10, 40, 41, 100, {}, 10.0))
    assert results(Case(OURS, 1, 2, runs), Case(OURS, 2, 2, (Run(10, 40, 41, 100, {}, 20.0),))).quiet_share() == 0.95
    assert results().quiet_share() is None


# Bars


@pytest.mark.parametrize(("ours", "reached"), [(100, True), (101, False)])
def test_the_bar_against_sherpa_is_three_times(ours: float, reached: bool) -> None:
    found = results(case(OURS, 1, 10, ours), case(SHERPA_INT8, 1, 10, 300))
    assert bar(found, "10 s, 1 thread: sherpa-onnx int8").reached is reached


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("10 s, 1 thread: fastest peer", "at least 2.5 x"),
        ("5 s, 1 thread: fastest peer", "at least 1.8 x"),
        ("10 s, 2 threads: fastest peer on 2", "at least 1.8 x"),
        ("2 s: 2 threads, never slower than 1", "at least 1 x"),
        ("10 s, 1 thread: outside the two networks", "below 3%"),
        ("memory with 30 s, edge_asr int8", "at most 2.2 x the int8 graph + 150 MB"),
        ("memory with 30 s, edge_asr fp32", "at most 1.7 x the fp32 graph + 150 MB"),
        ("start to first answer for 2 s, edge_asr int8", "below 10 s"),
    ],
)
def test_a_bar_without_measurements_is_not_reached_and_not_missed(what: str, wanted: str) -> None:
    assert bar(results(), what) == Bar(what, wanted, "", None)


def test_two_threads_are_held_against_one() -> None:
    found = results(case(OURS, 1, 2, 10), case(OURS, 2, 2, 8), case(OURS, 1, 5, 20), case(OURS, 2, 5, 21))
    assert bar(found, "2 s: 2 threads, never slower than 1").measured == "1.25 x"
    assert bar(found, "5 s: 2 threads, never slower than 1").reached is False


def test_two_percent_outside_the_networks_pass() -> None:
    found = bar(results(case(OURS, 1, 10, 100)), "10 s, 1 thread: outside the two networks")
    assert (found.measured, found.reached) == ("2.00%", True)


def test_memory_counts_loading_too() -> None:
    found = results()
    found.graph_mb = {OURS: 100.0}
    found.memory = [case(OURS, 1, 30, 1, peak_mb=300)]
    what, limit = "memory with 30 s, edge_asr int8", "at most 370 MB (2.2 x 100 + 150)"
    assert bar(found, what) == Bar(what, limit, "300 MB", True)
    found.loads = [Load(OURS, 1, 1, peak_mb=371, first_answer_ms=2)]
    assert bar(found, what) == Bar(what, limit, "371 MB", False)


@pytest.mark.parametrize(("ms", "measured", "reached"), [(9_990, "9.99 s", True), (10_000, "10.00 s", False)])
def test_the_first_answer_comes_within_ten_seconds_of_the_start(ms: float, measured: str, reached: bool) -> None:
    found = results()
    found.loads = [Load(OURS, 2, 1, 1, 20_000), Load(OURS_FP32, 1, 1, 1, 20_000), Load(OURS, 1, 1, 1, ms)]
    what = "start to first answer for 2 s, edge_asr int8"
    assert bar(found, what) == Bar(what, "below 10 s", measured, reached)


# A contestant's start


class Slow(measure.Entry):
    """A contestant that takes 0.2 s to load, and 0.3 s to answer for the first time."""

    def command(self, threads: int, cores: Sequence[int]) -> list[str]:
        answer = '{"ms": 300, "tokens": 1, "characters": 1, "peak_mb": 90}'
        said = f"time.sleep(0.2); print('{{\"peak_mb\": 70}}', flush=True); input(); time.sleep(0.3); print('{answer}')"
        return [sys.executable, "-c", f"import time; {said}"]


def test_load_and_first_answer_count_from_the_start_of_the_process(tmp_path: Path) -> None:
    child = measure.Child(Slow(EDGE_ASR, INT8, tmp_path, tmp_path, tmp_path), 1, [], tmp_path / "2s.npy")
    child.close()
    load = child.load
    assert (load.contestant, load.threads, load.peak_mb) == (OURS, 1, 70)
    assert load.ms >= 200
    assert load.first_answer_ms >= load.ms + 300


def test_the_sound_of_the_first_answer_is_there_whatever_is_measured(tmp_path: Path) -> None:
    assert set(measure.write_sounds([5.0], None, tmp_path)) == {2.0, 5.0, 30.0}


def test_folders_within_an_engine_are_no_files_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tmp_path / "engine"
    (engine / ".building").mkdir(parents=True)
    monkeypatch.setattr(measure, "_engine", lambda *_: engine)
    assert measure.enter(EDGE_ASR, INT8, read_bundle(BUNDLE), tmp_path, tmp_path).model == engine.resolve()


# The document


def test_a_section_replaces_its_own_only() -> None:
    document = report.update(report.update("", "one", "first"), "two", "second")
    changed = report.update(document, "one", r"again \1 |")
    assert changed == document.replace("first", r"again \1 |")
    assert changed.index("again") < changed.index("second")


def test_sections_whose_names_begin_alike_are_told_apart() -> None:
    document = report.update(report.update("", "python-3.1", "first"), "python-3.11", "second")
    assert report.update(document, "python-3.1", "new") == document.replace("first", "new")


def test_what_stands_outside_the_sections_is_kept() -> None:
    document = "# Mine\n\n" + report.update("", "one", "first") + "\nafter\n"
    assert report.update(document, "one", "new") == document.replace("first", "new")


def test_a_contestant_left_out_says_why() -> None:
    found = results(case(OURS, 1, 2, 10))
    found.left_out = [LeftOut(SHERPA_INT8, 1, "no module | named so")]
    text = report.section(found, CIRCUMSTANCES, "plot.svg")
    assert rf"| {SHERPA_INT8} | left out: no module \| named so |  |  |" in text
    assert f"| {OURS} | 10.0 | not measured |  |" in text


def test_reasons_name_files_without_their_folders() -> None:
    said = "ended with 1: cannot read '/home/me/models/a/model.onnx': no int8/fp32 graph, see https://host/page"
    assert report.without_folders(said) == said.replace("/home/me/models/a/", "")


def test_every_table_has_rows_as_wide_as_its_head() -> None:
    found = results(*(case(name, n, s, 10, 20) for name in (OURS, FP32_PEER) for n in (1, 2) for s in (2.0, 5.0)))
    found.loads = [Load(OURS, 1, 500, 120, 600)]
    assert "| edge_asr int8 | 500 | 600 | 120 | 100 |" in report.section(found, CIRCUMSTANCES, "plot.svg")
    for table in report.section(found, CIRCUMSTANCES, "plot.svg").split("\n\n"):
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, table
