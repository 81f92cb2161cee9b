"""The command line: each command reads the configuration, then imports and starts only what it needs."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from edge_asr import __version__
from edge_asr.config import Config
from edge_asr.config_reader import load_config, show_config
from edge_asr.errors import EdgeAsrError

PROGRAM = "edge-asr"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name=PROGRAM,
    help="An always-on speech appliance: microphone in, transcripts out over MQTT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Every command takes these two and hands them to `read_config`.
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Read the configuration from this YAML file.")
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("-o", metavar="SECTION.KEY=VALUE", help="Set one key, above file and environment; repeatable."),
]


ModelOption = Annotated[
    Path | None, typer.Option("--model", metavar="DIR", help="Folder of a Paraformer bundle; above all else.")
]


def read_config(
    config: Path | None,
    overrides: Sequence[str] | None,
    model: Path | None = None,
    sources: Sequence[dict[str, str]] = (),
) -> Config:
    """Return the configuration that a command's `--config`, `-o`, `--model` and `--source` options ask for."""
    return load_config(config, overrides or (), sources=sources, model=model)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("check-config")
def check_config(config: ConfigOption = None, override: OverrideOption = None) -> None:
    """Check the configuration and print what is in effect, with secrets masked."""
    print(show_config(read_config(config, override)), end="")
    # A comment, so that the output is YAML as a whole.
    print("# ok")


@app.command()
def transcribe(
    # Not as paths: those would not be as given, for `./a.wav` would become `a.wav`.
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Audio in any format.")],
    json_lines: Annotated[bool, typer.Option("--json", help="Print a transcript a line, as JSON.")] = False,
    model: ModelOption = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Print what is said in files."""
    settings = read_config(config, override, model)
    from edge_asr import logs
    from edge_asr.app import transcribe_files

    logs.set_up(settings.log.level)
    failed: EdgeAsrError | None = None
    for _, found in transcribe_files(settings, files):
        if isinstance(found, EdgeAsrError):
            _complain(found)
            failed = failed or found
        else:
            print(json.dumps(found.to_json(), ensure_ascii=False) if json_lines else found.text, flush=True)
    if failed is not None:
        raise typer.Exit(failed.exit_code)


@app.command()
def run(
    source: Annotated[
        list[str] | None,
        typer.Option("--source", metavar="stdin|FILE", help="Listen to this instead of the configured sources."),
    ] = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Listen, recognise and publish until told to stop, or until the last file has been played."""
    entries = [{"kind": "stdin"} if name == "stdin" else {"kind": "file", "path": name} for name in source or ()]
    settings = read_config(config, override, model, entries)
    import asyncio

    from edge_asr import logs
    from edge_asr.app import run_daemon

    logs.set_up(settings.log.level)
    asyncio.run(run_daemon(settings))


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Stay up, playing the samples again and again.")] = False,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Show the whole path: a broker, the daemon on the bundled samples, and a subscriber that prints what arrives."""
    settings = read_config(config, override)
    from edge_asr.demo import run_demo

    raise typer.Exit(run_demo(settings, keep))


def _complain(error: EdgeAsrError) -> None:
    for line in str(error).splitlines() if sys.stderr is not None else ():
        print(f"{PROGRAM}: {line}", file=sys.stderr)


def _flush() -> None:
    if sys.stdout is None:  # closed by whoever started the program
        return
    try:
        sys.stdout.flush()
    except OSError:
        # Python would try again, and complain, when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: with one line and its own exit code for every error that is meant for the user."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal knows Chinese, and a file name may be no text
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app(None if arguments is None else list(arguments), prog_name=PROGRAM)
        finally:
            _flush()
    except EdgeAsrError as error:
        _complain(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)  # the reader went away, as in `edge-asr ... | head -1`
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _complain(EdgeAsrError(f"cannot write: {error.strerror}"))
        sys.exit(1)
    sys.exit(0)
