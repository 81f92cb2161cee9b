"""What the pages say holds: links lead somewhere, commands and keys in them are taken, files they name are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from bundled import PACKAGE, REPOSITORY
from typer.core import TyperGroup
from typer.main import get_command

from edge_asr.cli import app
from edge_asr.config_reader import load_config
from edge_asr.errors import ConfigError
from edge_asr.seed import take_over

PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "engines/**/*.md", "bench/**/*.md")
    for page in REPOSITORY.glob(pattern)
)
SOURCES = REPOSITORY.resolve() / "edge_asr"
NOT_OURS = {"triggers", "conditions", "recorder", "services", "automation"}
"""Keys of other programs' YAML, such as Home Assistant's: a block of nothing else is not our configuration."""
OURS = re.compile(r"\S*\b(edge-asr|scripts/[\w-]+)\b")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w/.<>*-])(?:scripts|systemd|deploy|tests|bench)/[\w./-]*\w(?![\w*{<])")
SHELL = ("sh", "bash", "console")
END_OF_COMMAND = {"|", "||", "&&", ";", "&", ">", ">>", "<", "2>", ")"}
OPTION = re.compile(r"--[a-z][a-z-]*")

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield language and text of each fenced block."""
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield found[2], dedent(found[3])


def prose(page: Path) -> str:
    """Return the text without what is in fences or set as code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def lines(page: Path) -> Iterator[str]:
    """Yield what a reader is to type: the lines of shell blocks, and those after a prompt in others."""
    for language, text in blocks(page):
        for line in text.replace("\\\n", " ").splitlines():
            prompted = line.startswith("$ ")
            if prompted or (language in SHELL and not any(shown.startswith("$ ") for shown in text.splitlines())):
                yield line.removeprefix("$ ")


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the program and the arguments of each command that is ours, wherever it stands in its line."""
    for line in filter(OURS.search, lines(page)):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        words = list(lexer)
        for k, word in enumerate(words):
            if OURS.fullmatch(word) and words[k - 1] != "-u" and not {"systemctl", "journalctl"} & set(words[:k]):
                yield word, list(takewhile(lambda other: other not in END_OF_COMMAND, words[k + 1 :]))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Return what the real parser makes of a command line; raises its UsageError."""
    command: Any = get_command(app)
    rest = list(arguments)
    while isinstance(command, TyperGroup) and rest and not rest[0].startswith("-"):
        command = command.commands[rest.pop(0)]
    # Not of a group: that would do what it is asked for, such as to print the version.
    return {} if isinstance(command, TyperGroup) else dict(command.make_context("edge-asr", rest).params)


def complaints(file: Path | None, overrides: Sequence[str]) -> list[str]:
    """Return what is wrong with a configuration but for the files in it, which are the reader's."""
    try:
        load_config(file, overrides, environ={}, model=".")
    except ConfigError as error:
        return [line for line in str(error).splitlines() if not line.endswith("create it or correct the path")]
    return []


@page_by_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        name, _, anchor = link.partition("#")
        if re.match(r"\w+:", name):
            continue
        target = (page.parent / name).resolve() if name else page
        if target.is_relative_to(SOURCES):
            target = PACKAGE / target.relative_to(SOURCES)
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@page_by_page
def test_commands_are_taken_by_the_program(page: Path) -> None:
    for program, arguments in commands(page):
        if not program.endswith("edge-asr"):
            continue
        overrides = parse(arguments).get("override") or ()
        assert complaints(None, overrides) == []


@page_by_page
def test_scripts_know_the_options_they_are_given(page: Path) -> None:
    for program, arguments in commands(page):
        if not program.endswith("edge-asr"):
            known = (REPOSITORY / "scripts" / Path(program).name).read_text(encoding="utf-8")
            own = takewhile(lambda argument: argument not in ("pytest",), arguments)
            assert [option for option in own if OPTION.fullmatch(option) and option not in known] == []


@page_by_page
def test_configurations_are_accepted(page: Path, tmp_path: Path) -> None:
    for language, text in blocks(page):
        if language != "yaml" or (keys := set(yaml.safe_load(text))) <= NOT_OURS:
            continue
        file = tmp_path / "edge_asr.yaml"
        file.write_text(text, encoding="utf-8")
        if "room" in keys:  # a seed file
            take_over(file, tmp_path, tmp_path)
        else:
            assert complaints(file, ()) == []


@page_by_page
def test_files_that_are_named_are_there(page: Path) -> None:
    named = FILE.findall(page.read_text(encoding="utf-8"))
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_every_page_is_looked_at() -> None:
    looked_at = {page.relative_to(REPOSITORY).as_posix() for page in PAGES}
    assert {"README.md", "docs/mqtt.md", "deploy/home-assistant/README.md"} <= looked_at
    assert sum(1 for page in PAGES for _ in commands(page)) > 40
