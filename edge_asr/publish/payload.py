"""JSON as MQTT carries it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def to_payload(value: Mapping[str, Any]) -> str:
    r"""Return compact JSON in UTF-8; a byte of a file name that is no text stands in it as written out: `\\udcff`.

    JSON's own escape for it would be half a surrogate pair, which strict parsers refuse.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return LONE_SURROGATE.sub(lambda found: f"\\\\u{ord(found[0]):04x}", text)


def delivered(payload: str, *, seq: int | None, replayed: bool, age_s: float) -> dict[str, Any]:
    """Return a recorded transcript as it is delivered now: what is only known then takes the place of the defaults."""
    content: dict[str, Any] = json.loads(payload)
    content.update(seq=seq, replayed=replayed, age_s=round(max(0.0, age_s), 3))
    return content
