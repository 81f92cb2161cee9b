"""Any audio file, or the audio of a video, to 16 kHz mono float32, streamed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import soxr

from edge_asr.errors import AudioError
from edge_asr.types import SAMPLE_RATE, Samples

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

log = logging.getLogger(__name__)

BLOCK_SAMPLES = 16_384
"""Samples, at the rate of the file, that are converted in one go."""
EARLY_END_S = 0.1
"""A file that ends by more than this before its announced length is reported as cut off (coders pad by less)."""

_AGAIN = "record or copy it again"
_CONVERT = "convert it to WAV, FLAC, MP3, Ogg, M4A or WebM"
_OPEN_ERRORS: tuple[tuple[type[OSError], str], ...] = (
    (FileNotFoundError, "no such file; check the path"),
    (IsADirectoryError, "is a directory; name the files in it"),
    (PermissionError, "may not be read by this user; make it readable (chmod +r)"),
)
_MAGIC = (b"RIFF", b"RF64", b"OggS", b"fLaC", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf1", b"\x1aE\xdf\xa3", b"FORM")
"""How common audio files begin; MP4 has `ftyp` in bytes 4 to 7."""

_RIFF_UNKNOWN = 0x7FFF_0000
"""From here on the size in a WAV header means that the writer, into a pipe, did not know it."""


@dataclass
class _Progress:
    """What has been decoded of one file and what has not."""

    seconds: float = 0.0
    cut: bool = False
    """Whether a packet could not be decoded, or something is missing at the end."""


def decode(source: str | Path | BinaryIO, name: str | None = None) -> Iterator[Samples]:
    """Yield the sound of a file as blocks of `[n]` float32, 16 kHz, the mean of all channels, full scale +-1.

    `source` is a path or an open binary file, which stays open; `name` names it in messages. Memory is flat however
    long the file is. Mono 16-bit audio at 16 kHz comes out bit-exact (`int16 / 32768`). A damaged or cut file yields
    what could be decoded and logs a WARNING. Raises AudioError, on the first `next()`, where nothing can.
    """
    name = name or str(source if isinstance(source, (str, Path)) else getattr(source, "name", "audio"))
    progress = _Progress()
    with ExitStack() as stack:
        file = stack.enter_context(_open(source, name))
        progress.cut = _is_cut_riff(file)
        container = stack.enter_context(_open_container(file, name))
        if not container.streams.audio:
            raise AudioError(f"{name}: no audio in it; name a recording, or a video with sound")
        stream = container.streams.audio[0]
        announced_s = _announced_s(container, stream)
        try:
            for rate, frames in groupby(_frames(container, stream, progress), key=lambda frame: frame.sample_rate):
                yield from filter(len, _resample(_blocks(_mono(frame) for frame in frames), rate))
        except ValueError as error:  # a sample format or rate that cannot be converted
            raise AudioError(f"{name}: {error}; {_CONVERT}") from error
    if not progress.seconds:
        raise AudioError(f"{name}: cut off before the first audio frame, or of an unknown codec; {_AGAIN}")
    if progress.cut or progress.seconds < announced_s - EARLY_END_S:
        log.warning("%s: damaged or cut off; %.1f s could be decoded", name, progress.seconds)


def read(source: str | Path | BinaryIO, name: str | None = None) -> Samples:
    """Return all of a short file as one `[n]` float32 array; otherwise as `decode`."""
    return np.concatenate([np.zeros(0, np.float32), *decode(source, name)])


def _open(source: str | Path | BinaryIO, name: str) -> AbstractContextManager[BinaryIO]:
    """Open a path ourselves: ffmpeg would take `a:b.wav` for a protocol. Raises AudioError."""
    if not isinstance(source, (str, Path)):
        return nullcontext(source)
    try:
        return Path(source).open("rb")
    except ValueError as error:
        raise AudioError(f"{name!r}: is no path; correct the name") from error
    except OSError as error:
        why = next((why for kind, why in _OPEN_ERRORS if isinstance(error, kind)), f"{error.strerror}; check the path")
        raise AudioError(f"{name}: {why}") from error


def _open_container(file: BinaryIO, name: str) -> InputContainer:
    """Find out the format of an open file; raises AudioError."""
    import av

    try:
        # No protocols: a playlist must not make us open other files or addresses. Tags may be in any encoding.
        return av.open(file, "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")
    except av.FFmpegError as error:
        raise AudioError(f"{name}: {_why_not_audio(file)}") from error


def _is_cut_riff(file: BinaryIO) -> bool:
    """Tell whether a WAV file is shorter than its header says: ffmpeg trusts the size of the file instead."""
    if not file.seekable():
        return False
    head = file.read(8)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    announced = int.from_bytes(head[4:], "little")
    return head.startswith(b"RIFF") and size < announced < _RIFF_UNKNOWN


def _announced_s(container: InputContainer, stream: AudioStream) -> float:
    """Return the length that the header of the file gives, in seconds; 0 where it gives none."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0


def _why_not_audio(file: BinaryIO) -> str:
    """Return what is wrong with a file that ffmpeg does not recognise, and the remedy."""
    if file.seekable():
        file.seek(0)
        head = file.read(8)
        if not head:
            return f"is empty; {_AGAIN}"
        if head.startswith(_MAGIC) or head[4:] == b"ftyp":
            return f"damaged, or cut off before the first audio frame; {_AGAIN}"
    return f"not audio of any known format; {_CONVERT}"


def _frames(container: InputContainer, stream: AudioStream, progress: _Progress) -> Iterator[AudioFrame]:
    """Yield the frames of a stream, skipping the packets that cannot be decoded."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            progress.cut = True
            return
        try:
            frames = packet.decode()
        except av.FFmpegError:
            progress.cut = True
            continue
        for frame in frames:
            progress.seconds += frame.samples / frame.sample_rate
            yield frame


def _mono(frame: AudioFrame) -> Samples:
    """Return the mean of a frame's channels, `[n]` float32, full scale +-1."""
    data = frame.to_ndarray()
    channels = data if frame.format.is_planar else data.reshape(-1, frame.layout.nb_channels).T
    samples: Samples = channels.mean(axis=0, dtype=np.float32) if len(channels) > 1 else channels[0].astype(np.float32)
    if data.dtype.kind == "f":
        return np.nan_to_num(np.clip(samples, -1, 1))
    if data.dtype == np.uint8:
        samples -= 128
    samples *= 2.0 ** (1 - 8 * data.dtype.itemsize)
    return samples


def _blocks(arrays: Iterable[Samples]) -> Iterator[Samples]:
    """Join small arrays to blocks of about BLOCK_SAMPLES: frames are often only 20 ms."""
    pending: list[Samples] = []
    for array in arrays:
        pending.append(array)
        if sum(map(len, pending)) >= BLOCK_SAMPLES:
            yield np.concatenate(pending)
            pending = []
    if pending:
        yield np.concatenate(pending)


def _resample(blocks: Iterable[Samples], rate: int) -> Iterator[Samples]:
    """Yield `blocks` of `rate` Hz at 16 kHz, as long as before to within a sample."""
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    for block in blocks:
        yield np.clip(resampler.resample_chunk(block), -1, 1)
    yield np.clip(resampler.resample_chunk(np.zeros(0, np.float32), last=True), -1, 1)
