"""The stick's maker, the remover and the container's unit, as far as they run without a system of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bundled import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
CONTAINER = REPOSITORY / "systemd" / "edge-asr-container.service"


def run(*command: str | Path, timeout: float = 60, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], env={**os.environ, **environ}, capture_output=True, text=True, timeout=timeout
    )


def make_wheel(folder: Path, name: str, *requirements: str, tag: str = "py3-none-any") -> None:
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    with zipfile.ZipFile(folder / f"{name}-1-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{name}-1.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}-1.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{name}-1.dist-info/RECORD", "")


@pytest.mark.parametrize(
    ("python", "machine", "wanted"),
    [
        ("3.10", "aarch64", {"top", "backport", "arm"}),
        ("3.12", "aarch64", {"top", "arm"}),
        ("3.12", "x86_64", {"top"}),
    ],
)
def test_requirements_are_those_of_the_appliance(tmp_path: Path, python: str, machine: str, wanted: set[str]) -> None:
    (tmp_path / "from").mkdir()
    make_wheel(tmp_path / "from", "top", 'backport; python_version < "3.11"', 'arm; platform_machine == "aarch64"')
    make_wheel(tmp_path / "from", "backport")
    make_wheel(tmp_path / "from", "arm", tag="cp310-abi3-manylinux_2_28_aarch64")
    result = run(
        sys.executable, SCRIPTS / "pip_for.py", python, machine, "download", "--quiet", "--only-binary=:all:",
        "--python-version", python, "--platform", f"manylinux_2_28_{machine}", "--no-index",
        "--find-links", tmp_path / "from", "--dest", tmp_path / "to", "top",
        PIP_CONFIG_FILE=os.devnull, PIP_DISABLE_PIP_VERSION_CHECK="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert {file.name.partition("-")[0] for file in (tmp_path / "to").iterdir()} == wanted


@pytest.mark.parametrize(
    ("arguments", "exit_code", "reason"),
    [
        ([], 2, "name the folder"),
        (["a", "b"], 2, "one folder only"),
        (["--modle", "x", "a"], 2, "unknown option --modle"),
        (["a", "--model"], 2, "--model needs a value"),
        (["--python", "3.8", "a"], 2, "no Python 3.8"),
        (["--platform", "riscv64", "a"], 2, "no platform riscv64"),
        (["--model", "paraformer-none", "a"], 3, "edge-asr models pull paraformer-none"),
        (["--model", ".", "a"], 3, "is no model"),
        (["."], 2, "is there already"),
    ],
)
def test_a_bundle_that_cannot_be_made_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], exit_code: int, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(SCRIPTS / "bundle", *arguments, PYTHON=sys.executable)
    assert (result.returncode, result.stderr.count("\n")) == (exit_code, 1), result.stderr
    assert reason in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    # A Python that answers, but makes no environment.
    result = run(SCRIPTS / "bundle", "--python", "3.10", tmp_path / "stick", PYTHON="false", TMPDIR=str(temporary))
    assert result.returncode == 1
    assert "python3-venv" in result.stderr
    assert [*tmp_path.iterdir(), *temporary.iterdir()] == [temporary]


@pytest.mark.slow
def test_a_bundle_has_all_that_the_appliance_needs(tmp_path: Path) -> None:
    """From a package index, so it needs a network."""
    stick, copy = tmp_path / "stick", tmp_path / "copy"
    made = run(SCRIPTS / "bundle", stick, timeout=900, PYTHON=sys.executable)
    assert made.returncode == 0, made.stderr
    assert made.stderr.splitlines()[-1].startswith(f"bundle: {stick} is made")
    checked = subprocess.run(["sha256sum", "--quiet", "--check", "SHA256SUMS"], cwd=stick, capture_output=True)
    assert checked.returncode == 0, checked.stdout
    for name in ("scripts/install", "scripts/uninstall", "systemd/edge-asr.service", "docs/mqtt.md", "config.yaml"):
        assert (stick / name).is_file(), name
    assert len(list((stick / "pip").glob("pip-*-py3-none-any.whl"))) == 1
    assert os.access(stick / "scripts/install", os.X_OK)
    run(sys.executable, "-m", "venv", copy)
    wheels = sorted((stick / "wheels").iterdir())
    # Whole without any index: pip itself looks for what they require.
    installed = run(copy / "bin/pip", "install", "--quiet", "--no-index", *wheels, timeout=300)
    assert installed.returncode == 0, installed.stderr
    spoken = run(copy / "bin/edge-asr", "transcribe", "--model", stick / "models/paraformer-tiny", *samples())
    assert spoken.returncode == 0, spoken.stderr
    other = tmp_path / "jetson"
    made = run(SCRIPTS / "bundle", "--python", "3.10", "--platform", "aarch64", other, timeout=900)
    assert made.returncode == 0, made.stderr
    tags = {file.stem.rpartition("-")[2] for file in (other / "wheels").iterdir()}
    assert all(tag == "any" or "aarch64" in tag for tag in tags), tags
    own = [next((folder / "wheels").glob("edge_asr-*.whl")).read_bytes() for folder in (stick, other)]
    assert own[0] == own[1], "the same sources give the same wheel"


def samples() -> list[Path]:
    return sorted((REPOSITORY / "engines/paraformer-tiny/samples").glob("*.wav"))[:1]


def test_uninstall_refuses_what_it_does_not_know() -> None:
    result = run(SCRIPTS / "uninstall", "--purgee")
    assert result.returncode == 2
    assert "unknown options --purgee" in result.stderr


def commands(key: str) -> list[str]:
    """Return what the container's unit gives to a shell, as systemd hands it over."""
    text = CONTAINER.read_text().replace("\\\n", "")
    found: list[str] = re.findall(rf"^{key}=-?/bin/sh -c '(.*)'$", text, re.MULTILINE)
    return [command.replace("$$", "$") for command in found]


def test_the_container_gets_what_the_service_needs(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    engine.chmod(0o755)
    account = tmp_path / "id"
    account.write_text("#!/bin/sh\necho 987\n")
    account.chmod(0o755)
    (start,) = commands("ExecStart")
    result = run(
        "/bin/sh", "-c", start,
        ENGINE=str(engine), IMAGE="x/y:z", GPU="--runtime nvidia", PATH=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    given = result.stdout.splitlines()
    assert (given[0], given[-4:]) == ("run", ["x/y:z", "run", "--config", "/etc/edge_asr/config.yaml"])
    assert given[given.index("--runtime") + 1] == "nvidia"
    assert given[given.index("--user") + 1] == "987:987"
    assert given[given.index("--group-add") + 1].isdecimal()
    assert {"--read-only", "no-new-privileges", "/dev/snd:/dev/snd", "c 116:* rmw"} <= set(given)
    assert int(given[given.index("--stop-timeout") + 1]) >= 10
    assert not any("NOTIFY_SOCKET" in word for word in given)


@pytest.mark.parametrize("key", ["ExecStartPre", "ExecStart", "ExecReload", "ExecStop"])
def test_the_shell_understands_the_container_unit(key: str) -> None:
    found = commands(key)
    assert found
    for command in found:
        assert run("/bin/sh", "-n", "-c", command).stderr == ""
