"""Takes a seed file over, and tells whoever put it there what became of it: `python -m edge_asr.cli_seed FOLDER...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_asr.errors import ConfigError, EdgeAsrError
from edge_asr.seed import CONFIGURATION, SEEDS, erase, find_seed, take_over

MODELS = Path("/var/lib/edge_asr/installed")
"""Where scripts/install puts them."""
RESULT = "edge_asr-result.txt"
"""Beside the seed, for it is read on the same PC."""


def take_seed(folders: Sequence[Path], etc: Path, models: Path) -> None:
    """Take over the first seed file found, remove it, and write the outcome beside it. Raises EdgeAsrError."""
    seed = find_seed(folders)
    if seed is None:
        print(f"no {SEEDS[0]} in {', '.join(map(str, folders))}")
        return
    try:
        changed = take_over(seed, etc, models)
    except (ConfigError, OSError) as error:
        raise _refused(seed, error) from error
    outcome = "taken over" if changed else "nothing new in it"
    try:
        erase(seed)
    except OSError as error:
        raise EdgeAsrError(
            f"{seed}: {outcome}, but it cannot be removed ({error.strerror}); remove it, for it may hold a password"
        ) from error
    _tell(seed, f"{seed.name}: {outcome}, and removed.")
    print(f"{seed}: {outcome}; the configuration is {etc / CONFIGURATION}")


def _refused(seed: Path, error: ConfigError | OSError) -> EdgeAsrError:
    _tell(
        seed,
        f"{seed.name} was NOT taken over; the appliance keeps the configuration it had. Correct this, and start it"
        f" again. Until then the file stays here, with any password in it.\n{error}",
    )
    if isinstance(error, ConfigError):
        return ConfigError(f"{seed} was not taken over: {error}")
    return EdgeAsrError(f"{seed} was not taken over: {error}")


def _tell(seed: Path, text: str) -> None:
    try:
        # The lines of every PC's simplest editor.
        (seed.parent / RESULT).write_text(f"{text}\n", encoding="utf-8", newline="\r\n")
    except OSError as error:  # a partition that is full or cannot be written: the journal has it too
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)


def main() -> None:
    """Take over the first seed file in the folders given; exit code 2: it is wrong."""
    parser = argparse.ArgumentParser(prog="edge-asr-seed", description="Take over a seed file, and remove it.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=f"where {SEEDS[0]} may lie")
    parser.add_argument("--etc", type=Path, default=Path("/etc/edge_asr"), help=f"the folder of {CONFIGURATION}")
    parser.add_argument("--models", type=Path, default=MODELS, help="models that may be named as they are there")
    given = parser.parse_args()
    try:
        take_seed(given.folders, given.etc, given.models)
    except EdgeAsrError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
