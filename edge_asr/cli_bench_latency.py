"""What `bench latency` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edge_asr.bench.clients import RECORDING_S
from edge_asr.bench.latency import replay
from edge_asr.broker import AMQTT
from edge_asr.config import Config
from edge_asr.errors import EdgeAsrError

COLUMNS = ("p50", "p95", "p99", "max")


def bench_latency(
    config: Config, files: Sequence[str], streams: int, clients: int, as_json: bool
) -> EdgeAsrError | None:
    """Replay and print the figures; return what was lost, as an error. Raises what `replay` raises."""
    outcome = replay(config, files, streams, clients)
    figures = outcome.figures
    print(json.dumps(figures, ensure_ascii=False) if as_json else "\n".join(_table(figures)), flush=True)
    if outcome.failure is None and figures["lost"]:
        return EdgeAsrError(f"{figures['lost']} sentences were lost; play these files with transcribe, and see the log")
    return outcome.failure


def _table(figures: Mapping[str, Any]) -> list[str]:
    content = "on" if figures["content_endpointing"] else "off"
    lines = [
        f"{figures['model']} on {figures['engine']}, {figures['streams']} streams, preset {figures['preset']},"
        f" content endpointing {content}",
        f"{figures['count']} transcripts, {figures['late']} late, {figures['lost']} lost, {figures['empty']} empty;"
        f" {figures['decoded_at_pause']:.0%} decoded at the pause, {figures['cut']} recordings cut in parts",
        "",
        f"{'ms':<12}" + "".join(f"{column:>9}" for column in COLUMNS),
        *(_row(name, figures[f"{name}_ms"]) for name in ("endpoint", "response", "total", "end_error")),
        *(_row(f"  {stage}", spread) for stage, spread in figures["stages"].items()),
    ]
    if figures["clients"]:
        lines += [
            "",
            f"beside {figures['clients']} clients with recordings of {RECORDING_S} s:"
            f" {figures['client_requests']} requests answered, {figures['client_requests_cut']} of them in parts",
        ]
    if figures["broker"] == AMQTT:
        lines += ["", "The broker ran in the same process and took time from it: install mosquitto for better figures."]
    return lines


def _row(name: str, spread: Mapping[str, float | None]) -> str:
    values = ("-" if spread[column] is None else f"{spread[column]:.1f}" for column in COLUMNS)
    return f"{name:<12}" + "".join(f"{value:>9}" for value in values)
