"""How much several servers behind HAProxy answer, against one: requests a second as fast as clients can ask.

All servers run all the time; beside them one HAProxy for each number of them, with the shipped configuration. The
numbers are measured in turns, so that a slow minute of the machine is everybody's, and the medians of the rounds are
compared. `direct` asks the first server without HAProxy: what the way through it costs. A server alone uses more than a
core, its threads and the processes that decode uploads; with `--pin` each has one core, the first the first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.load import ROOT, Outcome, Sentence, Setting, ask, bundled_sentences, free_port, until_ready
from edge_asr.bench.proc import read_process

CONFIG = ROOT / "deploy" / "haproxy" / "haproxy.cfg"
WARM_UP_S = 3.0
"""Of each server and each HAProxy, before anything is counted."""
DIRECT = 0
"""The number of servers that stands for the first one without HAProxy."""


def find_haproxy() -> str:
    """Return the program. Raises SystemExit where it is not installed."""
    found = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if found is None:
        raise SystemExit("bench.replicas: haproxy is missing (Debian: apt install haproxy)")
    return found


def configuration(port: int, servers: Sequence[int]) -> str:
    """Return the shipped configuration with these ports, one `server` line for each of `servers`."""
    text = CONFIG.read_text(encoding="utf-8").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    kept = [line for line in text.splitlines() if not re.match(r" +server ", line)]
    return "\n".join([*kept, *(f"    server s{port} 127.0.0.1:{port}" for port in servers), ""])


@contextlib.contextmanager
def running(command: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for as long as the block lasts."""
    with log.open("wb") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.terminate()


def server_command(folder: Path, port: int, model: Path | None, options: Sequence[str]) -> list[str]:
    """Return how one server is started."""
    given = [
        f"state_dir={folder / str(port)}", "mqtt.enabled=false", "outbox.enabled=false", "http.enabled=true",
        f"http.port={port}", "http.limits.requests_per_minute=1000000", "engine.threads=1",
        *([] if model is None else [f"model={model}", "gates.min_confidence=0"]), *options,
    ]  # fmt: skip
    return [sys.executable, "-m", "edge_asr", "run", *(part for option in given for part in ("-o", option))]


class Bench:
    """Servers, and an HAProxy for each number of them."""

    def __init__(self, wanted: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> None:
        self._wanted = wanted
        self._ports = [free_port() for _ in range(max(wanted.replicas))]
        self._servers = {}
        cores = sorted(os.sched_getaffinity(0))
        for index, port in enumerate(self._ports):
            command = server_command(folder, port, wanted.model, wanted.options)
            if wanted.pin:
                command = ["taskset", "--cpu-list", str(cores[index % len(cores)]), *command]
            self._servers[port] = stack.enter_context(running(command, folder / f"{port}.log"))
        self._folder = folder
        self._fronts = {DIRECT: self._ports[0]}
        self._proxies = {}
        program = find_haproxy()
        for number in wanted.replicas:
            front = free_port()
            file = folder / f"{front}.cfg"
            file.write_text(configuration(front, self._ports[:number]), encoding="utf-8")
            self._proxies[number] = stack.enter_context(running([program, "-f", file], folder / f"{front}.log"))
            self._fronts[number] = front

    async def wait(self) -> None:
        """Return when all can recognise, also through each HAProxy."""
        for port, process in self._servers.items():
            await until_ready(port, process, self._folder / f"{port}.log")
        for number, process in self._proxies.items():
            await until_ready(self._fronts[number], process, self._folder / f"{self._fronts[number]}.log")

    async def measure(self, number: int, seconds: float, sentences: Sequence[Sentence]) -> dict[str, Any]:
        """Ask as fast as it goes. Returns requests a second, their time, and the cores that the servers had."""
        outcome = Outcome()
        setting = Setting(self._wanted.clients, 0, seconds, 0.0)
        before = self._cpu_s()
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        port = self._fronts[number]
        await asyncio.gather(*(ask(client, port, setting, sentences, outcome) for client in range(setting.clients)))
        took_s = loop.time() - began_at
        return {
            "requests_per_s": len(outcome.latencies_ms) / took_s,
            "p50_ms": median(outcome.latencies_ms),
            "server_cores": (self._cpu_s() - before) / took_s,
            "refused": sum(outcome.refused.values()),
            "wrong": outcome.wrong,
        }

    def _cpu_s(self) -> float:
        return sum(read_process(process.pid).cpu_s for process in self._servers.values())


async def compare(wanted: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the medians of all rounds."""
    sentences = bundled_sentences()
    if wanted.model is not None:
        sentences = [Sentence(sentence.sound, None) for sentence in sentences]
    numbers = [DIRECT, *wanted.replicas]
    runs: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers}
    with contextlib.ExitStack() as stack:
        bench = Bench(wanted, folder, stack)
        await bench.wait()
        for number in numbers:
            await bench.measure(number, WARM_UP_S, sentences)
        for round_ in range(wanted.rounds):
            for number in numbers:
                runs[number].append(await bench.measure(number, wanted.seconds, sentences))
            print(f"round {round_ + 1} of {wanted.rounds}", file=sys.stderr)
    return report(wanted, runs)


def report(wanted: argparse.Namespace, runs: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the figures: `times` is requests a second against one server behind HAProxy, round by round."""
    found = []
    one = [run["requests_per_s"] for run in runs[wanted.replicas[0]]]
    for number, of_number in runs.items():
        rates = [run["requests_per_s"] for run in of_number]
        found.append({
            "servers": "direct" if number == DIRECT else number,
            "requests_per_s": round(median(rates), 1),
            "range": [round(min(rates), 1), round(max(rates), 1)],
            "times": round(median(rate / base for rate, base in zip(rates, one, strict=True)), 2),
            "p50_ms": round(median(run["p50_ms"] for run in of_number), 1),
            "server_cores": round(median(run["server_cores"] for run in of_number), 2),
            "refused": sum(run["refused"] for run in of_number),
        })  # fmt: skip
    wrong = [text for of_number in runs.values() for run in of_number for text in run["wrong"]]
    return {
        "clients": wanted.clients,
        "seconds": wanted.seconds,
        "rounds": wanted.rounds,
        "found": found,
        "wrong": wrong,
    }


def show(found: dict[str, Any]) -> None:
    """Print a table."""
    print("| servers | requests a second, median (range) | times one | p50 ms | cores of the servers |")
    print("|---|---|---|---|---|")
    for row in found["found"]:
        low, high = row["range"]
        name = "1, no HAProxy" if row["servers"] == "direct" else row["servers"]
        cells = (f"{row['requests_per_s']} ({low} to {high})", row["times"], row["p50_ms"], row["server_cores"])
        print(f"| {name} | {' | '.join(map(str, cells))} |")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.replicas", description=__doc__)
    parser.add_argument(
        "--replicas", type=int, nargs="+", default=[1, 2, 3], help="numbers of servers; the first is the base"
    )
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="another model than the bundled one; its texts are not checked")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="KEY=VALUE", help="configuration")
    parser.add_argument("--pin", action="store_true", help="a core for each server; further ones share them")
    parser.add_argument("--json", action="store_true", help="all figures, for machines")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where an answer was wrong or missing."""
    wanted = arguments(given)
    with tempfile.TemporaryDirectory(prefix="edge_asr-replicas-") as folder:
        found = asyncio.run(compare(wanted, Path(folder)))
    if wanted.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        show(found)
    for line in found["wrong"][:5]:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
