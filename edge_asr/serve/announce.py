"""Announcing the Wyoming server in the local network (zeroconf), so that Home Assistant finds it by itself."""

from __future__ import annotations

import logging
import socket
from typing import Any

from edge_asr.config_server import WyomingConfig, is_loopback

log = logging.getLogger(__name__)

KIND = "_wyoming._tcp.local."


class Announcement:
    """Something that the network knows of, until it is closed."""

    def __init__(self, zeroconf: Any, info: Any) -> None:
        self._zeroconf = zeroconf
        self._info = info

    async def close(self) -> None:
        """Take it back."""
        await self._zeroconf.async_unregister_service(self._info)
        await self._zeroconf.async_close()


async def announce(config: WyomingConfig, port: int, model: str) -> Announcement | None:
    """Announce the server where somebody from elsewhere may come; None: nobody may, or it cannot be announced."""
    if not (config.zeroconf and config.allow_networks) or is_loopback(config.host):
        return None
    try:
        from zeroconf import ServiceInfo
        from zeroconf.asyncio import AsyncZeroconf
    except ImportError:
        log.warning("wyoming is not announced: zeroconf is not installed: pip install 'edge-asr[serve]'")
        return None
    name = socket.gethostname().partition(".")[0] or "edge"
    info = ServiceInfo(
        KIND, f"edge_asr on {name}.{KIND}", port=port, parsed_addresses=_addresses(config.host),
        properties={"model": model}, server=f"{name}.local.",
    )  # fmt: skip
    try:
        zeroconf = AsyncZeroconf()
        await zeroconf.async_register_service(info, allow_name_change=True)
    except OSError as error:
        log.warning("wyoming is not announced: %s; clients need its address", error)
        return None
    return Announcement(zeroconf, info)


def _addresses(host: str) -> list[str]:
    """Return the addresses that clients can reach the server at."""
    if host not in ("0.0.0.0", "::"):
        return [host]
    found = {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)}
    return sorted(address for address in found if not is_loopback(address)) or ["127.0.0.1"]
