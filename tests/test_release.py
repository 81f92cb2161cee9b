"""A release: the same bytes of the same commit, all that belongs in it, and none that says what is not so."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bundled import REPOSITORY
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from edge_asr import __version__

LOCK = re.search(r"^lock=(\S+)", (REPOSITORY / "scripts/release").read_text(), re.MULTILINE)[1]  # type: ignore[index]
EXTRAS = ("cpu", "microphone", "serve", "demo")
PATIENCE_S = 600
LARGE_BYTES = 200_000
"""Larger files are left out of what most tests release, but for the package's own: they prove nothing more."""
NOT_IN_SDIST = {".ci/run", ".gitignore"}
DEEP = "typing-extensions"
"""A made-up need of a need."""

if not (REPOSITORY / ".git").exists():
    pytest.skip("a release is made of a git checkout", allow_module_level=True)


def run(*command: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    known = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=known | environ, capture_output=True, text=True, timeout=PATIENCE_S
    )


def git(folder: Path, *arguments: str | Path) -> str:
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
    done = run("git", *who, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "A commit")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def requirements() -> set[str]:
    """Return the names of what the runtime needs, as pyproject.toml has them."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    lists = [re.search(rf"^{key} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL) for key in ("dependencies", *EXTRAS)]
    return {name for found in lists if found for name in re.findall(r'"([\w-]+)', found[1])}


def make_wheel(folder: Path, name: str) -> Path:
    """Make a wheel that needs nothing but, if it is onnx, a package more; its licence is said in one of three ways."""
    said = {"numpy": "License-Expression: BSD-3-Clause AND Zlib\n", "av": "License: BSD-3-Clause\n"}
    metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1\n"
    metadata += said.get(name, "License: UNKNOWN\nClassifier: License :: OSI Approved :: MIT License\n")
    if name == "onnx":
        metadata += f'Requires-Dist: {DEEP}; python_version < "3.13"\nRequires-Dist: colorama; extra == "colours"\n'
    path = folder / f"{name.replace('-', '_')}-1-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@dataclass
class Index:
    """Made-up packages in a folder, and the lock that names them."""

    folder: Path
    lock: str
    environ: dict[str, str]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    lines = []
    for name in sorted(requirements() | {DEEP, "colorama"}):
        marker = ' ; sys_platform == "win32"' if name == "colorama" else ""
        lines.append(f"{name}==1{marker} --hash=sha256:{sha256(make_wheel(folder, name).read_bytes())}\n")
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}
    return Index(folder, "".join(lines), pip)


@pytest.fixture(scope="module")
def commits(tmp_path_factory: pytest.TempPathFactory, index: Index) -> Path:
    """Return a repository of our files as they are now, with a lock of made-up packages."""
    folder = tmp_path_factory.mktemp("commits")
    names = git(REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        file = REPOSITORY / name
        if file.is_file() and (name.startswith("edge_asr/") or file.stat().st_size < LARGE_BYTES):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / name)
    (folder / LOCK).parent.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(index.lock)
    (folder / "engines" / "on its way out").write_text("as .dockerignore has it")
    with (folder / ".dockerignore").open("a") as ignore:
        ignore.write("\nengines/on*\n")
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


@pytest.fixture
def clone(tmp_path: Path, commits: Path) -> Path:
    """Return a clone of one's own, to be spoiled."""
    git(tmp_path, "clone", "--quiet", commits, "clone")
    return tmp_path / "clone"


def release(folder: Path, *options: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return run(folder / "scripts/release", *options, cwd=folder, **{"RELEASE_TOOLS": sys.executable, **environ})


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, commits: Path, index: Index) -> Path:
    """Return the folder of a release."""
    folder = tmp_path_factory.mktemp("released")
    made = release(commits, "--snapshot", "--out", folder, **index.environ)
    assert made.returncode == 0, made.stderr
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tracked(folder: Path, *below: str) -> set[str]:
    return set(filter(None, git(folder, "ls-files", "-z", *below).split("\0")))


