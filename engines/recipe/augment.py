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


def _blur() -> torch.Tensor:
    """`[80, 80]`: a running mean over about 17 mel bins."""
    distance = np.abs(np.arange(BINS)[:, None] - np.arange(BINS)[None])
    weights = np.exp(-0.5 * (distance / 7.0) ** 2)
    return torch.from_numpy((weights / weights.sum(0)).astype(np.float32))


BLUR = _blur()


def augment(
    frames: torch.Tensor, lengths: torch.Tensor, pool: torch.Tensor, mean: torch.Tensor, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment padded log-mel `[B, F, 80]`; returns it with its new lengths. `strength` 0..1 widens every range."""
    frames, lengths = _bend_time(frames, lengths, strength)
    frames = _change_voice(frames, strength)
    frames = _add_noise(frames, lengths, pool, strength)
    return torch.where(_masks(frames, lengths, strength), mean, frames), lengths


def _bend_time(frames: torch.Tensor, lengths: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Another tempo, and durations that vary from syllable to syllable as the synthesiser's do not."""
    batch, before = frames.shape[:2]
    stretch = 1 + strength * torch.empty(batch).uniform_(-0.15, 0.15)
    after = (lengths * stretch).long().clamp_min(8)
    size = int(after.max())
    rates = torch.exp(0.25 * strength * torch.randn(batch, 1, max(2, size // 15)))
    position = torch.cumsum(torch.nn.functional.interpolate(rates, size, mode="linear", align_corners=True)[:, 0], 1)
    position = (position - position[:, :1]) / (position.gather(1, after[:, None] - 1) - position[:, :1])
    position = (position * (lengths - 1)[:, None]).clamp_max(before - 1)
    low = position.long().clamp_max(max(0, before - 2))
    share = (position - low)[..., None]
    index = low[..., None].expand(-1, -1, BINS)
    return frames.gather(1, index) * (1 - share) + frames.gather(1, (index + 1).clamp_max(before - 1)) * share, after


def _change_voice(frames: torch.Tensor, strength: float) -> torch.Tensor:
    """Another tract, colour and loudness over time, and more or less contrast between formants and valleys."""
    batch, size = frames.shape[:2]
    factors = (10 + (torch.randn(batch) * 4 * strength).round()).clamp(0, 20).long()
    frames = torch.bmm(frames, WARPS[factors])
    smooth = frames @ BLUR
    contrast = 1 + strength * torch.empty(batch, 1, 1).uniform_(-0.45, 0.2)
    frames = smooth + contrast * (frames - smooth)
    knots = torch.randn(batch, 1, 7) * 1.2 * strength
    colour = torch.nn.functional.interpolate(knots, BINS, mode="linear", align_corners=True)
    knots = torch.randn(batch, 1, max(2, size // 25)) * 0.5 * strength
    loudness = torch.nn.functional.interpolate(knots, size, mode="linear", align_corners=True)
    grain = torch.rand(batch, 1, 1) * 0.5 * strength  # a person's spectrum is rougher than a synthesiser's
    return frames + colour + loudness.transpose(1, 2) + grain * torch.randn_like(frames)


def _add_noise(frames: torch.Tensor, lengths: torch.Tensor, pool: torch.Tensor, strength: float) -> torch.Tensor:
    """Coloured noise, babble or almost nothing, at a ratio to the energy of the utterance."""
    batch, size = frames.shape[:2]
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
    return torch.logaddexp(frames, noise + level[:, None, None])


def _masks(frames: torch.Tensor, lengths: torch.Tensor, strength: float) -> torch.Tensor:
    """SpecAugment: two bands and two moments that are hidden, true where hidden."""
    batch, size = frames.shape[:2]
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
    return hidden


_COLOUR_BASIS = torch.nn.functional.interpolate(torch.eye(7)[None], BINS, mode="linear", align_corners=True)[0]
