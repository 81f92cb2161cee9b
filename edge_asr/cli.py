"""The command line: each command reads the configuration, then imports and starts only what it needs."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, NoReturn

import typer

from edge_asr import __version__
from edge_asr.config import Config, MicrophoneSourceConfig
from edge_asr.config_reader import load_config, show_config
from edge_asr.errors import ConfigError, EdgeAsrError

PROGRAM = "edge-asr"
ANY_MODEL = "."
"""What `models` and `devices` take for `model`: the configured one may be what is to be pulled, and not be here yet."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name=PROGRAM,
    help="An always-on speech appliance: microphone in, transcripts out over MQTT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models, name="models", help="List, pull, verify and remove published models.")
mqtt = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(mqtt, name="mqtt", help="See to what the broker keeps.")
bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench", help="Measure this machine.")

# Every command takes these two and hands them to `read_config`.
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Read the configuration from this YAML file.")
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("-o", metavar="SECTION.KEY=VALUE", help="Set one key, above file and environment; repeatable."),
]


ModelOption = Annotated[
    # Not a path: as one, `./paraformer-small` would become a name of the catalogue.
    str | None,
    typer.Option("--model", metavar="NAME|DIR", help="A pulled model, or the folder of a bundle; above all else."),
]

EngineOption = Annotated[
    Path | None, typer.Option("--engine", metavar="DIR", help="The model's engine, made by build-engine --out.")
]


def read_config(
    config: Path | None,
    overrides: Sequence[str] | None,
    model: str | None = None,
    sources: Sequence[dict[str, str]] = (),
    options: Mapping[str, tuple[str, object]] = MappingProxyType({}),
) -> Config:
    """Return the configuration that a command's `--config`, `-o`, `--model`, `--source` and own options ask for."""
    return load_config(config, overrides or (), sources=sources, model=model, options=options)


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
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    model: ModelOption = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Tell whether this machine will run the appliance, and what must be done if not.

    Exit code: 0 if nothing failed (warnings may be left), 2 if the configuration is wrong, 3 if model, engine or their
    libraries failed, 1 if anything else did.
    """
    from edge_asr import cli_doctor

    if code := cli_doctor.show(lambda: read_config(config, override, model), as_json):
        raise typer.Exit(code)


@app.command()
def health(config: ConfigOption = None, override: OverrideOption = None) -> None:
    """Ask the daemon on this machine, over HTTP, whether it can recognise something: the health check of containers.

    Exit code: 0 if it can, 1 if it cannot or does not answer, 2 if the configuration is wrong or has no HTTP server.
    """
    settings = read_config(config, override, ANY_MODEL)
    from edge_asr import cli_health

    print(cli_health.check(settings.http))


@app.command()
def transcribe(
    # Not as paths: those would not be as given, for `./a.wav` would become `a.wav`.
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Audio in any format.")],
    json_lines: Annotated[bool, typer.Option("--json", help="Print a transcript a line, as JSON.")] = False,
    model: ModelOption = None,
    engine: EngineOption = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Print what is said in files."""
    settings = read_config(config, override, model, options={"--engine": ("engine.dir", engine)})
    from edge_asr import logs
    from edge_asr.app import transcribe_files

    logs.set_up(settings.log)
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
        typer.Option(
            "--source",
            metavar="microphone[:DEVICE]|stdin|FILE",
            help="Listen to this instead of the configured sources; repeatable.",
        ),
    ] = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Listen, recognise and publish until told to stop, or until the last file has been played."""

    def reread() -> Config:
        return read_config(config, override, model, [_source_entry(name) for name in source or ()])

    settings = reread()
    import asyncio

    from edge_asr import logs, memory
    from edge_asr.app import run_daemon

    logs.set_up(settings.log)
    memory.keep_out_of_core_dumps()
    asyncio.run(run_daemon(settings, reread))


def _source_entry(name: str) -> dict[str, str]:
    """Return the entry of `sources` that `--source NAME` stands for; a file of such a name is `./microphone`."""
    kind, colon, device = name.partition(":")
    if kind == "microphone":
        return {"kind": kind, "device": device} if colon else {"kind": kind}
    return {"kind": "stdin"} if name == "stdin" else {"kind": "file", "path": name}


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


@app.command()
def devices(
    device: Annotated[
        str | None,
        typer.Argument(
            metavar="[DEVICE]",
            help="What to list, or to listen to with --meter: a name, a part of one, or a stable name. If not given:"
            " all are listed; the meter takes the first microphone of the configuration, else the default one.",
        ),
    ] = None,
    meter: Annotated[bool, typer.Option("--meter", help="Show how loud the device is, until Ctrl-C.")] = False,
    channel: Annotated[
        int | None, typer.Option("--channel", min=0, help="Which channel, from 0; the mean of all if not given.")
    ] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", min=0, help="End the meter after so long.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print a device, or a level, a line, as JSON.")] = False,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """List the microphones there are and which are configured, or show the level of one."""
    settings = read_config(config, override, ANY_MODEL)
    from edge_asr import cli_devices

    microphones = [entry for entry in settings.sources if isinstance(entry, MicrophoneSourceConfig)]
    if meter:
        cli_devices.show_meter(cli_devices.metered(microphones, device, channel), seconds, json_lines)
    else:
        cli_devices.show_list(microphones, device, json_lines)


@app.command()
def subscribe(
    json_lines: Annotated[bool, typer.Option("--json", help="Print a message a line, as JSON.")] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="The device_id of an appliance; + is all of them.")
    ] = "+",
    topic: Annotated[
        list[str] | None,
        typer.Option(
            "--topic",
            metavar="transcript|said|partial|state|all",
            help="What to show; repeatable. If not given: transcript, with --json; else partial and state too.",
        ),
    ] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Every transcript once and in order: ask for those that are missing.")
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="FILE", help="With --complete: go on where the last run ended, kept here."),
    ] = None,
    since_seq: Annotated[
        int | None,
        typer.Option("--since-seq", metavar="N", min=1, help="With --complete and --device: begin at this number."),
    ] = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Show what appliances publish, live, from any machine, until Ctrl-C."""
    settings = read_config(config, override, ANY_MODEL)
    from edge_asr import cli_subscribe, logs

    logs.set_up(settings.log)
    cli_subscribe.subscribe(
        settings.mqtt, device, topic or (), json_lines=json_lines, complete=complete, state=state, since_seq=since_seq
    )


