"""What scripts/test does where a program that tests need is missing, with everything around it replaced."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bundled import REPOSITORY

PROGRAMS = (
    "mosquitto",
    "mosquitto_sub",
    "mosquitto_passwd",
    "espeak-ng",
    "pulseaudio",
    "pactl",
    "paplay",
    "prometheus",
    "promtool",
    "chromium",
    "haproxy",
)
ELSEWHERE = ("/usr/sbin", "/usr/local/sbin")


def make_program(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real scripts/test, a `bin` with all programs, and nothing else that is real."""
    make_program(tmp_path / "scripts" / "setup")
    make_program(tmp_path / "scripts" / "check")
    make_program(tmp_path / "scripts" / "bindings")
    make_program(tmp_path / ".venv" / "bin" / "python", 'echo "tests run: $*"')
    shutil.copy(REPOSITORY / "scripts" / "test", tmp_path / "scripts" / "test")
    for name in PROGRAMS:
        make_program(tmp_path / "bin" / name)
    for name in ("bash", "dirname"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    return tmp_path


def run_tests(checkout: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [checkout / "scripts" / "test"],
        env={"PATH": os.fspath(checkout / "bin"), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


# Those of /usr/sbin cannot be hidden.
@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - {"mosquitto", "haproxy"}))
def test_continuous_integration_fails_where_tests_would_be_skipped(checkout: Path, name: str) -> None:
    if any(Path(folder, name).exists() for folder in ELSEWHERE):
        pytest.skip(f"{name} is installed where scripts/test looks besides PATH")
    (checkout / "bin" / name).unlink()
    result = run_tests(checkout, CI="true")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"test: not installed: {name}; CI is set, so no test may be skipped")
    assert len(result.stderr.splitlines()) == 1


def test_continuous_integration_runs_the_tests_where_all_is_there(checkout: Path) -> None:
    result = run_tests(checkout, CI="true")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("tests run: -m pytest")


def test_continuous_integration_fails_where_the_bindings_of_tensorrt_cannot_be_had(checkout: Path) -> None:
    make_program(checkout / "scripts" / "bindings", 'echo "bindings: not here: 11.4" >&2; exit 1')
    result = run_tests(checkout, CI="true")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("bindings: not here: 11.4\ntest: CI is set, so no test may be skipped")


def test_elsewhere_tests_may_be_skipped(checkout: Path) -> None:
    (checkout / "bin" / "espeak-ng").unlink()
    make_program(checkout / "scripts" / "bindings", "exit 1")
    assert run_tests(checkout).stdout.startswith("tests run: -m pytest")
