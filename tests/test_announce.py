"""What the network is told of the Wyoming server, seen by a real browser of zeroconf."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from types import SimpleNamespace

import ifaddr
import pytest
from mosquitto import PATIENCE_S
from test_service import until
from zeroconf import ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from edge_asr.config_server import WyomingConfig
from edge_asr.serve import announce
from edge_asr.serve.access import AllowedNetworks
from edge_asr.serve.announce import SERVICE, Announcement, reachable, service_info

NOBODY = AllowedNetworks(())
LOOPBACK = "127.0.0.1"


async def test_a_browser_finds_the_server_until_it_is_closed() -> None:
    seen: list[tuple[ServiceStateChange, str]] = []

    def note(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        seen.append((state_change, name))

    async with AsyncZeroconf(interfaces=[LOOPBACK]) as network:
        browser = AsyncServiceBrowser(network.zeroconf, SERVICE, handlers=[note])
        announcement = Announcement(LOOPBACK, 10_300, NOBODY)
        await until(lambda: seen)
        await until(lambda: announcement.name)
        name = announcement.name
        assert seen[0] == (ServiceStateChange.Added, name)
        info = AsyncServiceInfo(SERVICE, name)
        assert await info.async_request(network.zeroconf, PATIENCE_S * 1e3)
        assert (info.port, info.parsed_addresses()) == (10_300, [LOOPBACK])
        await announcement.close()
        await until(lambda: (ServiceStateChange.Removed, name) in seen)
        await browser.async_cancel()


@pytest.mark.parametrize(
    ("host", "config"),
    [
        (LOOPBACK, WyomingConfig(allow_networks=("192.0.2.0/24",))),
        ("0.0.0.0", WyomingConfig()),
        ("0.0.0.0", WyomingConfig(allow_networks=("192.0.2.0/24",), zeroconf=False)),
    ],
)
async def test_nothing_is_announced_where_nobody_may_come_or_it_is_not_wanted(host: str, config: WyomingConfig) -> None:
    with socket.create_server((host, 0)) as sock:
        assert Announcement.of(config, sock) is None


async def test_what_is_closed_at_once_has_said_nothing() -> None:
    with socket.create_server(("0.0.0.0", 0)) as sock:
        announcement = Announcement.of(WyomingConfig(allow_networks=("192.0.2.0/24",)), sock)
    assert announcement is not None
    await announcement.close()
    assert announcement.name == ""


def test_the_name_fits_whatever_the_machine_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "客厅" * 20 + ".local")
    info = service_info(["192.0.2.7"], 10_300)
    label = info.name.removesuffix("." + SERVICE)
    assert label.startswith("edge_asr 客厅")
    assert len(label.encode()) <= 63


def test_a_server_on_all_addresses_is_announced_where_clients_may_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def ip(address: str) -> SimpleNamespace:
        is_4 = ":" not in address
        return SimpleNamespace(ip=address if is_4 else (address, 0, 0), is_IPv4=is_4)

    adapters = [[LOOPBACK, "::1"], ["192.0.2.7", "fd00::7", "fe80::1"], ["172.17.0.1"]]
    found = [SimpleNamespace(ips=list(map(ip, addresses))) for addresses in adapters]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: found)
    assert reachable("0.0.0.0", AllowedNetworks(["192.0.2.0/24", "fd00::/8"])) == ["192.0.2.7", "fd00::7"]
    monkeypatch.setattr(announce, "_leading_out", lambda: "192.0.2.7")
    assert reachable("::", AllowedNetworks(["198.51.100.0/24"])) == ["192.0.2.7"]
    assert reachable("192.0.2.9", NOBODY) == ["192.0.2.9"]


async def test_without_the_library_there_is_a_warning_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    announcement = Announcement(LOOPBACK, 10_300, NOBODY)
    await asyncio.wait_for(announcement._task, PATIENCE_S)
    await announcement.close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "pip install 'edge_asr[serve]'" in record.getMessage()


async def test_without_a_network_it_is_tried_again_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def none_yet(host: str, networks: AllowedNetworks) -> list[str]:
        tried.append(host)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(announce, "reachable", none_yet)
    monkeypatch.setattr(announce, "RETRY_S", 0)
    announcement = Announcement("0.0.0.0", 10_300, NOBODY)
    await until(lambda: len(tried) > 3)
    await announcement.close()
    (record,) = caplog.records
    assert (record.levelno, "unreachable" in record.getMessage()) == (logging.WARNING, True)