@app.command("build-engine")
def build_engine(
    model: ModelOption = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="auto|tensorrt-fp16|onnx|onnx-int8|onnx-fp32", help="engine.target for once."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to; engine.dir, or below state_dir if not given.")
    ] = None,
    if_needed: Annotated[bool, typer.Option("--if-needed", help="Do nothing where one that fits is there.")] = False,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Make of a model what this machine runs fastest; print the path of the manifest."""
    own = {"--target": ("engine.target", target), "--out": ("engine.dir", out)}
    settings = read_config(config, override, model, options=own)
    from edge_asr import cli_engine

    cli_engine.build(settings, if_needed)


@bench.command("decode")
def bench_decode(
    model: ModelOption = None,
    engine: EngineOption = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads of one inference; engine.threads if not given.")
    ] = None,
    seconds: Annotated[
        str, typer.Option("--seconds", metavar="S,S,...", help="Lengths of audio to decode.")
    ] = "2,5,10",
    batch: Annotated[int, typer.Option("--batch", min=1, max=64, help="Segments decoded together.")] = 1,
    json_lines: Annotated[bool, typer.Option("--json", help="Print a case a line, as JSON.")] = False,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Measure how long the recogniser takes, stage by stage."""
    own = {"--engine": ("engine.dir", engine), "--threads": ("engine.threads", threads)}
    settings = read_config(config, override, model, options=own)
    from edge_asr import cli_bench, logs

    logs.set_up(settings.log)
    cli_bench.bench_decode(settings, _durations(seconds), batch, json_lines)


