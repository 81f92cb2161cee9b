"""The bench of several servers: what it gives to HAProxy, what it makes of its rounds, and a short run of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from mosquitto import find_program

from bench.replicas import DIRECT, arguments, configuration, main, report


@pytest.fixture
def haproxy() -> str:
    if (found := find_program("haproxy")) is None:
        pytest.skip("not installed: haproxy (Debian: apt install haproxy)")
    return found


@pytest.mark.parametrize("ports", [[9001], [9001, 9002, 9003]])
def test_haproxy_takes_its_configuration(tmp_path: Path, haproxy: str, ports: list[int]) -> None:
    text = configuration(9000, ports)
    (tmp_path / "haproxy.cfg").write_text(text, encoding="utf-8")
    result = subprocess.run(
        [haproxy, "-c", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in text.splitlines()]
    assert [line[2] for line in lines if line[:1] == ["server"]] == [f"127.0.0.1:{port}" for port in ports]
    assert [line[1] for line in lines if line[:1] == ["bind"]] == ["127.0.0.1:9000"]


def test_rounds_are_compared_with_themselves() -> None:
    """The second round was slow, so that the quotient of the medians would be 1.75."""
    rates = {DIRECT: (44.0, 22.0, 44.0), 1: (40.0, 20.0, 40.0), 2: (80.0, 60.0, 70.0)}
    runs = {
        number: [
            {"requests_per_s": rate, "p50_ms": 5, "server_cores": 1, "refused": 1, "wrong": []} for rate in of_number
        ]
        for number, of_number in rates.items()
    }
    direct, one, two = report(arguments(["--replicas", "1", "2"]), runs)["found"]
    assert (direct["servers"], direct["times"]) == ("direct", 1.1)
    assert (one["servers"], one["requests_per_s"], one["times"]) == (1, 40.0, 1.0)
    assert (two["requests_per_s"], two["range"], two["times"], two["refused"]) == (70.0, [60.0, 80.0], 2.0, 3)


@pytest.mark.slow
def test_it_measures(capsys: pytest.CaptureFixture[str], haproxy: str) -> None:
    assert main(["--replicas", "1", "2", "--clients", "2", "--seconds", "1", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["servers"] for row in found["found"]] == ["direct", 1, 2]
    assert all(row["requests_per_s"] > 0 for row in found["found"])
    assert found["wrong"] == []
