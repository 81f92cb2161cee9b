"""The scripts on a fresh clone, as somebody meets them who has done nothing else before."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from bundled import BUNDLE, REPOSITORY, transcripts


def git(*arguments: str | Path) -> str:
    result = subprocess.run(["git", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    return result.stdout


@pytest.mark.slow
def test_run_works_on_a_fresh_clone(tmp_path: Path) -> None:
    model = (BUNDLE / "model.onnx").relative_to(REPOSITORY)
    if not git("ls-tree", "--name-only", "HEAD", model):
        pytest.skip(f"{model} is not committed here")
    git("clone", "--quiet", "--no-hardlinks", REPOSITORY, tmp_path / "clone")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("EDGE_ASR_", "VIRTUAL_ENV"))}
    result = subprocess.run(
        ["scripts/run"],
        cwd=tmp_path / "clone",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    texts = transcripts().values()
    assert f"{len(texts)} of {len(texts)} sentences arrived" in result.stdout
    assert all(text in result.stdout for text in texts)
    dirty = subprocess.run(
        ["git", "status", "--porcelain"], cwd=tmp_path / "clone", capture_output=True, text=True, timeout=60
    )
    assert dirty.stdout == "", "everything that is made is ignored by git"
