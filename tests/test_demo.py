"""The demonstration as a user sees it: the command itself, its own broker, and what it prints."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from bundled import BUNDLE, transcripts
from mosquitto import PATIENCE_S, wait_for

from edge_asr import broker

if broker._find_mosquitto() is None:
    pytest.importorskip("amqtt", reason="the demo's broker where Mosquitto is not installed; scripts/setup demo")

TEXTS = list(transcripts().values())
STOP_S = 10.0
LINE = re.compile(
    r"  (?P<text>\S+?)\u3000* +confidence (?P<confidence>[01]\.\d\d) +(?P<total>\d+) ms after the last word"
)


class Demo:
    """A demonstration in a process of its own, with a folder for temporary files that it should leave empty."""

    def __init__(self, folder: Path, *arguments: str, command: Sequence[str] = ("-m", "edge_asr")) -> None:
        self._output = folder / "output"
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command, "demo", *arguments],
                stdout=output,
                stderr=output,
                env={
                    "PATH": "/usr/bin:/bin",
                    "TMPDIR": str(self.temporary),
                    "LANG": "C.UTF-8",
                    "XDG_DATA_HOME": os.environ["XDG_DATA_HOME"],  # the engines of these tests, not the user's
                },
            )

    @property
    def output(self) -> str:
        """What it has printed so far, logs and complaints included; no traceback, whatever happens."""
        text = self._output.read_text(encoding="utf-8")
        assert "Traceback" not in text, text
        return text

    @property
    def texts(self) -> list[str]:
        """The sentences shown so far."""
        return [match["text"] for match in LINE.finditer(self.output)]

    def wait_for(self, text: str) -> None:
        """Return when it has printed a text."""
        wait_for(lambda: text in self.output or self.process.poll() is not None, f"{text!r} in the output")
        assert text in self.output, self.output

    def end(self, timeout_s: float) -> int:
        """Return the exit code."""
        return self.process.wait(timeout_s)


Start = Callable[..., Demo]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return what starts a demonstration; at the end none is left."""
    demos: list[Demo] = []

    def run(*arguments: str, **options: Sequence[str]) -> Demo:
        demos.append(Demo(tmp_path, *arguments, **options))
        return demos[-1]

    yield run
    for demo in demos:
        demo.process.kill()
        demo.process.wait(PATIENCE_S)


WITHOUT_MOSQUITTO = """
from edge_asr import broker
from edge_asr.cli import main

broker._find_mosquitto = lambda: None
main()
"""


def bundle_with(folder: Path, samples: dict[str, str]) -> Path:
    """Return a copy of the bundled model with these of its samples, and these texts for them."""
    shutil.copytree(BUNDLE, folder, ignore=shutil.ignore_patterns("samples"))
    (folder / "samples").mkdir()
    for name in samples:
        shutil.copy(BUNDLE / "samples" / name, folder / "samples")
    table = "".join(f"{name}\t{text}\n" for name, text in samples.items())
    (folder / "samples" / "transcripts.tsv").write_text(table, encoding="utf-8")
    return folder


def first(count: int) -> dict[str, str]:
    return dict(list(transcripts().items())[:count])


@pytest.mark.parametrize("count", [2, pytest.param(len(TEXTS), marks=pytest.mark.slow)])
def test_the_demo_shows_every_sample_as_it_is_spoken_and_then_how_to_go_on(
    start: Start, tmp_path: Path, count: int
) -> None:
    whole = count == len(TEXTS)
    demo = start() if whole else start("-o", f"model={bundle_with(tmp_path / 'some', first(count))}")
    assert demo.end(120) == 0, demo.output
    assert demo.texts == TEXTS[:count]
    for match in LINE.finditer(demo.output):
        assert float(match["confidence"]) > 0.3
        assert int(match["total"]) > 0
    assert f"{count} of {count} sentences arrived" in demo.output
    assert demo.output.index("sentences arrived") < demo.output.index("How to go on")
    assert " .venv/bin/edge-asr run --source FILE.wav" in demo.output
    assert not re.search("WARNING|ERROR", demo.output)
    assert list(demo.temporary.iterdir()) == []


def test_the_demo_needs_no_mosquitto(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("amqtt", reason="scripts/setup demo")
    model = bundle_with(tmp_path / "some", first(2))
    demo = start("-o", f"model={model}", command=("-c", WITHOUT_MOSQUITTO))
    assert demo.end(120) == 0, demo.output
    assert "2 of 2 sentences arrived" in demo.output


def test_a_sentence_that_does_not_arrive_fails_the_demo_and_is_named(start: Start, tmp_path: Path) -> None:
    [(name, text)] = first(1).items()
    (tmp_path / "controls.json").write_text('{"mute": true}', encoding="utf-8")  # of the appliance, not of the show
    model = bundle_with(tmp_path / "altered", {name: "今天没有声音"})
    demo = start("-o", f"model={model}", "-o", f"state_dir={tmp_path}")
    assert demo.end(60) == 1
    assert demo.texts == [text]
    assert "0 of 1 sentences arrived" in demo.output
    assert "missing: 今天没有声音" in demo.output


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_keep_plays_on_until_a_signal_and_leaves_nothing_behind(
    start: Start, tmp_path: Path, how: signal.Signals
) -> None:
    [text] = first(1).values()
    demo = start("--keep", "-o", f"model={bundle_with(tmp_path / 'one', first(1))}")
    wait_for(lambda: demo.texts == [text, text] or demo.process.poll() is not None, "the sample a second time")
    assert "until Ctrl-C; watch from elsewhere: mosquitto_sub -h 127.0.0.1" in demo.output
    demo.process.send_signal(how)
    assert demo.end(STOP_S) == 0, demo.output
    assert list(demo.temporary.iterdir()) == []


def test_a_signal_before_the_end_is_no_success(start: Start) -> None:
    demo = start()
    demo.wait_for("at the pace of speech")
    demo.process.send_signal(signal.SIGTERM)
    assert demo.end(STOP_S) == 1, demo.output
    assert list(demo.temporary.iterdir()) == []


def test_a_reader_that_goes_away_ends_the_demo_without_a_word() -> None:
    command = [sys.executable, "-m", "edge_asr", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"broker ")
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE_S) == 1


def test_a_model_without_samples_is_one_line_that_names_the_remedy(start: Start, tmp_path: Path) -> None:
    model = bundle_with(tmp_path / "bare", {})
    (model / "samples" / "transcripts.tsv").unlink()
    demo = start("-o", f"model={model}")
    assert demo.end(PATIENCE_S) == 2
    assert demo.output.splitlines() == [
        f"edge-asr: {model}/samples/transcripts.tsv: no such file;"
        " the demo plays the bundled model's samples, leave `model` unset"
    ]
