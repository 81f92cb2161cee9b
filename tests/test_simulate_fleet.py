"""The simulated fleet: held to closed forms, to what it imitates, to what was measured, and to losing nobody."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from contextlib import AbstractContextManager

import numpy as np
import pytest
import yaml
from bundled import REPOSITORY

from bench.fleet_arrivals import DAY_S, HOUR_S, arrivals, lengths, level
from bench.fleet_broker import SENTENCE, broker_load, delays, replay, storm
from bench.fleet_replicas import COSTS, Cost, Replica, Setting, Simulation, Stalls, may_share, report
from bench.fleet_scaling import Autoscaler, Scaling
from bench.simulate_fleet import Wanted, main, needed, simulate, validation
from edge_asr.budget import CostModel
from edge_asr.config_mqtt import MqttConfig
from edge_asr.config_server import LimitsConfig
from edge_asr.errors import BusyError
from edge_asr.publish.connection import OPEN_S
from edge_asr.recognizer import runs
from edge_asr.recognizer.requests import Priority, Request
from edge_asr.serve.admission import Admission
from edge_asr.types import SAMPLE_RATE

ENDLESS = 1e9
"""Seconds that nobody has to wait for: nobody is refused."""


def poisson(rng: np.random.Generator, rate: float, count: int) -> np.ndarray:
    return np.cumsum(rng.exponential(1 / rate, count))


def waits(done: Simulation) -> float:
    """Return the mean wait in seconds, without the work itself."""
    return float(np.mean(done.latencies_s))


def per_second(ms: float) -> Cost:
    return Cost(0.0, 0.0, ms)


def erlang_c(servers: int, load: float) -> float:
    """Return the share of those who wait in M/M/c."""
    terms = [load**k / math.factorial(k) for k in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last)


# Closed forms


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_one_server_with_exponential_work_waits_as_long_as_m_m_1(load: float) -> None:
    rng, count = np.random.default_rng(1), 100_000
    work = rng.exponential(0.1, count)
    done = Simulation(
        poisson(rng, load / 0.1, count), work, Setting(per_second(1000), replicas=1, wait_s=ENDLESS)
    ).run()
    assert waits(done) == pytest.approx(0.1 / (1 - load), rel=0.05)


def test_one_server_with_constant_work_waits_as_long_as_m_d_1() -> None:
    rng, count, load = np.random.default_rng(2), 100_000, 0.7
    done = Simulation(poisson(rng, load / 0.1, count), np.ones(count), Setting(per_second(100), replicas=1)).run()
    assert waits(done) == pytest.approx(0.1 * (1 + load / (2 * (1 - load))), rel=0.05)


def test_four_servers_of_a_replica_wait_as_long_as_m_m_4() -> None:
    rng, count, servers, load = np.random.default_rng(3), 100_000, 4, 3.0
    work = rng.exponential(0.1, count)
    setting = Setting(per_second(1000), replicas=1, servers=servers, wait_s=ENDLESS)
    done = Simulation(poisson(rng, load / 0.1, count), work, setting).run()
    assert waits(done) == pytest.approx(0.1 + erlang_c(servers, load) * 0.1 / (servers - load), rel=0.05)


def test_least_connections_are_nearly_as_good_as_one_queue_and_far_better_than_chance() -> None:
    rng, count, servers, load = np.random.default_rng(4), 60_000, 4, 3.0
    work = rng.exponential(0.1, count)
    done = Simulation(poisson(rng, load / 0.1, count), work, Setting(per_second(1000), replicas=servers)).run()
    one_queue = 0.1 + erlang_c(servers, load) * 0.1 / (servers - load)
    by_chance = 0.1 / (1 - load / servers)
    assert one_queue < waits(done) < (one_queue + by_chance) / 2


def test_requests_in_progress_are_rate_times_time() -> None:
    rng, rate, count = np.random.default_rng(5), 10.0, 60_000
    setting = Setting(COSTS["large-int8"], replicas=1, row_s=1.0)
    done = Simulation(poisson(rng, rate, count), lengths(rng, count), setting).run()
    assert np.mean([row.in_progress for row in done.rows]) == pytest.approx(rate * waits(done), rel=0.05)


def test_a_replica_is_busy_for_rate_times_work() -> None:
    rng, count = np.random.default_rng(6), 30_000
    done = Simulation(poisson(rng, 5.0, count), np.ones(count), Setting(per_second(100), replicas=1)).run()
    assert report(done)["busy"]["mean"] == pytest.approx(0.5, rel=0.02)


# Arrivals


def test_a_day_has_its_mean_and_its_peak() -> None:
    hours = np.arange(0, 24, 1 / 60)
    assert np.mean(level(hours, 10)) == pytest.approx(1, rel=0.01)
    assert np.max(level(hours, 10)) == pytest.approx(10, rel=0.01)
    assert np.all(level(hours, 1) == 1)


def test_requests_come_as_often_as_the_day_says() -> None:
    counts = [len(arrivals(np.random.default_rng(seed), 100_000)) for seed in range(20)]
    assert np.mean(counts) == pytest.approx(100_000, rel=0.005)
    peak = arrivals(np.random.default_rng(0), 1_000_000, hours=(18.95, 19.05))
    assert len(peak) / (0.1 * HOUR_S) == pytest.approx(115, rel=0.05)
    assert np.all(np.diff(peak) >= 0)


def test_without_bursts_requests_are_poisson_and_with_them_they_vary_more() -> None:
    def spread(burst: float) -> float:
        times = arrivals(np.random.default_rng(7), 10 * DAY_S, peak=1, burst=burst)
        counts = np.histogram(times, np.arange(0, DAY_S, 60))[0]
        return float(np.var(counts) / np.mean(counts))

    assert spread(1) == pytest.approx(1, abs=0.15)
    assert spread(3) > 3


def test_recordings_are_as_long_as_those_that_were_measured() -> None:
    found = lengths(np.random.default_rng(8), 100_000)
    assert np.mean(found) == pytest.approx(3.3, rel=0.01)
    assert np.max(found) <= 30


# What it imitates


def test_admission_decides_as_the_real_one() -> None:
    chance, clock = random.Random(9), [0.0]
    replica, backlog_ms = Replica(0), [0.0]
    real = Admission(2.0, lambda: backlog_ms[0] / 1e3, clock=lambda: clock[0])
    let_in: list[AbstractContextManager[None]] = []
    decisions: list[bool] = []
    for _ in range(3_000):
        clock[0] += chance.expovariate(4.0)
        replica.waiting_ms = backlog_ms[0] = chance.choice([0.0, 100.0, 2_500.0])
        if let_in and chance.random() < 0.45:
            let_in.pop(0).__exit__(None, None, None)
            replica.end(clock[0])
            continue
        try:
            (entered := real.request()).__enter__()
        except BusyError:
            decisions.append(False)
        else:
            decisions.append(True)
            let_in.append(entered)
        assert replica.admits(2.0) == decisions[-1]
        if decisions[-1]:
            replica.begin(clock[0])
    for left in let_in:
        left.__exit__(None, None, None)
    assert 0.1 < np.mean(decisions) < 0.9


def test_requests_share_a_run_as_the_real_scheduler_lets_them() -> None:
    rng, decisions = np.random.default_rng(10), []
    for _ in range(500):
        cost = Cost(0.0, 0.0, float(rng.uniform(0.2, 2)), 1.0, int(rng.integers(1, 40)))
        seconds = [round(float(one), 1) for one in rng.uniform(0.5, 10, int(rng.integers(2, 16)))]
        costs = CostModel()
        for length in (0.5, 2, 5, 10, 30, 100, 400):
            costs.observe(length, cost.second_ms * length)
        batch = [Request(np.zeros(round(one * SAMPLE_RATE), np.float32), Priority.NETWORK, math.inf) for one in seconds]
        decisions.append(may_share(seconds, cost))
        assert runs.may_share(batch, costs, 0.0, cost.most) == decisions[-1]
    assert 0.05 < np.mean(decisions) < 0.95


def test_batches_form_only_where_the_engine_batches_and_are_faster() -> None:
    rng, count = np.random.default_rng(11), 20_000
    times, seconds = poisson(rng, 60.0, count), lengths(rng, count)
    alone = Simulation(times, seconds, Setting(Cost(2, 10, 0.5), replicas=1)).run()
    together = Simulation(times, seconds, Setting(Cost(2, 10, 0.5, 0.1, 8), replicas=1)).run()
    waited = Simulation(times, seconds, Setting(Cost(2, 10, 0.5, 0.1, 8), replicas=1, batch_wait_s=0.05)).run()
    assert max(alone.batches) == 1 < np.mean(together.batches) < np.mean(waited.batches)
    assert waits(together) < waits(alone)
    assert max(waited.batches) <= 8


def test_defaults_are_those_of_the_server_and_the_appliance() -> None:
    assert Setting(COSTS["large-int8"]).wait_s == LimitsConfig().wait_s
    config, many = MqttConfig(), np.full(10_000, 16.0)
    first, last = delays(np.random.default_rng(0), many * 0), delays(np.random.default_rng(0), many)
    assert config.reconnect_min_s / 2 <= first.min() < first.max() <= config.reconnect_min_s
    assert config.reconnect_max_s / 2 <= last.min() < last.max() <= config.reconnect_max_s


def test_the_autoscaler_has_the_rules_of_the_manifest() -> None:
    file = REPOSITORY / "deploy" / "kubernetes" / "base" / "horizontalpodautoscaler.yaml"
    spec, ours = yaml.safe_load(file.read_text(encoding="utf-8"))["spec"], Scaling()
    assert (ours.least, ours.most) == (spec["minReplicas"], spec["maxReplicas"])
    up, down = spec["behavior"]["scaleUp"], spec["behavior"]["scaleDown"]
    assert (ours.up_window_s, ours.down_window_s) == (
        up["stabilizationWindowSeconds"],
        down["stabilizationWindowSeconds"],
    )
    assert up["policies"] == [
        {"type": "Percent", "value": 100 * ours.up_share, "periodSeconds": ours.up_period_s},
        {"type": "Pods", "value": ours.up_pods, "periodSeconds": ours.up_period_s},
    ]
    assert down["policies"] == [{"type": "Pods", "value": ours.down_pods, "periodSeconds": ours.down_period_s}]
    cpu = next(metric for metric in spec["metrics"] if metric["type"] == "Resource")
    assert cpu["resource"]["target"]["averageUtilization"] == 100 * ours.cpu
    p95 = next(
        one["pods"] for one in spec["metrics"] if one.get("pods", {}).get("metric", {}).get("name", "").endswith("p95")
    )
    assert p95["target"]["averageValue"] == f"{1000 * ours.p95_s:g}m"


def test_the_autoscaler_grows_step_by_step_and_shrinks_slowly() -> None:
    scaler, now, present, grown = Autoscaler(Scaling()), 0.0, 2, [2]
    while now < 300:
        present = scaler.decide(now, present, 0, busy=1.0, p95_s=3.0)
        grown.append(present)
        now += 15
    assert grown[2] == 2  # the window of 30 s, in which it must be wanted all the time, is not over
    assert grown[-1] == 10
    assert max(later / before for before, later in zip(grown[:-4], grown[4:], strict=True)) <= 2
    shrunk = []
    while now < 3 * HOUR_S:
        present = scaler.decide(now, present, 0, busy=0.0, p95_s=0.0)
        shrunk.append(present)
        now += 15
    assert shrunk[round(500 / 15)] == 10
    assert shrunk[-1] == 2
    assert max(before - later for before, later in zip(shrunk[:-20], shrunk[20:], strict=True)) == 1


# Nobody is lost


def overloaded(seed: int = 0) -> Simulation:
    rng, count = np.random.default_rng(12), 20_000
    setting = Setting(
        COSTS["large-int8"], Scaling(most=3), stalls=Stalls(15, 0.6), microphone=True, fails_at=300.0, seed=seed
    )
    return Simulation(poisson(rng, 60.0, count), lengths(rng, count), setting)


def test_each_request_is_answered_given_up_or_under_way_at_any_moment() -> None:
    done = overloaded().run()
    found = report(done)
    for row in done.rows:
        assert row.asked == row.answered + row.gave_up + row.in_progress + row.away
    assert found["requests"] == 20_000 == found["answered"] + found["gave_up"]
    assert found["in_flight"] == 0
    assert min(found["gave_up"], found["refusals"], found["broken_off"]) > 0


def test_a_replica_that_is_full_refuses_and_who_is_refused_comes_back() -> None:
    times = np.full(100, 1.0)
    done = Simulation(times, np.ones(100), Setting(per_second(100), replicas=1)).run()
    assert done.refusals >= 100 - 64
    assert (done.answered, done.gave_up) == (100, 0)


def test_what_a_dying_replica_had_is_asked_again() -> None:
    setting = Setting(per_second(1000), replicas=2, fails_at=0.5)
    done = Simulation(np.array([0.0, 0.0, 0.1, 0.1]), np.ones(4), setting).run()
    assert (done.broken, done.answered, done.gave_up) == (2, 4, 0)


def test_a_replica_that_was_stopped_is_never_busy_again() -> None:
    rng, count = np.random.default_rng(13), 30_000
    times = np.sort(np.concatenate([rng.uniform(0, 600, count), rng.uniform(600, 12_000, 2_000)]))
    setting = Setting(COSTS["large-int8"], Scaling(), stalls=Stalls(60, 0.2), microphone=True)
    done = Simulation(times, lengths(rng, len(times)), setting).run()
    assert max(row.ready for row in done.rows) > done.rows[-1].ready
    assert np.mean([row.busy for row in done.rows if row.at > 9_000]) < 0.1


def test_the_same_seed_gives_the_same_day_and_another_one_another() -> None:
    first, again, other = (overloaded(seed).run() for seed in (0, 0, 1))
    assert (first.rows, first.latencies_s) == (again.rows, again.latencies_s)
    assert first.latencies_s != other.latencies_s


# What was measured


def test_the_model_is_near_what_was_measured() -> None:
    figures = validation(wanted(), lambda name, share: None)
    measured, quiet, stalls = (figures[name] for name in ("measured", "quiet", "stalls"))
    assert quiet["p50"] == pytest.approx(measured["p50"], rel=0.15)
    assert quiet["p95"] < measured["p95"] / 2  # a machine of its own would be faster; what was measured had company
    for name, tolerance in (("mean", 0.15), ("p50", 0.15), ("p95", 0.3), ("p99", 0.3)):
        assert stalls[name] == pytest.approx(measured[name], rel=tolerance)


def test_costs_are_those_of_the_pages() -> None:
    assert 1e3 / COSTS["large-int8"].ms((3.3,)) == pytest.approx(18, rel=0.01)
    assert 1e3 / COSTS["bundled-int8"].ms((3.3,)) == pytest.approx(75, rel=0.01)
    assert [round(COSTS["large-int8"].engine_ms((seconds,)), 1) for seconds in (2, 5)] == [27.5, 44.4]
    assert needed(12.05, COSTS["large-int8"]) == 3  # two thirds of one, rounded up, and one that may fail


def test_the_page_says_how_many_replicas_are_needed() -> None:
    page = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,.]+)/s \| (\d+) \|", page, re.MULTILINE)
    found = [(int(per_day.replace(",", "")), float(peak.replace(",", "")), int(count)) for per_day, peak, count in rows]
    assert [per_day for per_day, _, _ in found] == [100_000, 1_000_000, 10_000_000]
    for per_day, peak, count in found:
        assert peak == pytest.approx(10 * per_day / DAY_S, rel=0.01)
        assert count == needed(10 * per_day / DAY_S, COSTS["large-int8"])


def test_the_page_has_the_messages_and_rates_of_the_simulation() -> None:
    page = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    for topic, traffic in SENTENCE.items():
        assert re.search(
            rf"^\| `{topic}` \| {traffic.qos} \| {traffic.messages:g}\b.* \| {traffic.size:,}\b", page, re.MULTILINE
        )
    peak = broker_load(10_000, 100, 10)["peak"]
    assert f"| {peak['qos1_per_s']:.0f} |" in page
    assert f"{peak['in_per_s']:,.0f}: " in page


# The broker


def test_devices_come_back_once_each_and_no_faster_than_the_broker_takes_them() -> None:
    found = storm(2_000, 60.0, 100.0)
    assert len(found["came_s"]) == 2_000
    assert min(found["came_s"]) > 0
    assert max(np.histogram(found["came_s"], np.arange(0, 200))[0]) <= 101
    assert found["back_s"]["100 %"] >= 2_000 / 100


def test_jitter_spreads_the_storm() -> None:
    found = storm(10_000, 600.0, 1e6)
    assert found["asked_per_s_most"] < 2 * 10_000 / 30
    assert found["back_s"]["100 %"] <= 30
    assert found["given_up"] == 0


def test_who_waits_too_long_for_the_broker_gives_up_and_still_comes_back() -> None:
    found = storm(2_000, 1.0, 20.0)
    assert found["given_up"] > 0
    assert found["back_s"]["100 %"] > OPEN_S


def test_outboxes_drain_completely_and_share_what_the_broker_has_left() -> None:
    found = replay([0.0] * 1_000, 40.0, 20_000.0, 4_000.0, 3_800.0)
    assert sum(found["rows_per_s"]) == pytest.approx(40_000, rel=0.001)
    assert found["rows_per_s_most"] == 16_000
    assert found["drained_s"] == 3
    assert replay([0.0], 7_600.0, 20_000.0, 0.0, 3_800.0)["drained_s"] == 2
    assert replay([0.0], 1.0, 100.0, 200.0, 10.0)["drained_s"] is None


def test_the_broker_s_load_grows_with_the_devices() -> None:
    one, ten = (broker_load(devices, 100, 10) for devices in (1_000, 10_000))
    assert ten["peak"]["in_per_s"] == pytest.approx(10 * one["peak"]["in_per_s"], rel=0.01)
    assert one["mean"]["in_per_s"] < one["peak"]["in_per_s"] < 10 * one["mean"]["in_per_s"]
    assert one["peak"]["qos1_per_s"] < one["peak"]["in_per_s"]


# The program


def wanted() -> Wanted:
    return Wanted([20_000], 500, 100.0, 10.0, COSTS["large-int8"], Stalls(15, 0.6), 20_000.0, 5_000.0, 0, True)


def test_the_program_prints_everything_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--quick", "--json", "--requests-per-day", "20000", "--devices", "500", "--cost", "5:10:2:0.5:4"]
    assert main([*given, "--stalls", "none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["days"]["20000"]["gave_up"] == 0
    assert found["fleet"]["devices"] == 500
    assert found["cost"]["most"] == 4


def test_the_program_shows_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--requests-per-day", "20000", "--devices", "500"]) == 0
    shown = capsys.readouterr().out
    assert "20,000" in shown
    assert "500 devices" in shown


@pytest.mark.parametrize("given", ["--cost=1:2", "--cost=1:2:x", "--cost=-1:2:3", "--stalls=5", "--stalls=0:1"])
def test_what_cannot_be_is_refused_with_an_example(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([given])
    assert "error: argument" in capsys.readouterr().err


def test_a_seed_repeats_everything() -> None:
    first, again = (simulate(wanted())[0] for _ in range(2))
    other = simulate(dataclasses.replace(wanted(), seed=1))[0]
    assert first == again
    assert first["days"] != other["days"]
