"""What the routes of the HTTP server share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge_asr.audio.decoders import Decoders
from edge_asr.config_server import HttpConfig
from edge_asr.serve.access import Access
from edge_asr.serve.admission import Admission
from edge_asr.serve.room import Room
from edge_asr.service import SpeechService


@dataclass(frozen=True, slots=True)
class Context:
    """The parts that answer a request; for the thread of the server's event loop."""

    service: SpeechService
    config: HttpConfig
    decoders: Decoders
    admission: Admission
    room: Room
    access: Access
    health: Callable[[], Mapping[str, Any]]
    """The state of the daemon, as it is published."""
