"""The input devices that PortAudio finds, and which of them is meant by a name or a path that outlives a replug."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_asr.errors import AudioError

DEFAULT = "default"
"""Names the device that the system calls its default."""
LIST_THEM = "list them with: edge-asr devices"

_HARDWARE = re.compile(r"\s*\(hw:(\d+),(\d+)\)$")
"""How PortAudio ends the name of an ALSA device: card and device, of which the first changes at a replug."""
_ALSA_NAME = re.compile(r"(?:plug)?hw:(?:CARD=)?(?P<card>[^,=]+)(?:,(?:DEV=)?(?P<device>\d+))?$")
_NODE = re.compile(r"(?:controlC(?P<card>\d+)|pcmC(?P<pcm_card>\d+)D(?P<device>\d+)c)$")


@dataclass(frozen=True, slots=True)
class SoundCards:
    """What the kernel says of its sound cards, by their present numbers."""

    ids: Mapping[int, str] = field(default_factory=dict)
    """ALSA's identifier of each card: `Device`, or what a udev rule set."""
    paths: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """The links in /dev/snd/by-id and by-path that lead to each card."""


@dataclass(frozen=True, slots=True)
class InputDevice:
    """A device to record from, as it is now."""

    index: int
    """PortAudio's number of it: valid until PortAudio looks again, and only in the process that looked."""
    name: str
    """What PortAudio calls it, without the number of its card."""
    host_api: str
    channels: int
    rate: int
    """Native samples per second, as far as PortAudio knows."""
    is_default: bool = False
    card: int | None = None
    """The card's present number; null where it is no ALSA hardware."""
    stable_id: str | None = None
    """ALSA's name of it that outlives a replug: `hw:CARD=Device,DEV=0`."""
    paths: tuple[str, ...] = ()
    """Links below /dev/snd that name the same card."""

    def __str__(self) -> str:
        told = ", ".join(filter(None, (self.stable_id, *self.paths)))
        return f"{self.name!r} ({told})" if told else repr(self.name)


def read_cards(root: Path = Path("/")) -> SoundCards:
    """Return the sound cards below `/proc/asound` and `/dev/snd`: none where there are none."""
    ids: dict[int, str] = {}
    for folder in sorted((root / "proc/asound").glob("card[0-9]*")):
        try:
            ids[int(folder.name.removeprefix("card"))] = (folder / "id").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):  # unplugged while we looked
            continue
    paths: dict[int, tuple[str, ...]] = {}
    for link in sorted((root / "dev/snd").glob("by-*/*")):
        if (found := _NODE.match(link.resolve().name)) and found["card"]:
            card = int(found["card"])
            paths[card] = (*paths.get(card, ()), f"/{link.relative_to(root)}")
    return SoundCards(ids, paths)


def describe(
    index: int, name: str, host_api: str, channels: int, rate: int, is_default: bool, cards: SoundCards
) -> InputDevice:
    """Return a device of PortAudio's list with what is known of its card."""
    hardware = _HARDWARE.search(name)
    if hardware is None:
        return InputDevice(index, name, host_api, channels, rate, is_default)
    card, number = int(hardware[1]), int(hardware[2])
    stable = f"hw:CARD={cards.ids[card]},DEV={number}" if card in cards.ids else None
    plain = name[: hardware.start()] or name
    return InputDevice(index, plain, host_api, channels, rate, is_default, card, stable, cards.paths.get(card, ()))


def choose(devices: Sequence[InputDevice], wanted: str) -> InputDevice:
    """Return the one device that `wanted` means; see `matching`. Raises AudioError where there is none, or more."""
    found = matching(devices, wanted)
    if len(found) > 1:
        raise AudioError(f"microphone {wanted}: could be each of {_listed(found)}; name more of it, or its path")
    return found[0]


def matching(devices: Sequence[InputDevice], wanted: str) -> list[InputDevice]:
    """Return the devices that `wanted` may mean. Raises AudioError where there is none.

    `wanted` is `default`, a link or node below /dev/snd, an ALSA name with the card's identifier
    (`hw:CARD=Device,DEV=0`), or a name: whole or a part of it, in any case.
    """
    if not devices:
        raise AudioError(f"microphone {wanted}: there is no input device at all; plug one in")
    if wanted.startswith("/"):
        found = [device for device in devices if _is_at(device, wanted)]
    elif alsa := _ALSA_NAME.match(wanted):
        if alsa["card"].isdigit():
            raise AudioError(f"microphone {wanted}: the numbers of cards change; use hw:CARD=<its id>, {LIST_THEM}")
        found = [device for device in devices if _has_id(device, alsa["card"], int(alsa["device"] or 0))]
    else:
        found = _called(devices, wanted)
    if found:
        return found
    raise AudioError(f"microphone {wanted}: not found; there is {_listed(devices)}; plug it in, or name one of these")


def _called(devices: Sequence[InputDevice], wanted: str) -> list[InputDevice]:
    """Return the devices called so; a whole name goes before a part of one."""
    if wanted.lower() == DEFAULT and (default := [device for device in devices if device.is_default]):
        return default
    whole = [device for device in devices if device.name.lower() == wanted.lower()]
    return whole or [device for device in devices if wanted.lower() in device.name.lower()]


def _has_id(device: InputDevice, card: str, number: int) -> bool:
    return device.stable_id == f"hw:CARD={card},DEV={number}"


def _is_at(device: InputDevice, path: str) -> bool:
    node = _NODE.match(Path(path).resolve().name)
    if node is None or device.card is None:
        return False
    if node["card"]:
        return device.card == int(node["card"])
    return device.card == int(node["pcm_card"]) and str(device.stable_id).endswith(f"DEV={node['device']}")


def _listed(devices: Sequence[InputDevice]) -> str:
    return ", ".join(map(str, devices))
