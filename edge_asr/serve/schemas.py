"""What requests and answers look like, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorDetails(BaseModel):
    """What went wrong, as OpenAI's API says it."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """Every answer that is an error."""

    error: ErrorDetails


class TokenOut(BaseModel):
    """One unit of the model's vocabulary."""

    text: str
    start_ms: int | None = Field(description="from the start of the segment; null where the engine cannot tell")
    end_ms: int | None
    confidence: float


class TranscriptOut(BaseModel):
    """One segment of the recording: the schema edge_asr.transcript/1, as on MQTT."""

    id: str
    text: str
    confidence: float | None
    offset_s: float | None = Field(description="where it begins in the recording")
    duration_s: float
    tokens: list[TokenOut]
    latency_ms: dict[str, float]
    model: str
    engine: str


class Recognized(BaseModel):
    """A recording's transcripts."""

    text: str
    confidence: float | None
    duration: float = Field(description="seconds of audio")
    model: str
    engine: str
    segments: list[TranscriptOut]


class UsageOut(BaseModel):
    """What was listened to."""

    type: Literal["duration"]
    seconds: float


class LogprobOut(BaseModel):
    """A token and how sure the model is."""

    token: str
    bytes: list[int]
    logprob: float


class TranscriptionOut(BaseModel):
    """response_format json."""

    text: str
    usage: UsageOut
    logprobs: list[LogprobOut] | None = None


class SegmentOut(BaseModel):
    """A cue."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class WordOut(BaseModel):
    """A word, or a Chinese character."""

    word: str
    start: float
    end: float


class VerboseOut(BaseModel):
    """response_format verbose_json."""

    task: Literal["transcribe"]
    language: str
    duration: float
    text: str
    segments: list[SegmentOut] | None = None
    words: list[WordOut] | None = None
    usage: UsageOut


class ModelOut(BaseModel):
    """A model that can be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsOut(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelOut]


_MEANINGS = {
    400: "The request, or the audio in it, cannot be read",
    401: "A token is needed",
    403: "Pages of this origin may not ask here",
    408: "The body did not come in time",
    413: "The upload or the recording is too long",
    415: "Neither a form nor audio",
    421: "This server goes by another name",
    429: "Too many requests; see Retry-After",
    500: "The recognition failed",
    503: "Not ready, or too much to do; see Retry-After",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": meaning} for status, meaning in _MEANINGS.items()
}
"""What a route that takes audio may answer."""
REFUSALS: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 413, 421, 429)}
"""What one that only tells something may."""
OPEN_REFUSALS = {status: meaning for status, meaning in REFUSALS.items() if status != 401}
"""What one may that needs no token."""
LANGUAGE = "[A-Za-z]{2,3}(-[A-Za-z0-9]+)*"
BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
_FILE: dict[str, Any] = {**BINARY, "description": "audio of any format, or a video with sound"}


def form_or_audio() -> dict[str, Any]:
    """Return the body of /recognize."""
    form = {"type": "object", "required": ["file"], "properties": {"file": _FILE}}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": form},
            "audio/*": {"schema": BINARY},
            "application/octet-stream": {"schema": BINARY},
        },
    }


def transcription_form() -> dict[str, Any]:
    """Return the body of /v1/audio/transcriptions."""
    granularity = {"type": "string", "enum": ["word", "segment"]}
    ignored = "taken, without effect"
    properties: dict[str, Any] = {
        "file": _FILE,
        "model": {"type": "string", "description": "a name that /v1/models lists, or whisper-1"},
        "language": {
            "type": "string",
            "pattern": f"^{LANGUAGE}$",
            "description": f"ISO 639-1; {ignored} on the text",
        },
        "prompt": {"type": "string", "description": ignored},
        "response_format": {
            "type": "string",
            "enum": ["json", "text", "srt", "verbose_json", "vtt"],
            "default": "json",
        },
        "temperature": {"type": "number", "minimum": 0, "maximum": 1, "description": ignored},
        "timestamp_granularities[]": {
            "type": "array",
            "items": granularity,
            "description": "needs verbose_json",
        },
        "include[]": {"type": "array", "items": {"type": "string", "enum": ["logprobs"]}, "description": "needs json"},
        "stream": {"type": "boolean", "default": False, "description": "server-sent events; needs json or text"},
        "chunking_strategy": {"type": "string", "description": ignored},
    }
    form = {"type": "object", "required": ["file", "model"], "properties": properties}
    return {"required": True, "content": {"multipart/form-data": {"schema": form}}}
