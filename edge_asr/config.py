"""The configuration: frozen models, one per part; every key with its default, its bounds and its meaning."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

from edge_asr.catalogue import BUNDLED, CATALOGUE
from edge_asr.config_fields import Integer, Number, Section, UserPath
from edge_asr.config_mqtt import HermesConfig, HomeAssistantConfig, MqttConfig, OutboxConfig
from edge_asr.config_server import FunasrConfig, HttpConfig, WyomingConfig
from edge_asr.errors import ConfigError

BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "engines" / BUNDLED.name
PULLED_LAST = "default"
"""File beside the pulled models that names the one pulled last."""
NUMBERED = re.compile(r"\s*(?:(?:plug)?hw:(?:CARD=)?)?\d+\s*(?:,.*)?$")
"""A device by the number that PortAudio or ALSA has given it for now."""


def _bundle(path: Path) -> Path:
    if path == BUNDLED_MODEL and not path.exists():
        raise ValueError(
            "no model comes with the installed package; run: edge-asr models pull paraformer-small, or name the folder"
            " of one here or with --model DIR (the demo needs a checkout of the repository)"
        )
    return path


def _chosen(value: Any, info: ValidationInfo) -> Any:
    """Return the folder that the name of a model stands for; null is the model pulled last, else the bundled one."""
    state_dir = info.data.get("state_dir")
    if state_dir is None:  # is wrong itself
        return BUNDLED_MODEL if value is None else value
    models = models_dir(state_dir)
    name = pulled_last(models) if value is None else value
    if name is None or name == BUNDLED.name:
        return BUNDLED_MODEL
    if value is not None and value not in tuple(CATALOGUE):  # a path
        return value
    if not (models / name).is_dir():
        raise ValueError(f"{name} is not in {models}; run: edge-asr models pull {name}")
    return models / name


def _web_address(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", value):
        raise ValueError("should be an address such as https://nas.local/models")
    return value.rstrip("/")


def _device(value: Any) -> Any:
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and NUMBERED.match(value)):
        raise ValueError(
            "the numbers of devices change when one is plugged in; give a name, or a stable name that edge-asr devices"
            " lists"
        )
    return value


def _phrase(value: str) -> str:
    if not re.search(r"[^\W_]", value):
        raise ValueError("should be words, such as 打开客厅灯")
    return value


def host_device_id() -> str:
    """Return this host's name as a device id: letters, digits, `-` and `_` only."""
    name = socket.gethostname().split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:64] or "edge"


def default_state_dir() -> Path:
    """Return where the appliance keeps things: what systemd sets, else the user's own folder for data."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.partition(":")[0])
    home = os.environ.get("XDG_DATA_HOME", "")
    try:
        data = Path(home) if home.startswith("/") else Path.home() / ".local" / "share"
    except RuntimeError:  # a service without a home directory
        data = Path("/var/lib")
    return data / "edge_asr"


def models_dir(state_dir: Path) -> Path:
    """Return the folder of the pulled models."""
    return state_dir / "models"


def pulled_last(models: Path) -> str | None:
    """Return the name of the model pulled last; None: none was, or it was removed. Raises ConfigError."""
    try:
        return (models / PULLED_LAST).read_text(encoding="utf-8", errors="replace").strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(
            f"cannot read {error.filename} ({error.strerror}); make it readable, or set `model`"
        ) from error


class ModelsConfig(Section):
    """Where models are pulled from."""

    mirror: Annotated[str, AfterValidator(_web_address)] | None = None
    """A web server that has them as `<mirror>/<name>/<file>`; null: the hubs that the catalogue names."""


class TensorRtConfig(Section):
    """How TensorRT builds and runs an engine."""

    softmax_fp16: bool = False
    """The softmax of attention in half precision: fewer casts, for what rounding costs. Part of the plan."""
    cuda_graphs: bool = False
    """Replay a recorded sequence of launches instead of launching each kernel; memory for each length seen."""
    mapped_memory: bool = False
    """Let the GPU read and write the host's memory instead of copying: the two are one on a Jetson."""
    workspace_mb: Integer | None = Field(default=None, ge=64, le=65_536)
    """What the builder may take for trying kernels out; null: a share of what is free."""


