#!/usr/bin/env python3
"""From the boot of an appliance to READY with its engine built: a Debian in a container, of scripts/test-systemd.

Needs root, and what scripts/test-systemd has made in build/systemd.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the container is the tests'

from appliance import Appliance, appliance


def measure(machine: Appliance) -> dict[str, float]:
    """Boot anew with nothing of the disk in memory; return the seconds to READY, and those of the service alone."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    machine.reboot()
    machine.until(lambda: machine.active, "the service", patience_s=600)
    begun, ready = (int(machine.show(f"{when}TimestampMonotonic")) / 1e6 for when in ("InactiveExit", "ActiveEnter"))
    booted = int(machine.run("systemctl", "show", "--property", "UserspaceTimestampMonotonic", "--value").stdout) / 1e6
    return {"boot_to_ready_s": ready - booted, "service_s": ready - begun}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the folder of a bundle")
    parser.add_argument("--target", default="auto", help="engine.target")
    parser.add_argument("--count", type=int, default=5, help="boots")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, appliance(Path(folder)) as machine:
        shutil.copytree(given.model, machine.root / "root" / given.model.name)
        print("installing", file=sys.stderr)
        machine.install("--mqtt", "localhost", "--model", f"/root/{given.model.name}")
        print("building the engine", file=sys.stderr)
        machine.configure(lambda text: f"{text}engine: {{target: {given.target}}}\n")
        machine.run("systemctl", "restart", "edge-asr", timeout=1800)
        runs = [measure(machine) for _ in range(given.count)]
        state = machine.show("StatusText")
    result = {
        "model": given.model.name,
        "target": given.target,
        "status": state,
        "boots": given.count,
        **{f"{name}_median": round(median(run[name] for run in runs), 2) for name in runs[0]},
        **{f"{name}_most": round(max(run[name] for run in runs), 2) for name in runs[0]},
    }
    if given.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
