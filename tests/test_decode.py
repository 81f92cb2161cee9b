"""Decoding: every format comes out as 16 kHz mono of the right length, every bad file as one clear line."""

from __future__ import annotations

import io
import logging
import os
import struct
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_asr.audio.decode import decode, read
from edge_asr.errors import AudioError

Int16 = npt.NDArray[np.int16]


def tone(seconds: float, rate: int, channels: int = 1) -> Int16:
    """Return a 440 Hz sine at half scale, `[channels, n]`."""
    wave_form = np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return np.tile((wave_form * 16384).astype(np.int16), (channels, 1))


def write_wav(path: Path, samples: Int16, rate: int = 16_000) -> Path:
    """Write `[channels, n]` int16 as a WAV file."""
    with wave.open(str(path), "wb") as out:
        out.setnchannels(len(samples))
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.T.astype("<i2").tobytes())
    return path


def encode(path: Path, samples: Int16, rate: int, codec: str, video: bool = False) -> Path:
    """Write `[channels, n]` int16 in the format that the ending of `path` names, with a picture where `video`."""
    import av

    layout = "stereo" if len(samples) == 2 else "mono"
    with av.open(str(path), "w") as container:
        # As typed by the PyAV that Python 3.10 takes, it could be a subtitle.
        stream: Any = container.add_stream(codec, rate=rate, layout=layout)
        picture = container.add_stream("libvpx", rate=1, width=16, height=16, pix_fmt="yuv420p") if video else None
        if picture is not None:
            container.mux(picture.encode(av.VideoFrame(16, 16, "yuv420p")))
            container.mux(picture.encode(None))
        context = stream.codec_context
        resampler = av.AudioResampler(context.format, layout, rate, frame_size=context.frame_size)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="s16p", layout=layout)
        frame.sample_rate = rate
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path


def pitch(samples: npt.NDArray[np.float32]) -> float:
    """Return the strongest frequency of 16 kHz sound in Hz."""
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * 16_000 / len(samples))


def test_16_bit_mono_at_16_khz_is_bit_exact(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, (1, 50_001)).astype(np.int16)
    decoded = read(write_wav(tmp_path / "a.wav", samples))
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, samples[0] / 32768)


def test_stereo_is_the_mean_of_the_channels(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, (2, 5_000)).astype(np.int16)
    np.testing.assert_array_equal(read(write_wav(tmp_path / "a.wav", samples)), samples.mean(axis=0) / 32768)


def test_8_bit_is_centred_on_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(1)
        out.setframerate(16_000)
        out.writeframes(bytes(range(256)))
    np.testing.assert_array_equal(read(path), (np.arange(256) - 128) / 128)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_loses_and_moves_nothing(tmp_path: Path, rate: int) -> None:
    decoded = read(write_wav(tmp_path / "a.wav", tone(3.1, rate, channels=2), rate))
    expected = tone(3.1, 16_000)[0] / 32768
    assert abs(len(decoded) - len(expected)) <= 1
    middle = slice(1_000, len(expected) - 1_000)  # a filter rings where a tone begins and ends
    np.testing.assert_allclose(decoded[middle], expected[middle], atol=2e-4)


@pytest.mark.parametrize(
    ("ending", "codec", "rate", "channels"),
    [
        ("mp3", "libmp3lame", 44_100, 2),
        ("ogg", "libopus", 48_000, 1),
        ("m4a", "aac", 48_000, 2),
        ("flac", "flac", 16_000, 1),
        ("webm", "libopus", 48_000, 2),
        ("aiff", "pcm_s16be", 22_050, 1),
        ("wav", "pcm_s24le", 96_000, 2),
        ("wav", "pcm_f32le", 48_000, 1),
        ("wav", "pcm_u8", 8_000, 1),
        ("wav", "pcm_mulaw", 8_000, 1),
    ],
)
def test_every_format_has_its_length_and_pitch(
    tmp_path: Path, ending: str, codec: str, rate: int, channels: int
) -> None:
    decoded = read(encode(tmp_path / f"a.{ending}", tone(2, rate, channels), rate, codec))
    assert 32_000 - 1 <= len(decoded) <= 32_000 + 0.15 * 16_000  # AAC pads by up to three frames
    assert pitch(decoded[4_000:28_000]) == pytest.approx(440, abs=1)
    assert np.abs(decoded[4_000:28_000]).max() == pytest.approx(0.5, abs=0.03)


