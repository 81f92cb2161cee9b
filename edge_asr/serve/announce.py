"""Announces the Wyoming server in the local network (zeroconf), so that Home Assistant finds it by itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_asr.config_server import WyomingConfig, is_loopback
from edge_asr.serve.access import AllowedNetworks

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncServiceInfo

log = logging.getLogger(__name__)

SERVICE = "_wyoming._tcp.local."
GROUP = ("224.0.0.251", 5353)
"""Where announcements go: the address that they would leave from is one that others reach us at."""
RETRY_S = 60.0
"""Until it is tried again: an appliance may start before its network is there."""
LABEL_BYTES = 63
"""The longest name that DNS takes."""
EVERYWHERE = ("0.0.0.0", "::")


class Announcement:
    """What the network is told until this is closed; for one event loop."""

    def __init__(self, host: str, port: int, networks: AllowedNetworks) -> None:
        """`host` and `port`: where the server listens; `networks`: who may come."""
        self._host = host
        self._port = port
        self._networks = networks
        self.name = ""
        """As it is announced; empty while it is not."""
        self._task = asyncio.create_task(self._keep(), name="zeroconf")

    @classmethod
    def of(cls, config: WyomingConfig, sock: socket.socket) -> Announcement | None:
        """Announce the server on this socket where that is wanted and somebody from elsewhere may come; else None."""
        host, port = sock.getsockname()[:2]
        if not config.zeroconf or not config.allow_networks or is_loopback(host):
            return None
        return cls(host, port, AllowedNetworks(config.allow_networks))

    async def close(self) -> None:
        """Take it back."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _keep(self) -> None:
        level = logging.WARNING
        while True:
            try:
                await self._announce()
            except ImportError:
                log.warning("wyoming is not announced: zeroconf is missing; install it: pip install 'edge_asr[serve]'")
                return
            except OSError as error:
                log.log(level, "wyoming is not announced (%s); it is tried again; its address works", error)
                level = logging.DEBUG
            await asyncio.sleep(RETRY_S)

    async def _announce(self) -> None:
        """Announce until cancelled. Raises ImportError, and OSError where it cannot be, as without a network."""
        from zeroconf import Error
        from zeroconf.asyncio import AsyncZeroconf

        addresses = reachable(self._host, self._networks)
        info = service_info(addresses, self._port)
        try:
            zeroconf = AsyncZeroconf(interfaces=addresses)  # elsewhere nobody may come
        except RuntimeError as error:  # an address has gone in the meantime
            raise OSError(str(error)) from error
        try:
            await zeroconf.async_register_service(info, allow_name_change=True)
            self.name = info.name
            log.info("wyoming is announced as %s", info.name)
            await asyncio.Event().wait()
        except Error as error:
            raise OSError(f"{type(error).__name__} {error}") from error
        finally:
            self.name = ""
            await zeroconf.async_close()


def service_info(addresses: Sequence[str], port: int) -> AsyncServiceInfo:
    """Return what is announced: this machine's name, its addresses and the port."""
    from zeroconf.asyncio import AsyncServiceInfo

    name = f"edge_asr {socket.gethostname().partition('.')[0]}".encode()[:LABEL_BYTES].decode(errors="ignore")
    return AsyncServiceInfo(SERVICE, f"{name}.{SERVICE}", port, parsed_addresses=list(addresses))


def reachable(host: str, networks: AllowedNetworks) -> list[str]:
    """Return the addresses at which clients reach a server that listens there. Raises OSError without a network.

    Where it listens on all: those in the networks that may come, or else the one that leads out.
    """
    if host not in EVERYWHERE:
        return [host]
    import ifaddr  # comes with zeroconf

    own = [str(ip.ip if ip.is_IPv4 else ip.ip[0]) for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    inside = [ip for ip in own if networks.admits(ip) and not is_loopback(ip)]
    return inside or [_leading_out()]


def _leading_out() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(GROUP)  # sends nothing
        return str(probe.getsockname()[0])
