"""Which device is meant by a name or a path, on a list as PortAudio gives it and a made-up /proc and /dev."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_asr.audio.devices import InputDevice, SoundCards, choose, describe, read_cards
from edge_asr.errors import AudioError

USB = "usb-C-Media_USB_PnP-00"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with two sound cards; card 1 is on USB."""
    for number, name in enumerate(("PCH", "Device")):
        card = tmp_path / f"proc/asound/card{number}"
        card.mkdir(parents=True)
        (card / "id").write_text(f"{name}\n")
    sound = tmp_path / "dev/snd"
    for folder in ("by-id", "by-path"):
        (sound / folder).mkdir(parents=True)
    for node in ("controlC0", "controlC1", "pcmC1D0c"):
        (sound / node).touch()
    (sound / "by-id" / USB).symlink_to("../controlC1")
    (sound / "by-path" / "pci-0000:00:1f.3").symlink_to("../controlC0")
    return tmp_path


def listed(root: Path) -> list[InputDevice]:
    cards = read_cards(root)
    return [
        describe(0, "HDA Intel PCH: ALC256 Analog (hw:0,0)", "ALSA", 2, 44_100, False, cards),
        describe(2, "USB PnP Sound Device: Audio (hw:1,0)", "ALSA", 1, 44_100, False, cards),
        describe(5, "pulse", "ALSA", 32, 44_100, False, cards),
        describe(6, "default", "ALSA", 32, 44_100, True, cards),
    ]


def test_a_device_is_known_by_what_outlives_a_replug(root: Path) -> None:
    usb = listed(root)[1]
    assert usb.name == "USB PnP Sound Device: Audio"
    assert usb.stable_id == "hw:CARD=Device,DEV=0"
    assert usb.paths == (f"/dev/snd/by-id/{USB}",)
    pulse = listed(root)[2]
    assert (pulse.stable_id, pulse.card, pulse.paths) == (None, None, ())


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ("default", 6),
        ("Default", 6),
        ("usb pnp", 2),
        ("USB PnP Sound Device: Audio", 2),
        ("pulse", 5),
        ("hw:CARD=Device,DEV=0", 2),
        ("plughw:CARD=PCH", 0),
        ("hw:PCH,0", 0),
    ],
)
def test_a_device_is_found_by_name_and_by_identifier(root: Path, wanted: str, index: int) -> None:
    assert choose(listed(root), wanted).index == index


@pytest.mark.parametrize(
    ("path", "index"),
    [(f"by-id/{USB}", 2), ("by-path/pci-0000:00:1f.3", 0), ("controlC1", 2), ("pcmC1D0c", 2)],
)
def test_a_device_is_found_by_path(root: Path, path: str, index: int) -> None:
    assert choose(listed(root), str(root / "dev/snd" / path)).index == index


def test_a_whole_name_goes_before_a_part_of_one() -> None:
    devices = [describe(i, name, "ALSA", 1, 16_000, False, SoundCards()) for i, name in enumerate(("Mic 2", "Mic"))]
    assert choose(devices, "mic").index == 1


def test_after_a_replug_the_same_name_means_the_new_number() -> None:
    cards = SoundCards({3: "Device"})
    device = describe(4, "USB PnP Sound Device: Audio (hw:3,0)", "ALSA", 1, 44_100, False, cards)
    assert choose([device], "USB PnP Sound Device: Audio").index == 4
    assert choose([device], "hw:CARD=Device,DEV=0").index == 4


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("hw:1,0", "microphone hw:1,0: the numbers of cards change; use hw:CARD=<its id>"),
        ("Røde", "microphone Røde: not found; there is 'HDA Intel PCH: ALC256 Analog' (hw:CARD=PCH,DEV=0"),
        ("hw:CARD=Gone,DEV=0", "microphone hw:CARD=Gone,DEV=0: not found"),
        ("/dev/snd/by-id/gone", "microphone /dev/snd/by-id/gone: not found"),
        (
            "u",
            "microphone u: could be each of 'USB PnP Sound Device: Audio' (hw:CARD=Device,DEV=0, "
            f"/dev/snd/by-id/{USB}), 'pulse', 'default'; name more of it",
        ),
    ],
)
def test_what_does_not_mean_one_device_is_refused_with_the_candidates(root: Path, wanted: str, message: str) -> None:
    with pytest.raises(AudioError) as caught:
        choose(listed(root), wanted)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_two_microphones_of_one_kind_are_told_apart_by_path() -> None:
    cards = SoundCards({1: "Device", 2: "Device_1"}, {1: ("/dev/snd/by-path/left",), 2: ("/dev/snd/by-path/right",)})
    twins = [describe(i, f"USB Mic: Audio (hw:{i},0)", "ALSA", 1, 48_000, False, cards) for i in (1, 2)]
    with pytest.raises(AudioError, match=r"by-path/left.*by-path/right"):
        choose(twins, "USB Mic")
    assert choose(twins, "hw:CARD=Device_1,DEV=0").index == 2


def test_without_any_device_the_remedy_is_to_plug_one_in() -> None:
    with pytest.raises(AudioError, match="there is no input device at all; plug one in"):
        choose([], "default")


def test_a_machine_without_sound_cards_has_none(tmp_path: Path) -> None:
    assert read_cards(tmp_path) == SoundCards()
