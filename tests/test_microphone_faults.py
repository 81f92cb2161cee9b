"""The bench of faults: it measures a recovery that takes place, on the real daemon."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mosquitto import Mosquitto
from pulse import PulseServer

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench is not part of the package
from bench import microphone_faults as bench


@pytest.mark.slow
def test_recovery_is_measured_for_each_fault_as_often_as_asked(
    broker: Mosquitto, pulse_server: PulseServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: dict[str, tuple[bench.Fault, tuple[float, float]]] = {
        "muted": (bench.muted, (0.0, 0.1)),
        "renamed": (bench.renamed, (0.0, 0.1)),
    }
    monkeypatch.setattr(bench, "FAULTS", faults)
    with bench.running_daemon(broker.port, tmp_path):
        measured = dict(bench.measure(pulse_server, broker.port, times=2))
    assert {name: len(took) for name, took in measured.items()} == {"muted": 2, "renamed": 2}
    assert all(seconds > 0 for took in measured.values() for seconds in took)