def test_the_sound_of_a_video_is_decoded(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.webm", tone(1, 48_000), 48_000, "libopus", video=True)
    assert pitch(read(path)) == pytest.approx(440, abs=1)


@pytest.mark.parametrize(("ending", "codec"), [("wav", "pcm_s16le"), ("mp3", "libmp3lame"), ("flac", "flac")])
def test_fifty_milliseconds_are_enough(tmp_path: Path, ending: str, codec: str) -> None:
    assert len(read(encode(tmp_path / f"a.{ending}", tone(0.05, 16_000), 16_000, codec))) == 800


def test_less_than_a_sample_is_silence_not_an_error(tmp_path: Path) -> None:
    assert len(read(write_wav(tmp_path / "a.wav", tone(1 / 96_000, 96_000), 96_000))) == 0


def test_an_open_file_is_decoded_and_stays_open(tmp_path: Path) -> None:
    file = io.BytesIO(write_wav(tmp_path / "a.wav", tone(1, 16_000)).read_bytes())
    assert len(read(file)) == 16_000
    assert not file.closed


def test_a_pipe_is_decoded(tmp_path: Path) -> None:
    data = write_wav(tmp_path / "a.wav", tone(0.5, 16_000)).read_bytes()
    receiver, sender = os.pipe()
    os.write(sender, data)
    os.close(sender)
    with os.fdopen(receiver, "rb") as file:
        assert len(read(file)) == 8_000


def test_a_colon_in_the_name_is_no_protocol(tmp_path: Path) -> None:
    assert len(read(write_wav(tmp_path / "http:a.wav", tone(0.1, 16_000)))) == 1_600


def test_what_is_not_a_number_becomes_silence_and_what_is_too_loud_is_clipped(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 52, b"WAVE", b"fmt ", 16, 3, 1, 16_000, 64_000, 4, 32, b"data", 16
    )
    path.write_bytes(header + np.array([np.nan, np.inf, -7, 0.25], "<f4").tobytes())
    np.testing.assert_array_equal(read(path), [0, 1, -1, 0.25])


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("wav", "pcm_s16le"), ("mp3", "libmp3lame"), ("flac", "flac"), ("webm", "libopus"), ("aiff", "pcm_s16be")],
)
def test_a_truncated_file_yields_what_is_there_and_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], ending: str, codec: str
) -> None:
    path = encode(tmp_path / f"a.{ending}", tone(4, 48_000), 48_000, codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        decoded = read(path)
    assert 16_000 < len(decoded) < 48_000
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert capfd.readouterr().err == ""


def test_a_whole_file_does_not_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for ending, codec in [("wav", "pcm_s16le"), ("mp3", "libmp3lame"), ("m4a", "aac"), ("webm", "libopus")]:
        read(encode(tmp_path / f"a.{ending}", tone(1.01, 48_000), 48_000, codec))
    assert caplog.records == []


def test_a_wav_of_unknown_length_does_not_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_wav(tmp_path / "a.wav", tone(1, 16_000))
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert len(read(path)) == 16_000
    assert caplog.records == []


def test_damage_in_the_middle_costs_only_the_middle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = encode(tmp_path / "a.mp3", tone(10, 16_000), 16_000, "libmp3lame")
    data = path.read_bytes()
    path.write_bytes(data[:10_000] + bytes(2_000) + data[12_000:])
    assert 8 * 16_000 < len(read(path)) < 10 * 16_000
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001"
    "a5f645400000000049454e44ae426082"
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"Not audio, only text.\n" * 200, "not audio"),
        (np.random.default_rng(0).bytes(50_000), "not audio"),
        (PNG, "no audio"),
    ],
    ids=["empty", "text", "noise", "image"],
)
def test_a_file_without_sound_is_one_clear_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, expected: str
) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=expected) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("ending", "codec"), [("wav", "pcm_s16le"), ("m4a", "aac"), ("ogg", "libopus"), ("flac", "flac")]
)
@pytest.mark.parametrize("size", [12, 44])
def test_a_file_cut_before_its_first_frame_says_so(tmp_path: Path, ending: str, codec: str, size: int) -> None:
    path = encode(tmp_path / f"a.{ending}", tone(1, 48_000), 48_000, codec)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(AudioError, match=r"cut off before the first audio frame.*; record or copy it again"):
        read(path)


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nprivate.mp3\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile private.mp3\n",
    ],
    ids=["hls", "concat"],
)
def test_a_playlist_opens_no_other_file(tmp_path: Path, playlist: str) -> None:
    encode(tmp_path / "private.mp3", tone(1, 16_000), 16_000, "libmp3lame")
    path = tmp_path / "list.m3u8"
    path.write_text(playlist)
    with path.open("rb") as file, pytest.raises(AudioError, match="not audio"):
        read(file)


def test_missing_and_directory_are_named_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(AudioError, match=r"^\./none\.wav: no such file"):
        read("./none.wav")
    with pytest.raises(AudioError, match=r"^folder: is a directory"):
        read("folder")


def test_a_forbidden_file_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:  # root may read everything, so the refusal is made here
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AudioError, match=r"a\.wav: may not be read.*chmod"):
        read(tmp_path / "a.wav")


def test_importing_the_package_does_not_load_av() -> None:
    code = "import sys, edge_asr.audio.file, edge_asr.audio.stdin; sys.exit('av' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


PEAK = """
import sys
from edge_asr.audio.decode import decode

def peak_kb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

blocks, samples, early = decode(sys.argv[1]), 0, 0
for number, block in enumerate(blocks):
    samples += len(block)
    if number == 5:
        early = peak_kb()
print(samples, peak_kb() - early)
"""


@pytest.mark.parametrize("minutes", [10, pytest.param(180, marks=pytest.mark.slow)])
def test_memory_is_flat_however_long_the_file(tmp_path: Path, minutes: int) -> None:
    path = tmp_path / "long.wav"
    size = minutes * 60 * 8_000
    with path.open("wb") as file:  # 8 kHz, 8 bits; sparse
        file.write(struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, 8_000, 8_000, 1, 8))
        file.write(struct.pack("<4sI", b"data", size))
        file.truncate(44 + size)
    result = subprocess.run([sys.executable, "-c", PEAK, str(path)], check=True, capture_output=True, text=True)
    samples, growth_kb = map(int, result.stdout.split())
    assert samples == 2 * size
    assert growth_kb < 8_000  # all samples of ten minutes would be 38 MB


def test_recordings_of_people_are_decoded_as_wave_reads_them() -> None:
    folder = Path(__file__).parents[2] / "shared" / "data" / "speech" / "aishell_sample_zh" / "commands"
    paths = sorted(folder.glob("*.wav"))[:5]
    if not paths:
        pytest.skip(f"no recordings in {folder}")
    for path in paths:
        with wave.open(str(path)) as recording:
            expected = np.frombuffer(recording.readframes(recording.getnframes()), "<i2") / 32768
        np.testing.assert_array_equal(np.concatenate(list(decode(path))), expected)
