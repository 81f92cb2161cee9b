"""OpenAI's own client, unmodified, against the running server."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from bundled import recording, sound_of, transcripts, write_wav
from openai import AsyncOpenAI, OpenAI
from openai.types.audio import TranscriptionTextDeltaEvent, TranscriptionTextDoneEvent, TranscriptionVerbose
from speech_server import Serving, serving

from edge_asr.errors import EngineError
from edge_asr.serve.admission import Admission
from edge_asr.service import SpeechService
from edge_asr.types import SAMPLE_RATE, Samples, Transcript

TEXTS = transcripts()
NAMES = sorted(TEXTS)
FIRST, *_ = NAMES
MODEL = "paraformer-tiny"
TOKEN = "a token of at least thirty-two characters"


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(wyoming={"enabled": False}, funasr={"enabled": False}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def conversation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return a recording that is longer than a segment may be, and what is said in it."""
    names = (NAMES * 8)[:12]
    pause = np.zeros(SAMPLE_RATE, np.float32)
    whole = np.concatenate([part for name in names for part in (sound_of(name), pause)])
    assert len(whole) > 30 * SAMPLE_RATE
    path = write_wav(tmp_path_factory.mktemp("conversation") / "conversation.wav", whole)
    return path, [TEXTS[name] for name in names]


def ask(client: OpenAI, path: Path | None = None, **wishes: Any) -> Any:
    return client.audio.transcriptions.create(file=path or recording(FIRST), **{"model": MODEL, **wishes})


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_has_its_text(client: OpenAI, name: str) -> None:
    answer = ask(client, recording(name))
    assert answer.text == TEXTS[name]
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == pytest.approx(len(sound_of(name)) / SAMPLE_RATE, abs=1e-3)


def test_clients_that_know_no_other_name_may_ask_for_whisper(client: OpenAI) -> None:
    assert ask(client, model="whisper-1").text == TEXTS[FIRST]


def test_text_is_the_text_and_nothing_else(client: OpenAI) -> None:
    assert ask(client, response_format="text") == f"{TEXTS[FIRST]}\n"


def test_subtitles_of_both_kinds_show_what_is_said_when(client: OpenAI, conversation: tuple[Path, list[str]]) -> None:
    path, texts = conversation
    subrip = ask(client, path, response_format="srt").strip().split("\n\n")
    assert [block.split("\n")[2] for block in subrip] == texts
    assert [block.split("\n")[0] for block in subrip] == [str(number) for number in range(1, len(texts) + 1)]
    begins = [block.split("\n")[1].split(" --> ")[0] for block in subrip]
    assert begins == sorted(begins)
    head, *web = ask(client, path, response_format="vtt").strip().split("\n\n")
    assert head == "WEBVTT"
    assert [block.split("\n")[1] for block in web] == texts
    assert [block.split(" --> ")[0].replace(".", ",") for block in web] == begins


def test_verbose_json_tells_segments_unless_asked_for_words(client: OpenAI) -> None:
    answer = ask(client, response_format="verbose_json")
    assert isinstance(answer, TranscriptionVerbose)
    TranscriptionVerbose.model_validate(answer.model_dump(), strict=True)
    assert (answer.text, answer.language, answer.words) == (TEXTS[FIRST], "chinese", None)
    [segment] = answer.segments or []
    assert segment.text == TEXTS[FIRST]
    assert 0 < segment.start < segment.end <= answer.duration


def test_words_are_told_in_order_and_make_up_the_text(client: OpenAI) -> None:
    answer = ask(client, response_format="verbose_json", timestamp_granularities=["word"])
    assert "".join(word.word for word in answer.words) == TEXTS[FIRST]
    starts = [word.start for word in answer.words]
    assert starts == sorted(starts)
    assert all(word.start < word.end <= answer.duration for word in answer.words)
    assert answer.segments is None


