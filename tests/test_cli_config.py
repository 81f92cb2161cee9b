"""The command line's conventions: output, exit codes and errors, seen from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml
from bundled import recording, transcripts

from edge_asr import __version__, cli
from edge_asr.config import Config, FileSourceConfig, MicrophoneSourceConfig, StdinSourceConfig
from edge_asr.errors import BundleError, EdgeAsrError

WITHOUT_A_MODEL = """
import sys
from pathlib import Path
from edge_asr import config, demo
config.BUNDLED_MODEL = demo.BUNDLED_MODEL = Path("/nowhere/engines")
from edge_asr.cli import main
main()
"""
"""The program as it is where only the wheel is installed."""


def run(
    *arguments: str, program: tuple[str, ...] = ("-m", "edge_asr"), **environ: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_ASR_")}
    return subprocess.run(
        [sys.executable, *program, *arguments],
        env={**inherited, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def exit_code(arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """A program with the real `main` and none of the real commands."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    monkeypatch.setattr(cli, "app", app)
    return app


def test_check_config_prints_what_is_in_effect_with_secrets_masked(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("mqtt: {host: broker, username: u, password: hunter2}\n")
    result = run("check-config", "--config", str(path), "-o", "mqtt.port=1884", EDGE_ASR_DEVICE_ID="hall")
    assert (result.returncode, result.stderr) == (0, "")
    shown = yaml.safe_load(result.stdout)
    assert shown["mqtt"]["host"] == "broker"
    assert shown["mqtt"]["port"] == 1884
    assert shown["mqtt"]["password"] == "**********"
    assert shown["device_id"] == "hall"
    assert result.stdout.splitlines()[-1] == "# ok"


def test_a_wrong_configuration_gives_a_line_an_error_and_exit_code_2() -> None:
    result = run("check-config", "-o", "mqtt.hots=x", "-o", "drain_s=no", EDGE_ASR_NONSENSE="1")
    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("edge-asr: ") for line in lines)
    assert "edge-asr: -o mqtt.hots: unknown key; did you mean 'mqtt.host'?" in lines


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"edge-asr {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["check-config", "--nonsense"], ["check-config", "-o"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_every_command_takes_config_and_overrides() -> None:
    groups = [cli.app, *(info.typer_instance for info in cli.app.registered_groups)]
    commands = [info.callback for group in groups if group is not None for info in group.registered_commands]
    assert commands
    for command in commands:
        assert command is not None
        annotations = set(command.__annotations__.values())
        if command.__name__ == "token":  # it reads nothing
            continue
        assert {"ConfigOption", "OverrideOption"} <= annotations, command.__name__


def test_an_error_of_ours_gives_its_lines_and_its_exit_code(
    app: typer.Typer, capsys: pytest.CaptureFixture[str]
) -> None:
    @app.command()
    def broken() -> None:
        raise BundleError("/models/x: no tokens.json\n/models/x: no am.mvn")

    assert exit_code(["broken"]) == 3
    assert capsys.readouterr().err == "edge-asr: /models/x: no tokens.json\nedge-asr: /models/x: no am.mvn\n"
    assert EdgeAsrError.exit_code == 1


def test_an_error_that_nobody_foresaw_keeps_its_traceback(app: typer.Typer) -> None:
    @app.command()
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.main(["broken"])


def test_an_interrupt_exits_with_130(app: typer.Typer) -> None:
    @app.command()
    def wait() -> None:
        signal.raise_signal(signal.SIGINT)

    assert exit_code(["wait"]) == 130


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["check-config", "transcribe", "--version", "demo"])
def test_a_full_disk_gives_one_line_and_exit_code_1(command: str, unbuffered: str) -> None:
    if command == "demo":
        pytest.importorskip("amqtt", reason="the demo's broker; scripts/setup demo")
    files = [str(recording(next(iter(transcripts()))))] if command == "transcribe" else []
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "edge_asr", command, *files],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (result.returncode, result.stderr) == (1, "edge-asr: cannot write: No space left on device\n")