def members(archive: Path) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(archive) as tar:
        yield from tar


@pytest.fixture(scope="module")
def wheel(released: Path) -> Path:
    return released / f"edge_asr-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def sdist(released: Path) -> Path:
    return released / f"edge_asr-{__version__}.tar.gz"


@pytest.fixture(scope="module")
def bill(released: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((released / f"edge_asr-{__version__}.cdx.json").read_text(encoding="utf-8"))
    return found


def test_the_same_commit_is_the_same_release_anywhere_and_at_any_time(
    tmp_path: Path, clone: Path, released: Path, index: Index
) -> None:
    # Later than the other one, elsewhere, in another zone, by somebody with habits.
    (clone / "build" / "lib" / "edge_asr").mkdir(parents=True)
    (clone / "build" / "lib" / "edge_asr" / "old.py").touch()
    for path in (clone / "edge_asr").rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    git(clone, "config", "core.fileMode", "false")
    (tmp_path / "build.py").write_text("raise SystemExit('not the build that is pinned')")
    script = f"umask 077 && exec '{clone}/scripts/release' --snapshot"
    habits = {"TZ": "Asia/Shanghai", "LANG": "zh_CN.UTF-8", "SOURCE_DATE_EPOCH": "1", "PYTHONPATH": str(tmp_path)}
    made = run("bash", "-c", script, cwd=clone, RELEASE_TOOLS=sys.executable, **index.environ, **habits)
    assert made.returncode == 0, made.stderr
    first, second = files(released), files(clone / "dist")
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_the_release_is_of_the_time_of_its_commit(released: Path, commits: Path, wheel: Path) -> None:
    when = int(git(commits, "log", "-1", "--format=%ct"))
    for archive in (path for path in released.iterdir() if ".tar" in path.suffixes):
        found = {(entry.mtime, entry.uid, entry.gid, entry.uname) for entry in members(archive)}
        assert found == {(when, 0, 0, "")}, archive.name
        assert {entry.mode & 0o777 for entry in members(archive)} <= {0o644, 0o755}
        names = [entry.name for entry in members(archive)]
        assert names == sorted(names, key=os.fsencode)
    with zipfile.ZipFile(wheel) as packed:
        assert len({entry.date_time for entry in packed.infolist()}) == 1


def test_the_sums_are_those_of_all_files(released: Path) -> None:
    lines = (released / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert sums == {name: sha256(data) for name, data in files(released).items() if name != "SHA256SUMS"}
    assert len(sums) == 4


def test_the_wheel_has_the_whole_package_and_nothing_else(wheel: Path, commits: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2] for name in packed.namelist()} - {""}
    assert names == tracked(commits, "edge_asr")
    assert {"edge_asr/serve/page/index.html", "edge_asr/speech/silero_vad.onnx", "edge_asr/py.typed"} <= names
    assert {"edge_asr/speech/silero_vad.LICENSE"} <= names
    assert "licenses/LICENSE" in about


def test_the_sdist_has_all_that_is_committed(sdist: Path, commits: Path) -> None:
    names = {entry.name.partition("/")[2] for entry in members(sdist) if entry.isfile()}
    assert tracked(commits) - NOT_IN_SDIST - names == set()
    added = {name for name in names - tracked(commits) if not name.startswith("edge_asr.egg-info/")}
    assert added == {"PKG-INFO", "setup.cfg"}


def test_the_sdist_builds_the_same_wheel(tmp_path: Path, sdist: Path, wheel: Path, commits: Path) -> None:
    with tarfile.open(sdist) as tar:
        (top,) = {entry.name.partition("/")[0] for entry in tar}
        tar.extractall(tmp_path, filter="data")
    when = git(commits, "log", "-1", "--format=%ct").strip()
    command = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "out", tmp_path / top)
    built = run(*command, cwd=tmp_path, SOURCE_DATE_EPOCH=when)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "out" / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_context_has_what_docker_would_be_sent(released: Path, commits: Path) -> None:
    entries = list(members(released / f"edge_asr-{__version__}-context.tar"))
    names = {entry.name for entry in entries if entry.isfile()}
    assert names <= tracked(commits)
    assert tracked(commits, "edge_asr", "pyproject.toml", "LICENSE") <= names
    assert "engines/on its way out" not in names
    assert {str(Path(name).parent) for name in names} - {"."} <= {entry.name for entry in entries if entry.isdir()}