def test_words_and_segments_can_be_asked_for_at_once(client: OpenAI) -> None:
    answer = ask(client, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert answer.words
    assert answer.segments


def test_log_probabilities_come_with_the_text_where_asked_for(client: OpenAI) -> None:
    answer = ask(client, include=["logprobs"])
    assert "".join(one.token for one in answer.logprobs) == TEXTS[FIRST]
    assert all(one.logprob <= 0 for one in answer.logprobs)
    assert bytes(int(byte) for one in answer.logprobs for byte in one.bytes).decode() == TEXTS[FIRST]


def test_what_the_model_has_no_such_thing_for_is_taken_without_effect(client: OpenAI) -> None:
    answer = ask(
        client,
        language="zh",
        prompt="home automation",
        temperature=0.3,
        chunking_strategy={"type": "server_vad", "threshold": 0.5},
    )
    assert answer.text == TEXTS[FIRST]


def test_silence_has_an_empty_text_in_every_format(client: OpenAI, tmp_path: Path) -> None:
    silence = write_wav(tmp_path / "silence.wav", np.zeros(SAMPLE_RATE, np.float32))
    assert ask(client, silence).text == ""
    assert ask(client, silence, response_format="text") == "\n"
    assert ask(client, silence, response_format="srt") == ""
    assert ask(client, silence, response_format="vtt") == "WEBVTT\n\n"
    verbose = ask(client, silence, response_format="verbose_json")
    assert (verbose.text, verbose.segments, verbose.duration) == ("", [], 1.0)
    assert [event.type for event in ask(client, silence, stream=True)] == ["transcript.text.done"]


def test_a_stream_tells_each_segment_and_then_all(client: OpenAI, conversation: tuple[Path, list[str]]) -> None:
    path, texts = conversation
    *deltas, done = ask(client, path, stream=True)
    assert all(isinstance(delta, TranscriptionTextDeltaEvent) for delta in deltas)
    assert [delta.delta for delta in deltas] == texts
    assert isinstance(done, TranscriptionTextDoneEvent)
    assert done.text == "".join(texts)
    assert done.usage is not None
    assert done.usage.model_dump()["type"] == "duration"


def test_a_stream_tells_log_probabilities_where_asked_for(client: OpenAI) -> None:
    delta, done = ask(client, stream=True, include=["logprobs"])
    assert "".join(one.token for one in delta.logprobs) == TEXTS[FIRST]
    assert [one.logprob for one in done.logprobs] == [one.logprob for one in delta.logprobs]


def test_the_first_segment_is_told_before_the_last_is_recognised(
    server: Serving, client: OpenAI, conversation: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, texts = conversation
    may_go_on = asyncio.Event()
    transcribe = server.service.transcribe

    async def held_up(samples: Samples, source: str) -> AsyncGenerator[Transcript, None]:
        async for transcript in transcribe(samples, source):
            yield transcript
            await may_go_on.wait()

    monkeypatch.setattr(server.service, "transcribe", held_up)
    with ask(client, path, stream=True) as events:
        assert next(events).delta == texts[0]
        assert server.server._loop is not None
        server.server._loop.call_soon_threadsafe(may_go_on.set)
        assert list(events)[-1].text == "".join(texts)


async def test_the_asynchronous_client_is_answered_as_the_other(server: Serving) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def text_of(name: str) -> str:
            answer = await client.audio.transcriptions.create(file=recording(name), model=MODEL)
            return answer.text

        assert await asyncio.gather(*map(text_of, NAMES)) == [TEXTS[name] for name in NAMES]
        events = await client.audio.transcriptions.create(file=recording(FIRST), model=MODEL, stream=True)
        assert [event.type async for event in events] == ["transcript.text.delta", "transcript.text.done"]
        assert [model.id async for model in client.models.list()] == [MODEL]


def test_the_models_are_listed_and_told_one_by_one(client: OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL) == model
    assert client.models.retrieve("whisper-1").id == "whisper-1"
    with pytest.raises(openai.NotFoundError, match="paraformer-tiny") as refused:
        client.models.retrieve("gpt-4o-transcribe")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("wishes", "param", "message"),
    [
        ({"response_format": "diarized_json"}, "response_format", "json, text, srt, verbose_json, vtt"),
        ({"response_format": "text\r\n<b>"}, "response_format", "should be one of"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities", "verbose_json"),
        (
            {"timestamp_granularities": ["sentence"], "response_format": "verbose_json"},
            "timestamp_granularities",
            "segment, word",
        ),
        ({"include": ["everything"]}, "include", "logprobs"),
        ({"include": ["logprobs"], "response_format": "text"}, "include", "json"),
        ({"stream": True, "response_format": "srt"}, "stream", "json or text"),
        ({"temperature": 1.5}, "temperature", "from 0 to 1"),
        ({"temperature": "nan"}, "temperature", "from 0 to 1"),
        ({"language": "Chinese, please"}, "language", "ISO 639-1"),
        ({"extra_body": {"stream": "perhaps"}}, "stream", "true, false"),
        ({"known_speaker_names": ["agent"]}, "known_speaker_names", "speakers"),
        ({"extra_body": {"known_speaker_references": ["data:,"]}}, "known_speaker_references", "speakers"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_name(
    client: OpenAI, wishes: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        ask(client, **wishes)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


@pytest.mark.parametrize("model", ["gpt-4o-transcribe", "whisper-2", ""])
def test_another_model_is_not_found(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match=MODEL) as refused:
        ask(client, model=model)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_what_is_no_audio_is_refused_even_where_events_are_asked_for(client: OpenAI, tmp_path: Path) -> None:
    (path := tmp_path / "letter.wav").write_text("Dear Sir or Madam")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, path, stream=stream)
        assert (refused.value.code, refused.value.param) == ("invalid_audio", "file")
        assert str(tmp_path) not in refused.value.message


def test_translations_are_not_offered(client: OpenAI) -> None:
    with (
        pytest.warns(DeprecationWarning, match="deprecated"),
        pytest.raises(openai.NotFoundError, match="/v1/audio/translations"),
    ):
        client.audio.translations.create(file=recording(FIRST), model=MODEL)


def test_an_engine_that_fails_is_an_error_of_the_server(
    server: Serving, client: OpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transcribe = server.service.transcribe

    async def fail(samples: Samples, source: str) -> AsyncGenerator[Transcript, None]:
        if len(samples):
            raise EngineError("CUDA error 719 in /opt/engine")
        yield await anext(transcribe(samples, source))

    monkeypatch.setattr(server.service, "transcribe", fail)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="see the log") as refused:
            ask(client, stream=stream)
        assert refused.value.code == "engine_failed"
        assert "CUDA" not in refused.value.message
    assert "CUDA error 719" in caplog.text


def test_an_engine_that_fails_in_the_middle_of_a_stream_ends_it_with_an_error(
    server: Serving, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcribe = server.service.transcribe

    async def fail_later(samples: Samples, source: str) -> AsyncGenerator[Transcript, None]:
        async for transcript in transcribe(samples, source):
            yield transcript
        raise EngineError("CUDA error 719")

    monkeypatch.setattr(server.service, "transcribe", fail_later)
    with ask(client, stream=True) as events:
        assert next(events).delta == TEXTS[FIRST]
        with pytest.raises(openai.APIError, match="see the log"):
            next(events)


def test_too_much_to_do_is_said_at_once_with_when_to_come_back(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "expected_wait_s", lambda self: 60.0)
    with pytest.raises(openai.InternalServerError) as refused:
        ask(client)
    assert (refused.value.status_code, refused.value.code) == (503, "overloaded")
    assert int(refused.value.response.headers["retry-after"]) >= 1


def test_a_model_that_is_still_being_loaded_is_said_to_be(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpeechService, "engine", None)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="being loaded") as refused:
            ask(client, stream=stream)
        assert (refused.value.status_code, refused.value.code) == (503, "not_ready")


def test_the_key_of_the_client_is_the_token() -> None:
    digest = f"sha256:{hashlib.sha256(TOKEN.encode()).hexdigest()}"
    with serving(http={"tokens": (digest,)}, wyoming={"enabled": False}, funasr={"enabled": False}) as server:
        with OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0) as client:
            assert ask(client).text == TEXTS[FIRST]
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                ask(client)
            assert refused.value.code == "invalid_api_key"
