"""Make the bundled model: `python engines/recipe`. Seeded, resumable: run it again after an interruption."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARDS = 70
FIRST_SHARDS = 16
"""Training starts once these are there; the others follow while it runs."""
FOREIGN_SHARDS = 12
STEPS = 10_500
REFUSAL_STEPS = 1_350


def main() -> None:
    """Synthesise, train on commands, then on what is none as well, export, evaluate."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--work", type=Path, default=HERE / "work", help="data and checkpoints")
    arguments.add_argument("--out", type=Path, default=HERE.parent / "paraformer-tiny", help="the bundle")
    arguments.add_argument("--steps", type=int, default=STEPS)
    arguments.add_argument("--refusal-steps", type=int, default=REFUSAL_STEPS)
    arguments.add_argument("--shards", type=int, default=SHARDS, help="of 1,000 utterances each")
    arguments.add_argument("--foreign-shards", type=int, default=FOREIGN_SHARDS, help="the same, of foreign speech")
    arguments.add_argument("--recordings", type=Path, help="AISHELL's sample pack, to evaluate on a human voice")
    options = arguments.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    options.work.mkdir(parents=True, exist_ok=True)

    from dataset import make_shard
    from foreign import make_foreign_shard
    from tqdm import tqdm

    make = partial(make_shard, options.work)
    with get_context("spawn").Pool(max(1, (os.cpu_count() or 1) - 1)) as pool:
        first = min(FIRST_SHARDS, options.shards)
        for _ in tqdm(pool.imap(make, range(first)), total=first, desc="synthesis"):
            pass
        rest = pool.map_async(make, range(first, options.shards))
        foreign = pool.map_async(partial(make_foreign_shard, options.work), range(options.foreign_shards))
        from train import COMMANDS, REFUSAL, train

        train(options.work, options.steps, COMMANDS)
        rest.wait()
        foreign.wait()
        train(options.work, options.refusal_steps, REFUSAL)

    from evaluate import evaluate
    from export import export
    from samples import write_samples

    export(options.work / COMMANDS.checkpoint, options.work / REFUSAL.checkpoint, options.out)
    write_samples(options.out / "samples", options.work)
    rates = evaluate(options.out, options.work, options.recordings)
    (options.out / "evaluation.json").write_text(json.dumps(rates, ensure_ascii=False, indent=2) + "\n")
    print(json.dumps(rates, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