@pytest.mark.parametrize(
    ("closed", "option", "code", "error"),
    [
        (">&-", "drain_s=1", 0, ""),
        (">&-", "x=1", 2, "edge-asr: -o x: unknown key"),
        ("2>&-", "x=1", 2, ""),
        (">&- 2>&-", "x=1", 2, ""),
    ],
)
def test_closed_streams_are_no_error(closed: str, option: str, code: int, error: str) -> None:
    command = ["sh", "-c", f'"$0" -m edge_asr check-config -o "$1" {closed}', sys.executable, option]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith(error)
    assert bool(result.stderr) == bool(error)


def test_bytes_that_are_no_text_are_explained() -> None:
    result = run("check-config", "-o", "mqtt.base=a\udcffb", "-o", "model=a\udcffb", EDGE_ASR_MQTT__USERNAME="\udcff")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "edge-asr: EDGE_ASR_MQTT__USERNAME: mqtt.username: should be text in UTF-8",
        "edge-asr: -o mqtt.base: should be text in UTF-8; got 'a\\udcffb'",
    ]


@pytest.mark.parametrize("name", ["a\udcff.wav", "a\x7f.wav", "a: [b.wav", "null"])
def test_a_source_may_have_any_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Config] = []

    async def run_daemon(config: Config, reread: Callable[[], Config]) -> None:
        taken.append(config)

    monkeypatch.setattr("edge_asr.app.run_daemon", run_daemon)
    monkeypatch.setattr("edge_asr.logs.set_up", lambda level: None)
    arguments = ["run", "--source", name, "--source", "stdin", "-o", "sources.0.realtime=false", "--model", name]
    assert exit_code(arguments) == 0
    assert taken[0].sources == (FileSourceConfig(path=Path(name), realtime=False), StdinSourceConfig())
    assert taken[0].model == Path(name)


def test_a_source_may_be_a_microphone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Config] = []

    async def run_daemon(config: Config, reread: Callable[[], Config]) -> None:
        taken.append(config)

    monkeypatch.setattr("edge_asr.app.run_daemon", run_daemon)
    monkeypatch.setattr("edge_asr.logs.set_up", lambda level: None)
    names = ["microphone", "microphone:USB: Audio", "./microphone"]
    assert exit_code(["run", *(part for name in names for part in ("--source", name))]) == 0
    assert taken[0].sources == (
        MicrophoneSourceConfig(),
        MicrophoneSourceConfig(device="USB: Audio"),
        FileSourceConfig(path=Path("microphone")),
    )


def test_a_source_is_no_microphone_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["run", "--source", "microphone:"]) == 2
    assert "--source: sources.0.device: should have at least 1 character" in capsys.readouterr().err


def test_warnings_of_transcribe_are_log_lines_of_the_level_asked_for(tmp_path: Path) -> None:
    cut = tmp_path / "cut.wav"
    cut.write_bytes(recording(next(iter(transcripts()))).read_bytes()[:-5000])
    warned = run("transcribe", str(cut))
    assert warned.returncode == 0
    assert re.fullmatch(r"[-\d]+ [:,\d]+ WARNING +edge_asr\.audio\.decode: .*cut\.wav.*\n", warned.stderr)
    assert run("transcribe", str(cut), "-o", "log.level=ERROR").stderr == ""


@pytest.mark.parametrize("command", ["check-config", "transcribe", "run", "demo"])
def test_an_installed_package_says_that_it_has_no_model(command: str) -> None:
    result = run(command, *(["a.wav"] if command == "transcribe" else []), program=("-c", WITHOUT_A_MODEL))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "edge-asr: model: no model comes with the installed package; run: edge-asr models pull paraformer-small,"
        " or name the folder of one here or with --model DIR (the demo needs a checkout of the repository)\n"
    )


def test_the_demo_of_an_installed_package_asks_for_a_checkout(tmp_path: Path) -> None:
    result = run("demo", "-o", f"model={tmp_path}", program=("-c", WITHOUT_A_MODEL))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith(
        "the demo plays the bundled model's samples, run scripts/run in a checkout of the repository\n"
    )


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "edge_asr", "check-config"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) in (0, 1)