class CudaConfig(Section):
    """onnxruntime's CUDA provider, the rung between TensorRT and the processor."""

    enabled: bool = False
    memory_limit_mb: Integer | None = Field(default=None, ge=64, le=1_048_576)
    """The most it may take of the GPU's memory; null: no limit."""
    arena: Literal["as-requested", "power-of-two"] = "as-requested"
    """How its memory grows."""
    search: Literal["default", "heuristic", "exhaustive"] = "heuristic"
    """How it looks for the fastest convolution."""
    cuda_graphs: bool = False
    """Replay recorded launches, for segments filled up to fixed lengths."""


class EngineConfig(Section):
    """How the recogniser runs the model."""

    target: Literal["auto", "tensorrt-fp16", "onnx", "onnx-int8", "onnx-fp32"] = "auto"
    """What is built for this machine. auto: tensorrt-fp16 where there are TensorRT and a GPU, else onnx; onnx measures
    once which of its two is faster."""
    strict: bool = False
    """Refuse to run on a lesser engine than the target."""
    dir: UserPath | None = None
    """The folder of an engine that `edge-asr build-engine` made; null: one below `state_dir`, built when wanted."""
    threads: Integer = Field(default=0, ge=0, le=256)
    """Threads of one inference; 0 takes one for each physical core."""
    gpu: Integer = Field(default=0, ge=0, le=63)
    """Which GPU, by its number."""
    watch: bool = True
    """Change to what is put into the folder of the model, or of its engine, once it has been left alone for 5 s."""
    batch_wait_ms: Number = Field(default=0.0, ge=0, le=100)
    """How long a request of the network waits for company, on an engine that takes several at a time."""
    tensorrt: TensorRtConfig = TensorRtConfig()
    cuda: CudaConfig = CudaConfig()


class FileSourceConfig(Section):
    """An audio file as a source."""

    kind: Literal["file"] = "file"
    path: UserPath
    realtime: bool = True
    """Played at the pace of speech, or else as fast as it can be decoded."""
    name: str | None = Field(default=None, min_length=1)
    """What transcripts call the source; null: its kind and path."""


class StdinSourceConfig(Section):
    """Raw PCM (signed 16 bit little endian, 16 kHz, mono) on standard input as a source."""

    kind: Literal["stdin"] = "stdin"
    name: str | None = Field(default=None, min_length=1)
    """What transcripts call the source; null: its kind."""


class MicrophoneSourceConfig(Section):
    """A microphone as a source; it may come and go."""

    kind: Literal["microphone"] = "microphone"
    device: Annotated[str, BeforeValidator(_device)] = Field(default="default", min_length=1)
    """A name or a part of one, ALSA's `hw:CARD=<id>,DEV=0`, a link below /dev/snd, or `default`."""
    channel: Integer | None = Field(default=None, ge=0, le=63)
    """Which channel, from 0; null: the mean of all."""
    rate: Integer | None = Field(default=None, ge=8_000, le=192_000)
    """Samples per second to open the device at; null: 16,000, or the native rate where it refuses those."""
    name: str | None = Field(default=None, min_length=1)
    """What transcripts call the source; null: its kind and device."""

    @property
    def source_name(self) -> str:
        """What transcripts call it."""
        return self.name or f"{self.kind}:{self.device}"


def _kind(source: Any) -> str:
    """Return the kind that decides which keys a source has; one that names none is a file."""
    kind = source.get("kind") if isinstance(source, dict) else getattr(source, "kind", None)
    return "file" if kind is None else str(kind)


SourceConfig = Annotated[
    Annotated[FileSourceConfig, Tag("file")]
    | Annotated[StdinSourceConfig, Tag("stdin")]
    | Annotated[MicrophoneSourceConfig, Tag("microphone")],
    Discriminator(_kind),
]
SOURCE_KINDS: dict[str, type[Section]] = {
    "file": FileSourceConfig, "stdin": StdinSourceConfig, "microphone": MicrophoneSourceConfig,
}  # fmt: skip


