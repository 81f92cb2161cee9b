"""Augmentation on log-mel filterbanks while training, new every time: noise, colour, vocal tract, tempo, masks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from dataset import Shard
from features import filterbank

NOISE_FRAMES = 1200
BINS = 80


def noise_waveforms(rng: np.random.Generator, count: int) -> list[npt.NDArray[np.float32]]:
    """Coloured, gated, humming and bursting noises of 12 s at 16 kHz."""
    size = 16_000 * 12 + 400
    waveforms = []
    for _ in range(count):
        spectrum = np.fft.rfft(rng.standard_normal(size))
        frequency = np.maximum(np.fft.rfftfreq(size, 1 / 16_000), 20)
        spectrum *= frequency ** -rng.uniform(-0.3, 1.3)
        samples = np.fft.irfft(spectrum, size)
        samples /= np.std(samples)
        kind = rng.integers(4)
        time = np.arange(size) / 16_000
        if kind == 1:  # comes and goes, as traffic and machines do
            knots = np.exp(rng.standard_normal(40))
            samples *= np.interp(np.linspace(0, 39, size), np.arange(40), knots)
        elif kind == 2:  # mains and motors: harmonics of a tone
            base = rng.uniform(45, 400)
            tone = sum(np.sin(2 * np.pi * base * k * time) * rng.uniform(0, 1) / k for k in range(1, 12))
            samples = 0.2 * samples + tone
        elif kind == 3:  # knocks and doors
            envelope = np.full(size, 0.1)
            for _ in range(int(rng.integers(4, 24))):
                start = int(rng.integers(0, size - 8000))
                envelope[start : start + 8000] += rng.uniform(1, 8) * np.exp(-np.arange(8000) / rng.uniform(150, 3000))
            samples *= envelope
        waveforms.append((0.05 * samples / np.std(samples)).astype(np.float32))
    return waveforms


def noise_pool(rng: np.random.Generator, shard: Shard) -> torch.Tensor:
    """`[clips, 1200, 80]` log-mel noise, half of it the babble of several utterances; every clip has mean energy 1."""
    clips = [filterbank(samples)[:NOISE_FRAMES] for samples in noise_waveforms(rng, 96)]
    for _ in range(64):
        voices = []
        for _ in range(int(rng.integers(2, 8))):
            start = int(rng.integers(0, len(shard.frames) - NOISE_FRAMES))
            voices.append(shard.frames[start : start + NOISE_FRAMES].astype(np.float32))
        clips.append(np.logaddexp.reduce(voices, axis=0))
    pool = torch.from_numpy(np.stack(clips).astype(np.float32))
    return pool - torch.logsumexp(pool, (1, 2), keepdim=True) + np.log(NOISE_FRAMES * BINS)


def _warps() -> torch.Tensor:
    """`[21, 80, 80]`: matrices that stretch the mel axis by 0.88 to 1.12."""
    matrices = []
    for factor in np.linspace(0.88, 1.12, 21):
        position = np.clip(np.arange(BINS) * factor, 0, BINS - 1)
        low = np.minimum(position.astype(int), BINS - 2)
        matrix = np.zeros((BINS, BINS), np.float32)
        matrix[low, np.arange(BINS)] = 1 - (position - low)
        matrix[low + 1, np.arange(BINS)] += position - low
        matrices.append(matrix)
    return torch.from_numpy(np.stack(matrices))


WARPS = _warps()


def augment(
    frames: torch.Tensor, lengths: torch.Tensor, pool: torch.Tensor, mean: torch.Tensor, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment padded log-mel `[B, F, 80]`; returns it with its new lengths. `strength` 0..1 widens every range."""
    batch = len(frames)
    stretch = 1 + strength * float(torch.empty(1).uniform_(-0.15, 0.15))
    before = frames.shape[1]
    size = max(8, round(before * stretch))
    frames = torch.nn.functional.interpolate(frames.transpose(1, 2), size, mode="linear").transpose(1, 2)
    lengths = (lengths * (size / before)).long().clamp(8, size)

    factors = (10 + (torch.randn(batch) * 4 * strength).round()).clamp(0, 20).long()
    frames = torch.bmm(frames, WARPS[factors])

    knots = torch.randn(batch, 1, 7) * 1.2 * strength
    colour = torch.nn.functional.interpolate(knots, BINS, mode="linear", align_corners=True)
    frames = frames + colour

    live = torch.arange(size)[None] < lengths[:, None]
    energy = torch.logsumexp(frames.masked_fill(~live[..., None], -30), (1, 2)) - torch.log(lengths * float(BINS))
    signal_to_noise = torch.empty(batch).uniform_(12 - 14 * strength, 35) * (np.log(10) / 10)
    start = int(torch.randint(0, max(1, pool.shape[1] - size), (1,)))
    noise = pool[torch.randint(0, len(pool), (batch,)), start : start + size]
    if noise.shape[1] < size:
        noise = noise.repeat(1, -(-size // noise.shape[1]), 1)[:, :size]
    noise = noise + torch.randn(batch, 1, 7) @ _COLOUR_BASIS * 0.6
    level = energy - signal_to_noise
    level[torch.rand(batch) < 0.25] = -30
    frames = torch.logaddexp(frames, noise + level[:, None, None])

    time = torch.arange(size)[None, :, None]
    bins = torch.arange(BINS)[None, None]
    hidden = torch.zeros(batch, size, BINS, dtype=torch.bool)
    for _ in range(2):
        width = torch.rand(batch, 1, 1) * (4 + 10 * strength)
        first = torch.rand(batch, 1, 1) * lengths[:, None, None]
        hidden |= (time >= first) & (time < first + width)
        width = torch.rand(batch, 1, 1) * (6 + 16 * strength)
        first = torch.rand(batch, 1, 1) * BINS
        hidden |= (bins >= first) & (bins < first + width)
    return torch.where(hidden, mean, frames), lengths


_COLOUR_BASIS = torch.nn.functional.interpolate(torch.eye(7)[None], BINS, mode="linear", align_corners=True)[0]
