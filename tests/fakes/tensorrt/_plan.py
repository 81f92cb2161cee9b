"""What a plan holds: the graph, and what it was built for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

MAGIC = b"ftrt"


@dataclass
class Plan:
    """A built network."""

    release: str
    sm: list
    profiles: list
    """For each profile, by input: the least, the best and the greatest shape."""
    flags: list
    previews: list
    strongly_typed: bool
    workspace: int | None
    """The limit that was set; None: all memory of the device."""
    tactic_sources: int | None = None
    fp32_layers: list = field(default_factory=list)
    """Names of the layers that were pinned to FP32."""
    graph: bytes = b""


def serialize(plan):
    """Return a plan's bytes."""
    values = asdict(plan)
    graph = values.pop("graph")
    header = json.dumps(values).encode()
    payload = len(header).to_bytes(4, "little") + header + graph
    return MAGIC + hashlib.sha256(payload).digest() + payload


def deserialize(data):
    """Return the Plan in some bytes. Raises ValueError where they are damaged or something else."""
    data = bytes(data)
    payload = data[36:]
    if data[:4] != MAGIC or hashlib.sha256(payload).digest() != data[4:36]:
        raise ValueError("Magic tag does not match")
    end = 4 + int.from_bytes(payload[:4], "little")
    return Plan(**json.loads(payload[4:end]), graph=payload[end:])