@bench.command("latency")
def bench_latency(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Sentences, each a file, in any format.")],
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="aggressive|default|relaxed", help="segment.preset for once."),
    ] = None,
    streams: Annotated[int, typer.Option("--streams", min=1, max=32, help="Each plays all files, at once.")] = 1,
    clients: Annotated[
        int, typer.Option("--clients", min=0, max=64, help="Ask for long recordings meanwhile, one after another.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    model: ModelOption = None,
    engine: EngineOption = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Measure from the end of speech to the broker: play files at the pace of speech through the whole appliance.

    Exit code: 1 if anything said was lost.
    """
    own = {"--preset": ("segment.preset", preset), "--engine": ("engine.dir", engine)}
    settings = read_config(config, override, model, options=own)
    from edge_asr import cli_bench_latency, logs

    logs.set_up(settings.log)
    if (lost := cli_bench_latency.bench_latency(settings, files, streams, clients, as_json)) is not None:
        _complain(lost)
        raise typer.Exit(1)


@bench.command("idle")
def bench_idle(
    minutes: Annotated[float, typer.Option("--minutes", min=0.05, max=10_080, help="How long.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    model: ModelOption = None,
    engine: EngineOption = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Measure what listening takes while nobody speaks: processor, wake-ups, memory and whether that grows.

    Exit code: 1 if something was heard in the noise.
    """
    settings = read_config(config, override, model, options={"--engine": ("engine.dir", engine)})
    from edge_asr import cli_bench_idle, logs

    logs.set_up(settings.log)
    if (heard := cli_bench_idle.bench_idle(settings, minutes, as_json)) is not None:
        _complain(heard)
        raise typer.Exit(1)


def _durations(text: str) -> list[float]:
    try:
        durations = [float(part) for part in text.split(",")]
    except ValueError:
        durations = []
    if not durations or not all(0 < duration <= 600 for duration in durations):
        raise ConfigError(f"--seconds {text}: should be lengths up to 600 seconds with commas, such as 2,5,10")
    return durations


@models.command("list")
def list_models(
    json_lines: Annotated[bool, typer.Option("--json", help="Print a model a line, as JSON.")] = False,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """List the models of the catalogue, with size, licence and whether they are here."""
    settings = read_config(config, override, ANY_MODEL)
    from edge_asr import cli_models

    cli_models.show_list(settings, json_lines)


@models.command("pull")
def pull_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of the catalogue.")],
    accepted: Annotated[
        bool, typer.Option("--accept-licence", "-y", help="Accept the model's licence without being asked.")
    ] = False,
    no_default: Annotated[bool, typer.Option("--no-default", help="Do not make it what `model: null` means.")] = False,
    source: Annotated[
        str | None, typer.Option("--source", metavar="huggingface|modelscope", help="Pull from this hub only.")
    ] = None,
    mirror: Annotated[
        str | None, typer.Option("--mirror", metavar="URL", help="Pull <URL>/<NAME>/<file> instead of from a hub.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Copy from a folder or USB stick instead.")
    ] = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Bring a model here: resumed where it broke off, verified, and tried on its own test recording."""
    if sum(place is not None for place in (source, mirror, folder)) > 1:
        raise ConfigError("--source, --mirror and --from exclude each other; give one")
    settings = read_config(config, override, ANY_MODEL, options={"--mirror": ("models.mirror", mirror)})
    from edge_asr import cli_models

    cli_models.pull(settings, name, source, folder, accepted=accepted, default=not no_default)


@models.command("verify")
def verify_models(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="All that are here if none.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print a model a line, as JSON.")] = False,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Compare models on this machine with the catalogue, and try them on their own test recordings."""
    settings = read_config(config, override, ANY_MODEL)
    from edge_asr import cli_models

    if failed := cli_models.verify(settings, names or (), json_lines):
        raise typer.Exit(failed.exit_code)


@models.command("remove")
def remove_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A pulled model.")],
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Delete a pulled model, or what there is of one."""
    settings = read_config(config, override, ANY_MODEL)
    from edge_asr import cli_models

    cli_models.remove(settings, name)


@app.command()
def forget(config: ConfigOption = None, override: OverrideOption = None) -> None:
    """Erase what the outbox keeps of what was said, delivered or not; the service may run, and does it then.

    What others have received they keep. `mqtt forget` takes back what the broker retains, which is nothing spoken.
    """
    settings = read_config(config, override, ANY_MODEL)
    from edge_asr import cli_forget

    cli_forget.forget(settings)


@app.command()
def token(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Make a token that lets a program ask the HTTP server from another machine."""
    from edge_asr import cli_token

    cli_token.make(as_json)


@mqtt.command("forget")
def mqtt_forget(
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="Of this appliance; device_id if not given.")
    ] = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Take back all that the broker keeps of an appliance: discovery by Home Assistant, status and state."""
    settings = read_config(config, override, ANY_MODEL, options={"--device": ("device_id", device)})
    from edge_asr import cli_mqtt

    cli_mqtt.forget(settings)


def _complain(error: EdgeAsrError) -> None:
    if sys.stderr is None:  # closed by whoever started the program
        return
    from edge_asr.logs import ERROR_MARK, in_journal

    mark = ERROR_MARK if in_journal() else ""
    for line in str(error).splitlines():
        print(f"{mark}{PROGRAM}: {line}", file=sys.stderr)


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
