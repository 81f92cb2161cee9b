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
EMPTY_SHARE = 0.03
"""Share of utterances replaced by noise alone, whose text is empty."""
MOST_ENDS = 8
"""Where the text is empty, the decoder is asked up to so many times, and `</s>` is the answer each time."""


@dataclass(frozen=True)
class Stage:
    """A part of the training that ends in a checkpoint of its own."""

    checkpoint: str
    begins_with: str | None
    """The checkpoint whose averaged weights it starts from; None: random weights."""
    folders: tuple[str, ...]
    """Of shards."""
    most_shards: int | None
    """Of each folder."""
    peak_rate: float
    warm_up: int
    """Steps until the peak rate."""
    first_strength: float
    """Of the augmentation at step 0; it is 1 after 3,000 steps at most."""
    decay: float
    """Of the moving average of the weights, a step."""


COMMANDS = Stage("checkpoint.pt", None, ("shards",), None, 2e-3, 400, 0.3, 0.998)
REFUSAL = Stage("refused.pt", "checkpoint.pt", ("shards", "foreign"), 24, 6e-4, 50, 1.0, 0.99)
"""The commands again, and among them speech that is none."""


@dataclass
class Corpus:
    """All shards in memory; `grow` picks up those that appeared since."""

    folders: list[Path]
    most_shards: int | None = None
    shards: list[Shard] = field(default_factory=list)
    seen: set[Path] = field(default_factory=set)

    def grow(self) -> None:
        """Load the shards that are there and not loaded yet."""
        for path in (path for folder in self.folders for path in self._found(folder)):
            if path not in self.seen:
                self.seen.add(path)
                self.shards.append(read_shard(path))

    def _found(self, folder: Path) -> list[Path]:
        return sorted(folder.glob("[0-9]*[0-9].npz"))[: self.most_shards]

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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded log-mel `[B, F, 80]` with lengths, targets `[B, N]` ended by `</s>` and padded with -1, with lengths.

    The last is the length of each text.
    """
    spans = [(shard.bounds[i], shard.bounds[i + 1]) for shard, i in batch]
    texts = [shard.tokens[shard.token_bounds[i] : shard.token_bounds[i + 1]] for shard, i in batch]
    lengths = torch.tensor([int(stop - start) for start, stop in spans])
    frames = torch.full((len(batch), int(lengths.max()), 80), -10.0)
    targets = torch.full((len(batch), max(MOST_ENDS, *map(len, texts)) + 1), -1)
    target_lengths = torch.zeros(len(batch), dtype=torch.long)
    text_lengths = torch.zeros(len(batch), dtype=torch.long)
    for row, ((shard, _), (start, stop), text) in enumerate(zip(batch, spans, texts, strict=True)):
        frames[row, : stop - start] = torch.from_numpy(shard.frames[start:stop].astype(np.float32))
        if rng.random() < EMPTY_SHARE:
            frames[row] = -15.9  # augmentation lays its noise over this silence
            text = text[:0]
        targets[row, : len(text)] = torch.from_numpy(text.astype(np.int64))
        ends = 1 if len(text) else int(rng.integers(1, MOST_ENDS + 1))
        targets[row, len(text) : len(text) + ends] = EOS
        text_lengths[row], target_lengths[row] = len(text), len(text) + ends
    return frames, lengths, targets[:, : int(target_lengths.max())], target_lengths, text_lengths


def rows(frames: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low frame rate on a padded batch: `[B, F, 80]` -> `[B, ceil(longest / 6), 560]`, edges repeated."""
    size = -(-int(lengths.max()) // 6)
    index = torch.arange(size)[:, None] * 6 + torch.arange(7)[None] - 3
    index = torch.minimum(index[None].clamp_min(0), (lengths - 1)[:, None, None])
    stacked = torch.gather(frames, 1, index.reshape(len(frames), -1, 1).expand(-1, -1, 80))
    return stacked.reshape(len(frames), size, 560), -(-lengths // 6)


def train(work: Path, steps: int, stage: Stage = COMMANDS, seed: int = 0, threads: int = 1) -> None:
    """Train to `steps`, resuming from the stage's checkpoint; the averaged weights are in there under `average`."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    corpus = Corpus([work / folder for folder in stage.folders], stage.most_shards)
    corpus.grow()
    pool = noise_pool(np.random.default_rng(seed), corpus.shards[0])
    trainee = Trainee()
    average = torch.optim.swa_utils.AveragedModel(
        trainee, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(stage.decay)
    )
    optimizer = torch.optim.AdamW(trainee.parameters(), stage.peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    step = epoch = 0
    mean, deviation = corpus.mean_and_deviation()
    checkpoint = work / stage.checkpoint
    if checkpoint.exists():
        state = torch.load(checkpoint)
        trainee.load_state_dict(state["trainee"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, epoch, mean, deviation = state["step"], state["epoch"], state["mean"], state["deviation"]
    elif stage.begins_with is not None:
        state = torch.load(work / stage.begins_with)
        average.load_state_dict(state["average"])
        trainee.load_state_dict(average.module.state_dict())
        mean, deviation = state["mean"], state["deviation"]

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
                group["lr"] = stage.peak_rate * schedule(step, steps, stage.warm_up)
            frames, lengths, targets, target_lengths, text_lengths = collate(batch, rng)
            strength = min(1.0, stage.first_strength + step / 3000)
            frames, lengths = augment(frames, lengths, pool, mean, strength)
            features, row_lengths = rows((frames - mean) / deviation, lengths)
            loss, parts = trainee(features, row_lengths, targets, target_lengths, text_lengths)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainee.parameters(), 2.0)
            optimizer.step()
            average.update_parameters(trainee)
            step += 1
            bar.update()
            if step % 25 == 0:
                entry = {"stage": stage.checkpoint, "step": step, "epoch": epoch, "shards": len(corpus.shards), **parts}
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


def schedule(step: int, steps: int, warm_up: int) -> float:
    """Linear warm-up, then half a cosine to a hundredth."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
