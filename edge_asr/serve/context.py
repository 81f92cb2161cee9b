"""What the routes of the HTTP server share."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from edge_asr.audio.decoders import Decoders
from edge_asr.config_server import HttpConfig
from edge_asr.serve.access import Access
from edge_asr.serve.admission import Admission
from edge_asr.serve.captions import Captions
from edge_asr.serve.room import Room
from edge_asr.service import SpeechService


class Appliance(Protocol):
    """What the network may see of the daemon, and change; for any thread."""

    def describe(self) -> Mapping[str, Any]:
        """Return the state, as it is published."""

    def command(self, name: str, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        """Carry out `mute`, `preset`, `listen`, `reload` or `rollback`; the future raises EdgeAsrError."""

    def levels(self) -> Mapping[str, float]:
        """Return the loudest moment of each source since it was asked last, in dB of full scale."""


@dataclass(frozen=True, slots=True)
class Context:
    """The parts that answer a request; for the thread of the server's event loop."""

    service: SpeechService
    config: HttpConfig
    decoders: Decoders
    admission: Admission
    room: Room
    access: Access
    appliance: Appliance
    captions: Captions