# As Buildah 1.33 left them out of `FROM scratch` and `COPY . /`, on 2026-11-23.
IGNORED = """
# a comment
*.md
!README.md
**/node
/docs/x/
!docs/x/keep.md
a/?/c
./tests/**
.git*
a/x[[]1].txt
"""
LEFT = {
    ".dockerignore",
    ".hidden",
    "Dockerfile",
    "README.md",
    "a/1.md",
    "a/b/2.md",
    "docs/top.md",
    "docs/x/keep.md",
    "we ird",
}
TAKEN_OUT = {
    "top.md",
    "a/b/c/3.txt",
    "a/x[1].txt",
    "docs/x/drop.txt",
    "node/deep/g",
    "b/node/f",
    "tests/t.py",
    ".gitignore",
}


def test_ignored_files_are_those_that_an_image_builder_ignores(tmp_path: Path) -> None:
    for name in LEFT | TAKEN_OUT:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".dockerignore").write_text(IGNORED)
    done = run(sys.executable, "-W", "error", REPOSITORY / "scripts/context.py", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == LEFT
    assert not (tmp_path / "tests").exists()


def test_the_bill_is_valid_cyclonedx(released: Path) -> None:
    text = (released / f"edge_asr-{__version__}.cdx.json").read_text(encoding="utf-8")
    assert json.loads(text)["specVersion"] == "1.6"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace('"SHA-256"', '"SHA-0"')) is not None


def test_the_bill_lists_what_the_lock_installs(bill: dict[str, Any], index: Index, wheel: Path) -> None:
    listed = {part["name"]: part for part in bill["components"]}
    assert set(listed) == requirements() | {DEEP}, "not what is for another system"
    for name, part in listed.items():
        (file,) = index.folder.glob(f"{name.replace('-', '_')}-1-*.whl")
        assert (part["version"], part["purl"]) == ("1", f"pkg:pypi/{name}@1")
        assert part["hashes"] == [{"alg": "SHA-256", "content": sha256(file.read_bytes())}]
    own = bill["metadata"]["component"]
    assert (own["name"], own["version"]) == ("edge-asr", __version__)
    assert own["hashes"] == [{"alg": "SHA-256", "content": sha256(wheel.read_bytes())}]


def test_the_bill_has_licences_in_every_way_they_are_said(bill: dict[str, Any]) -> None:
    licences = {part["name"]: part["licenses"] for part in bill["components"]}
    assert licences["numpy"] == [{"acknowledgement": "declared", "expression": "BSD-3-Clause AND Zlib"}]
    assert licences["av"] == [{"license": {"acknowledgement": "declared", "id": "BSD-3-Clause"}}]
    assert licences["onnx"] == [{"license": {"acknowledgement": "declared", "name": "MIT License"}}]


def test_the_bill_says_what_needs_what(bill: dict[str, Any]) -> None:
    needs = {entry["ref"]: set(entry.get("dependsOn", ())) for entry in bill["dependencies"]}
    assert needs["pkg:pypi/onnx@1"] == {f"pkg:pypi/{DEEP}@1"}
    assert needs[f"pkg:pypi/edge-asr@{__version__}"] == {f"pkg:pypi/{name}@1" for name in requirements()}


