"""The result of bench.device as it is sent in: its fields, and the reading and writing of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

SCHEMA: Literal["edge_asr.device/1"] = "edge_asr.device/1"
SCHEMA_FILE = Path(__file__).with_name("device.schema.json")
GOAL_MB = 1_500.0
"""What an engine of the large model may take."""
STRICT = ConfigDict(extra="forbid")
"""What a file says beyond the schema is a mistake in it."""


@dataclass(frozen=True, config=STRICT)
class Machine:
    """What was measured on."""

    name: str
    """The board as its device tree has it, or the graphics card, or the processor."""
    known_as: str | None
    """Its name in the table of the floor; null: not there."""
    cpu: str
    cores: int
    """That this process may use."""
    memory_mb: float | None
    l4t: str | None
    """First line of /etc/nv_tegra_release; null: no Jetson."""
    power_mode: str | None
    governors: list[str]
    """Of the processor's clocks; empty where the system does not say."""
    kernel: str


@dataclass(frozen=True, config=STRICT)
class Model:
    """What was run."""

    name: str
    weights: int
    """That activations are multiplied by."""


@dataclass(frozen=True, config=STRICT)
class Engine:
    """How it was run."""

    target: str
    name: str
    """What transcripts call it."""
    threads: int
    batches: bool
    """Whether several utterances share a run."""
    build_s: float | None
    """null: it was there already."""
    load_s: float
    megabytes: float
    """Of all of its files."""
    self_test: Literal["passed", "none"]
    """Whether it heard in the recording that was stored with it what fp32 heard; none is stored with onnxruntime's."""


@dataclass(frozen=True, config=STRICT)
class Check:
    """The engine held against fp32 on the processor."""

    sounds: int
    tokens: int
    same_tokens: int
    same_sounds: int
    """Sounds in which all tokens are the same."""
    largest_difference: float | None
    """Between log-probabilities of the same tokens, in those sounds; null: there are none."""


@dataclass(frozen=True, config=STRICT)
class Latency:
    """So many recognitions of one length of audio, from samples to text, features included."""

    seconds: float
    batch: int
    cuda_graphs: bool | None
    """null: the engine has none."""
    mapped_memory: bool | None
    runs: int
    tokens: int
    """Of the first utterance."""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    """The slowest, where there are fewer than 100 runs."""
    stages_ms: Mapping[str, float]
    """Median of each."""
    floor_ms: float | None
    """What the device cannot get below; null: it is not in the table."""


@dataclass(frozen=True, config=STRICT)
class AfterIdle:
    """The first recognition after a pause, in which clocks fall; the governor is as it was found."""

    seconds: float
    idle_s: float
    first_ms: float
    second_ms: float
    """Of the recognition right behind it."""


@dataclass(frozen=True, config=STRICT)
class Memory:
    """What loading and 30 s of audio take."""

    resident_mb: float | None
    """The most that the process had in memory."""
    gpu_mb: float | None
    """Of a graphics card's own memory; null: none, as on a Jetson, whose memory is one."""
    taken_mb: float | None
    """How much less the whole machine had to give, the GPU's share of a Jetson's memory among it."""

    @property
    def total_mb(self) -> float | None:
        """What is held against the goal."""
        if self.gpu_mb is not None:
            return (self.resident_mb or 0) + self.gpu_mb
        known = [value for value in (self.resident_mb, self.taken_mb) if value is not None]
        return max(known, default=None)


@dataclass(frozen=True, config=STRICT)
class Sensors:
    """What the machine told of itself meanwhile; what it has no sensor for is null or not there."""

    throttled: bool | None
    highest_c: Mapping[str, float]
    """By zone."""
    mean_w: Mapping[str, float]
    """By rail."""
    board_w: float | None
    """Mean of the whole board, or of a graphics card."""
    idle_board_w: float | None
    """The same in the pauses."""
    highest_gpu_mhz: float | None


@dataclass(frozen=True, config=STRICT)
class Result:
    """One run of bench.device."""

    schema: Literal["edge_asr.device/1"]
    date: str
    command: str
    """Without paths."""
    quick: bool
    load_average: float
    """Before the run: what else was going on."""
    machine: Machine
    software: Mapping[str, str]
    """Versions by name."""
    model: Model
    engine: Engine
    check: Check | None
    """null: the engine is fp32 on the processor itself."""
    latency: Sequence[Latency]
    after_idle: Sequence[AfterIdle]
    memory: Memory
    sensors: Sensors
    left_out: Sequence[str]
    """What could not be measured, and why."""
    note: str
    """Whatever else there is to say."""


_ADAPTER = TypeAdapter(Result)


def write(path: Path, result: Result) -> None:
    """Write a result into a file."""
    path.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> Result:
    """Read a result; raise ValueError, in one line, where the file is none."""
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: not a result of bench.device: {place or 'the file'}: {first['msg']}") from error


def schema() -> dict[str, Any]:
    """Return the JSON Schema of results, as SCHEMA_FILE has it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA,
        **_ADAPTER.json_schema(),
    }


def percentile(times: Sequence[float], share: float) -> float:
    """Return the time that this share of all does not exceed (nearest rank)."""
    return sorted(times)[max(0, math.ceil(share * len(times)) - 1)]


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
