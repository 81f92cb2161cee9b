"""The command line's conventions: output, exit codes and errors, seen from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from edge_asr import __version__, cli
from edge_asr.errors import BundleError, EdgeAsrError


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_ASR_")}
    return subprocess.run(
        [sys.executable, "-m", "edge_asr", *arguments],
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
    commands = [info.callback for info in cli.app.registered_commands]
    assert commands
    for command in commands:
        assert command is not None
        annotations = set(command.__annotations__.values())
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


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "edge_asr", "check-config"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) in (0, 1)