def spoil(file: str, old: str, new: str, count: int = 1) -> Callable[[Path], None]:
    """Return what changes a text of a clone, at most `count` times if that is not 0, and commits that."""

    def change(clone: Path) -> None:
        text = (clone / file).read_text(encoding="utf-8")
        assert re.search(old, text), f"{old} is not in {file}"
        (clone / file).write_text(re.sub(old, new, text, count=count), encoding="utf-8")
        commit(clone)

    return change


def add(file: str, text: str) -> Callable[[Path], None]:
    def change(clone: Path) -> None:
        (clone / file).write_text(text)

    return change


def add_and_commit(file: str, text: str) -> Callable[[Path], None]:
    def change(clone: Path) -> None:
        add(file, text)(clone)
        commit(clone)

    return change


def dated(clone: Path) -> None:
    """Make the clone fit to be released."""
    spoil("CHANGELOG.md", r"(?m)^## .*$", f"## {__version__} (2026-11-24)")(clone)


def tag_before(clone: Path) -> None:
    git(clone, "tag", f"v{__version__}")
    dated(clone)


def remove_lock(clone: Path) -> None:
    (clone / LOCK).unlink()
    commit(clone)


def forget_git(clone: Path) -> None:
    shutil.rmtree(clone / ".git")


@pytest.mark.parametrize(
    ("options", "change", "exit_code", "reason"),
    [
        (["--snapshot"], add("config.yaml", "model: x"), 1, "not committed:  M config.yaml (1 in all)"),
        (["--snapshot"], add("edge_asr/forgotten.py", ""), 1, "not committed: ?? edge_asr/forgotten.py"),
        (["--snapshot"], forget_git, 1, "is no git checkout"),
        (["--snapshot"], spoil("edge_asr/__init__.py", r'(__version__ = )".*"', r'\1"9.8"'), 1, "not with 9.8"),
        (["--snapshot"], spoil("edge_asr/__init__.py", "__version__ = .*", ""), 1, "says no version"),
        (["--snapshot"], spoil("CHANGELOG.md", r"(?m)^## .*$", "## 9.8 (2026-01-01)"), 1, "begins with '9.8 (2026"),
        (["--snapshot"], spoil("CHANGELOG.md", r"(?m)^## .*$", f"## {__version__}"), 1, "(YYYY-MM-DD)"),
        ([], spoil("CHANGELOG.md", r"(?m)^## .*$", f"## {__version__} (unreleased)"), 1, "give it its date"),
        (["--snapshot"], add_and_commit("deploy/x.yaml", "image: edge-asr:9.8.7-jetson"), 1, "edge-asr:9.8.7"),
        (["--tag", "v9.8"], dated, 1, f"the tag must be v{__version__}"),
        (["--tag", __version__], dated, 1, f"the tag must be v{__version__}"),
        (["--tag", f"v{__version__}"], dated, 1, "is not on this commit"),
        (["--tag", f"v{__version__}"], tag_before, 1, "is not on this commit"),
        (["--tag"], dated, 2, "--tag needs a value"),
        (["--snapshto"], dated, 2, "unknown option --snapshto"),
    ],
)
def test_what_is_not_so_is_not_released(
    clone: Path, options: list[str], change: Callable[[Path], None], exit_code: int, reason: str
) -> None:
    change(clone)
    refused = release(clone, *options, RELEASE_TOOLS="false")
    assert (refused.returncode, refused.stderr.count("\n")) == (exit_code, 1), refused.stderr
    assert refused.stderr.startswith("release: ")
    assert reason in refused.stderr
    assert not (clone / "dist").exists()


def test_a_dated_version_with_its_tag_is_released(tmp_path: Path, clone: Path, index: Index) -> None:
    dated(clone)
    add("deploy/x.yaml", f"# Of edge-asr:{__version__}.\nimage: edge-asr:{__version__}-jetson\n")(clone)
    add_and_commit("deploy/x.md", "From edge-asr:9.8.6 to edge-asr:9.8.7.\n")(clone)
    git(clone, "tag", f"v{__version__}")
    made = release(clone, "--tag", f"v{__version__}", "--out", tmp_path / "out", **index.environ)
    assert made.returncode == 0, made.stderr
    assert len(files(tmp_path / "out")) == 5