class SegmentConfig(Section):
    """Where a segment starts and ends."""

    preset: Literal["aggressive", "default", "relaxed"] = "default"
    """How long a pause ends a segment: 160, 384 or 800 ms."""
    content_endpointing: bool = True
    """Live sources: the text before a pause may end a complete phrase sooner, and wait where it ends open."""
    phrases: tuple[Annotated[str, AfterValidator(_phrase)], ...] = ()
    """What is complete as it stands; capitals, spaces and punctuation do not matter."""
    max_s: Number = Field(default=30.0, ge=8, le=30)
    """A longer segment is split at its quietest chunk."""
    threshold: Number = Field(default=0.5, gt=0, lt=1)
    """Speech probability from which a chunk counts as speech."""
    pre_roll_ms: Integer = Field(default=300, ge=0, le=2000)
    """Audio kept from before the first speech chunk."""
    min_speech_ms: Integer = Field(default=96, ge=0, le=2000)
    """Shorter speech than this makes no segment."""
    partial_interval_ms: Integer = Field(default=300, ge=0, le=10_000)
    """Live sources: how often what is being said is published as it grows; 0: never."""


class ListenConfig(Section):
    """To whom the appliance listens."""

    mode: Literal["always", "push_to_talk", "phrase"] = "always"
    """Everybody; whoever asks for it first; whoever begins with a wake phrase."""
    phrases: tuple[Annotated[str, AfterValidator(_phrase)], ...] = ()
    """Wake phrases of the mode `phrase`, such as 小爱同学."""
    seconds: Number = Field(default=8.0, ge=1, le=120)
    """How long it listens when asked to, or after a wake phrase on its own."""

    @field_validator("phrases")
    @classmethod
    def _are_there(cls, phrases: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.data.get("mode") == "phrase" and not phrases:
            raise ValueError("mode phrase needs a wake phrase; set listen.phrases, to [小爱同学] for example")
        return phrases


class BudgetConfig(Section):
    """The time a transcript may take."""

    response_ms: Number = Field(default=300.0, gt=0, le=60_000)
    """From the end of a segment to its publication."""
    max_backlog_s: Number = Field(default=120.0, ge=10, le=3600)
    """Audio of one source that may wait to be recognised; beyond it the oldest segment is published as lost."""
    late_share: Number = Field(default=0.1, gt=0, le=1)
    """With a larger share of late transcripts the state is degraded."""


class GatesConfig(Section):
    """What is too doubtful to publish. Null: the bundle's card decides, off where it has no value; 0: off."""

    min_confidence: Number | None = Field(default=None, ge=0, le=1)
    """A transcript with a lower confidence is dropped."""
    min_speech_ratio: Number | None = Field(default=None, ge=0, le=1)
    """A segment with a smaller share of speech chunks is dropped."""
    min_steadiness: Number | None = Field(default=None, ge=0, le=1)
    """A transcript of up to four tokens is dropped that is less sure of itself in disturbed sound; two decodes more."""
    max_tokens_per_s: Number | None = Field(default=None, ge=0)
    """A transcript with more tokens per second of speech is dropped."""


class LogConfig(Section):
    """What is logged."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["auto", "text", "json"] = "auto"
    """`auto` is `text`, but where the journal listens: lines with its priorities and without the time."""


_NULL: Any = None
"""What `model` is where nobody sets it, before its validator puts a folder in its place."""


class Config(Section):
    """The whole configuration; a part receives its own section only."""

    device_id: str = Field(default_factory=host_device_id, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    state_dir: UserPath = Field(default_factory=default_state_dir)
    """What outlives a restart, such as pulled models; made when there is something to keep."""
    model: Annotated[UserPath, BeforeValidator(_chosen), AfterValidator(_bundle)] = _NULL
    """The folder of a bundle, made from a name of the catalogue or from null."""
    models: ModelsConfig = ModelsConfig()
    engine: EngineConfig = EngineConfig()
    sources: tuple[SourceConfig, ...] = ()
    segment: SegmentConfig = SegmentConfig()
    listen: ListenConfig = ListenConfig()
    budget: BudgetConfig = BudgetConfig()
    gates: GatesConfig = GatesConfig()
    mqtt: MqttConfig = MqttConfig()
    outbox: OutboxConfig = OutboxConfig()
    home_assistant: HomeAssistantConfig = HomeAssistantConfig()
    hermes: HermesConfig = HermesConfig()
    http: HttpConfig = HttpConfig()
    wyoming: WyomingConfig = WyomingConfig()
    funasr: FunasrConfig = FunasrConfig()
    drain_s: Number = Field(default=10.0, ge=0, le=300)
    """Seconds that pending work may take when the daemon stops."""
    log: LogConfig = LogConfig()
