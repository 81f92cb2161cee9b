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
