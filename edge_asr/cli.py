"""The command line: each command reads the configuration, then imports and starts only what it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from edge_asr import __version__
from edge_asr.config import Config, load_config, show_config
from edge_asr.errors import EdgeAsrError

PROGRAM = "edge-asr"

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


def read_config(config: Path | None, overrides: Sequence[str] | None) -> Config:
    """Return the configuration that a command's `--config` and `-o` options ask for."""
    return load_config(config, overrides or ())


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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: with one line and its own exit code for every error that is meant for the user."""
    try:
        try:
            app(None if arguments is None else list(arguments), prog_name=PROGRAM)
        finally:
            sys.stdout.flush()
    except EdgeAsrError as error:
        for line in str(error).splitlines():
            print(f"{PROGRAM}: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away, as in `edge-asr ... | head -1`; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)