def test_other_tools_are_not_taken(clone: Path) -> None:
    spoil("scripts/release-tools.txt", r"setuptools==\S+", "setuptools==77.0.1")(clone)
    refused = release(clone, "--snapshot")
    assert refused.returncode == 1
    assert "release: needs setuptools 77.0.1, and finds" in refused.stderr
    assert release(clone, "--snapshot", RELEASE_TOOLS="false").returncode == 1
    assert not (clone / "dist").exists()


def test_no_bill_no_release(clone: Path, index: Index) -> None:
    remove_lock(clone)
    refused = release(clone, "--snapshot", **index.environ)
    assert refused.returncode == 1
    assert refused.stderr.endswith(f"release: {LOCK} is not there: the SBOM lists what it installs\n")
    assert not (clone / "dist").exists()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (rf"{DEEP}.*\n", "", f"the lock lacks {DEEP}, which onnx needs"),
        (r"(numpy.*sha256:)\w{8}", r"\g<1>00000000", "THESE PACKAGES DO NOT MATCH THE HASHES"),
        (r" --hash=\S+", "", "Hashes are required"),
    ],
)
def test_a_lock_that_does_not_hold_is_not_released(clone: Path, index: Index, old: str, new: str, reason: str) -> None:
    spoil(LOCK, old, new, count=0)(clone)
    refused = release(clone, "--snapshot", **index.environ)
    assert refused.returncode == 1
    assert reason in refused.stderr
    assert refused.stderr.endswith("release: the SBOM cannot be made; see above\n")
    assert not (clone / "dist").exists()


def pins(file: str) -> dict[str, str]:
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))


def test_the_tools_are_those_of_the_dev_extra() -> None:
    tools, constraints = pins("scripts/release-tools.txt"), pins("scripts/constraints.txt")
    assert {"build", "setuptools", "cyclonedx-python-lib"} <= set(tools)
    # What only Windows needs is in no environment of ours.
    assert {name: constraints.get(name) for name in tools} == tools | {"colorama": constraints.get("colorama")}


def test_the_version_stands_in_one_place() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional")[0]
    assert 'dynamic = ["version"]' in project
    assert "\nversion =" not in project
    titles = re.findall(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert titles[0] == __version__


@pytest.mark.slow
def test_the_real_release_installs_what_its_bill_lists(tmp_path: Path) -> None:
    """From a package index, so it needs a network."""
    if not git(REPOSITORY, "ls-tree", "--name-only", "HEAD", LOCK):
        pytest.skip(f"{LOCK} is not committed here")
    for name in ("one", "two"):
        git(tmp_path, "clone", "--quiet", "--no-hardlinks", REPOSITORY, name)
    made = run(tmp_path / "one/scripts/release", "--snapshot", cwd=tmp_path, PYTHON=sys.executable)
    assert made.returncode == 0, made.stderr
    again = release(tmp_path / "two", "--snapshot")
    assert again.returncode == 0, again.stderr
    assert files(tmp_path / "dist") == files(tmp_path / "two/dist"), "tools by their hashes are those of the dev extra"
    bill = json.loads(files(tmp_path / "dist")[f"edge_asr-{__version__}.cdx.json"])
    listed = {part["name"]: part["version"] for part in bill["components"]}
    assert set(listed) >= requirements()
    assert {name: pins(LOCK)[name] for name in listed} == listed
    assert all(part.get("licenses") for part in bill["components"])
    with tarfile.open(fileobj=io.BytesIO(files(tmp_path / "dist")[f"edge_asr-{__version__}-context.tar"])) as context:
        assert "edge_asr/__init__.py" in context.getnames()
