"""The training loop: resumable, seeded, learning from whatever shards exist, from narrow to broad."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from augment import augment, noise_pool
from dataset import Shard, read_shard
from model import EOS, Trainee
from tqdm import tqdm

BATCH_ROWS = 2400
"""Rows (60 ms) in a batch, padding included."""
PEAK_RATE = 2e-3
WARM_UP = 400
EMPTY_SHARE = 0.03
"""Share of utterances replaced by noise alone, whose text is empty."""


@dataclass
class Corpus:
    """All shards in memory; `grow` picks up those that appeared since."""

    folder: Path
    shards: list[Shard] = field(default_factory=list)
    seen: set[Path] = field(default_factory=set)

    def grow(self) -> None:
        """Load the shards that are there and not loaded yet."""
        for path in sorted(self.folder.glob("[0-9]*[0-9].npz")):
            if path not in self.seen:
                self.seen.add(path)
                self.shards.append(read_shard(path))

    def mean_and_deviation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-bin statistics `[80]` of the first shards: the global CMVN."""
        frames = np.concatenate([shard.frames[::4].astype(np.float32) for shard in self.shards[:12]])
        return torch.from_numpy(frames.mean(0)), torch.from_numpy(frames.std(0))

    def batches(self, rng: np.random.Generator) -> Iterator[list[tuple[Shard, int]]]:
        """One pass over everything in batches of similar length, in random order."""
        items = [
            (int(length), s, i) for s, shard in enumerate(self.shards) for i, length in enumerate(np.diff(shard.bounds))
        ]
        jitter = rng.uniform(0.85, 1.15, len(items))
        order = sorted(range(len(items)), key=lambda k: items[k][0] * jitter[k])
        batches, batch, longest = [], [], 0
        for k in order:
            length, s, i = items[k]
            longest = max(longest, length)
            if batch and longest / 6 * (len(batch) + 1) > BATCH_ROWS:
                batches.append(batch)
                batch, longest = [], length
            batch.append((self.shards[s], i))
        batches.append(batch)
        rng.shuffle(batches)
        yield from batches


def collate(
    batch: list[tuple[Shard, int]], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded log-mel `[B, F, 80]` with lengths, targets `[B, N]` ended by `</s>` and padded with -1, with lengths."""
    spans = [(shard.bounds[i], shard.bounds[i + 1]) for shard, i in batch]
    texts = [shard.tokens[shard.token_bounds[i] : shard.token_bounds[i + 1]] for shard, i in batch]
    lengths = torch.tensor([int(stop - start) for start, stop in spans])
    frames = torch.full((len(batch), int(lengths.max()), 80), -10.0)
    targets = torch.full((len(batch), max(map(len, texts)) + 1), -1)
    target_lengths = torch.zeros(len(batch), dtype=torch.long)
    for row, ((shard, _), (start, stop), text) in enumerate(zip(batch, spans, texts, strict=True)):
        frames[row, : stop - start] = torch.from_numpy(shard.frames[start:stop].astype(np.float32))
        if rng.random() < EMPTY_SHARE:
            frames[row] = -15.9  # augmentation lays its noise over this silence
            text = text[:0]
        targets[row, : len(text)] = torch.from_numpy(text.astype(np.int64))
        targets[row, len(text)] = EOS
        target_lengths[row] = len(text) + 1
    return frames, lengths, targets[:, : int(target_lengths.max())], target_lengths


def rows(frames: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low frame rate on a padded batch: `[B, F, 80]` -> `[B, ceil(longest / 6), 560]`, edges repeated."""
    size = -(-int(lengths.max()) // 6)
    index = torch.arange(size)[:, None] * 6 + torch.arange(7)[None] - 3
    index = torch.minimum(index[None].clamp_min(0), (lengths - 1)[:, None, None])
    stacked = torch.gather(frames, 1, index.reshape(len(frames), -1, 1).expand(-1, -1, 80))
    return stacked.reshape(len(frames), size, 560), -(-lengths // 6)


def train(work: Path, steps: int, seed: int = 0, threads: int = 1) -> None:
    """Train to `steps`, resuming from `work/checkpoint.pt`; the averaged weights are in there under `average`."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    corpus = Corpus(work / "shards")
    corpus.grow()
    pool = noise_pool(np.random.default_rng(seed), corpus.shards[0])
    trainee = Trainee()
    average = torch.optim.swa_utils.AveragedModel(
        trainee, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizer = torch.optim.AdamW(trainee.parameters(), PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    step = epoch = 0
    mean, deviation = corpus.mean_and_deviation()
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        trainee.load_state_dict(state["trainee"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, epoch, mean, deviation = state["step"], state["epoch"], state["mean"], state["deviation"]

    def save() -> None:
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(
            {
                "trainee": trainee.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                "step": step, "epoch": epoch, "mean": mean, "deviation": deviation,
            },
            temporary,
        )  # fmt: skip
        temporary.rename(checkpoint)

    started, log = time.monotonic(), (work / "train.jsonl").open("a")
    trainee.train()
    bar = tqdm(total=steps, initial=step, desc="training", unit="step")
    while step < steps:
        corpus.grow()
        rng = np.random.default_rng((seed, epoch))
        for batch in corpus.batches(rng):
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * schedule(step, steps)
            frames, lengths, targets, target_lengths = collate(batch, rng)
            strength = min(1.0, 0.3 + step / 3000)
            frames, lengths = augment(frames, lengths, pool, mean, strength)
            features, row_lengths = rows((frames - mean) / deviation, lengths)
            loss, parts = trainee(features, row_lengths, targets, target_lengths)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainee.parameters(), 2.0)
            optimizer.step()
            average.update_parameters(trainee)
            step += 1
            bar.update()
            if step % 25 == 0:
                entry = {"step": step, "epoch": epoch, "shards": len(corpus.shards), **parts}
                entry["seconds"] = round(time.monotonic() - started, 1)
                print(json.dumps(entry), file=log, flush=True)
                bar.set_postfix({part: f"{value:.2f}" for part, value in parts.items()})
            if step % 250 == 0:
                save()
            if step >= steps:
                break
        epoch += 1
    bar.close()
    save()


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to a hundredth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))
