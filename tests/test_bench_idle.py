"""`edge-asr bench idle`: a daemon that hears nothing but noise, and how processes are read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from bundled import BUNDLE
from mosquitto import PATIENCE_S, wait_for

from edge_asr import cli_bench_idle
from edge_asr.bench import idle as idle_bench
from edge_asr.bench.proc import Reading, cpu_share, read_process, trend, wakeups_per_s
from edge_asr.cli import main
from edge_asr.errors import EdgeAsrError

KEYS = [
    "minutes", "seconds", "cpu_share", "wakeups_per_s", "rss_start_mb", "rss_end_mb", "rss_max_mb", "slope_mb_per_h",
    "slope_error_mb_per_h", "segments", "transcripts", "model", "engine", "threads",
]  # fmt: skip


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "idle", "--model", str(BUNDLE), *arguments])
    return int(str(ended.value.code))


# The command


def test_a_daemon_that_hears_noise_transcribes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert bench("--minutes", "0.05", "--json") == 0
    out, progress = capfd.readouterr()
    figures = json.loads(out)
    assert list(figures) == KEYS
    assert (figures["minutes"], figures["segments"], figures["transcripts"]) == (0.05, 0, 0)
    assert (figures["model"], figures["engine"]) == ("paraformer-tiny", "onnx-fp32")
    assert figures["cpu_share"] > 0
    assert figures["wakeups_per_s"] > 10  # at least once for each chunk
    assert 20 < figures["rss_start_mb"] <= figures["rss_max_mb"] < 2_000
    assert "idle: " in progress


def test_what_stops_the_daemon_is_said_in_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench("--minutes", "0.05", "--engine", str(tmp_path)) == 3
    out, complaint = capfd.readouterr()
    assert out == ""
    assert [line for line in complaint.splitlines() if "build-engine" in line][-1].startswith("edge-asr: ")
    assert "Traceback" not in complaint


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_it_and_leaves_nothing_behind(tmp_path: Path, how: signal.Signals) -> None:
    temporary, log = tmp_path / "temporary", tmp_path / "log"
    temporary.mkdir()
    command = [sys.executable, "-m", "edge_asr", "bench", "idle", "--model", str(BUNDLE)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "TMPDIR": str(temporary)})
    try:
        wait_for(lambda: "idle: 0 %" in log.read_text("utf-8") or process.poll() is not None, "the noise")
        process.send_signal(how)
        assert process.wait(PATIENCE_S) == 130
    finally:
        process.kill()
        process.wait(PATIENCE_S)
    assert "Traceback" not in log.read_text("utf-8")
    assert list(temporary.iterdir()) == []


FIGURES: dict[str, Any] = {
    "minutes": 30.0, "seconds": 1740.0, "cpu_share": 0.0312, "wakeups_per_s": 117.4, "rss_start_mb": 110.0,
    "rss_end_mb": 112.0, "rss_max_mb": 113.0, "slope_mb_per_h": 0.5, "slope_error_mb_per_h": 0.4, "segments": 0,
    "transcripts": 0, "model": "paraformer-tiny", "engine": "onnx-int8", "threads": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, "3.1% of a core, woken up 117 times a second, 112 MB, +0.50 (within 0.80) MB an hour"),
        ({"slope_mb_per_h": None, "slope_error_mb_per_h": None}, "3.1% of a core, woken up 117 times a second, 112 MB"),
    ],
)
def test_people_get_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], line: str
) -> None:
    monkeypatch.setattr(cli_bench_idle, "idle", lambda config, minutes: {**FIGURES, **changed})
    assert bench() == 0
    assert capsys.readouterr().out == f"paraformer-tiny on onnx-int8, 1740 s of noise: {line}\n"


def test_a_transcript_of_noise_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench_idle, "idle", lambda config, minutes: {**FIGURES, "transcripts": 2})
    assert bench("--json") == 1
    out, complaint = capsys.readouterr()
    assert json.loads(out)["transcripts"] == 2
    assert complaint.startswith("edge-asr: 2 transcripts of noise")


# A daemon that ends before it should


@dataclass
class Ended:
    """A process that is not there any more."""

    exitcode: int = -9
    pid: int = 0

    def join(self, timeout: float) -> None:
        pass


def ended_child(*told: object) -> idle_bench._Child:
    heard, sound = Pipe(duplex=False)
    heard.close()
    ours, theirs = Pipe(duplex=False)
    for message in told:
        theirs.send(message)
    theirs.close()
    return idle_bench._Child(cast("Any", Ended()), sound, ours)


def test_a_daemon_that_fails_while_it_listens_says_why() -> None:
    child = ended_child(idle_bench._Failure("the GPU fell off the bus", 3))
    with pytest.raises(EdgeAsrError, match="fell off") as failed:
        idle_bench._feed(child, 1, lambda seconds: None)
    assert failed.value.exit_code == 3


def test_a_daemon_that_is_killed_is_noticed() -> None:
    with pytest.raises(EdgeAsrError, match="has ended with -9"):
        idle_bench._feed(ended_child(), 1, lambda seconds: None)


# Processes


def reading(at: float, cpu_s: float = 0.0, rss: int = 0, **switches: int) -> Reading:
    return Reading(at, cpu_s, {int(thread[1:]): count for thread, count in switches.items()}, rss)


def test_the_share_of_a_core_is_time_taken_over_time_passed() -> None:
    assert cpu_share([reading(10, 5.0), reading(11, 9.9), reading(20, 10.0)]) == pytest.approx(0.5)


def test_wake_ups_of_threads_that_come_and_go_are_counted() -> None:
    readings = [reading(0, t1=100), reading(1, t1=110, t2=3), reading(2, t1=120), reading(4, t1=121, t3=2)]
    assert wakeups_per_s(readings) == (10 + 3 + 10 + 1 + 2) / 4


def test_a_line_is_found_with_its_error() -> None:
    times = np.arange(1000) / 1000
    noise = np.random.default_rng(0).standard_normal(1000)
    found = trend(list(times), list(5 + 3 * times + 0.1 * noise))
    assert found is not None
    slope, error = found
    assert slope == pytest.approx(3, abs=4 * error)
    assert error == pytest.approx(0.1 / np.sqrt(1000 / 12), rel=0.2)


def test_values_that_follow_each_other_prove_less_than_as_many_on_their_own() -> None:
    steps = np.random.default_rng(0).standard_normal(1000)
    alone, walk = trend(range(1000), list(steps)), trend(range(1000), list(np.cumsum(steps)))
    assert alone is not None
    assert walk is not None
    assert walk[1] == pytest.approx(np.sqrt(1.2 / 1000), rel=0.1)  # what slopes of random walks deviate by
    assert walk[1] > 50 * alone[1]


def test_one_step_is_no_trend_and_many_small_ones_are() -> None:
    once = trend(range(1000), [0.0] * 400 + [1.0] * 600)
    often = trend(range(1000), [k // 10 / 100 for k in range(1000)])
    assert once is not None
    assert often is not None
    assert abs(once[0]) < 2 * once[1]
    assert often[0] > 10 * often[1] > 0


def test_two_values_make_no_trend_and_what_stays_the_same_has_none() -> None:
    assert trend([0, 1], [5, 6]) is None
    assert trend([0, 1, 2, 3], [7, 7, 7, 7]) == (0, 0)


def test_this_process_is_read_with_its_threads() -> None:
    before, ready, done = read_process(os.getpid()), threading.Event(), threading.Event()

    def wait() -> None:
        ready.set()
        done.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait()
    during = read_process(os.getpid())
    done.set()
    thread.join()
    assert set(during.switches) - set(before.switches) == {thread.native_id}
    assert during.cpu_s >= before.cpu_s > 0
    assert during.rss_bytes > 20e6
    assert during.at > before.at


def test_children_and_theirs_count() -> None:
    with subprocess.Popen(["sh", "-c", "sh -c 'cat; :'; :"], stdin=subprocess.PIPE) as child:
        wait_for(lambda: len(read_process(child.pid).switches) == 3, "a child of the child")
        alone = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        assert read_process(child.pid).rss_bytes > alone
        assert child.stdin is not None
        child.stdin.close()
        child.wait(PATIENCE_S)


def test_a_process_that_has_ended_cannot_be_read() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait(PATIENCE_S)
    with pytest.raises(OSError, match=str(child.pid)):
        read_process(child.pid)
