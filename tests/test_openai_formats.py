"""Transcripts as words, cues, subtitles and OpenAI's objects: pure rendering."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from openai.types.audio import TranscriptionVerbose

from edge_asr.recognizer.tokens import join
from edge_asr.serve.openai import Wish, verbose
from edge_asr.serve.subtitles import LONGEST_S, PAUSE_S, WIDEST, Span, cues, srt, text_of, vtt, words
from edge_asr.types import SegmentId, Token, Transcript

STEP_MS = 200
"""What a token lasts, unless a test says more."""
Timed = tuple[str, int | None, int | None]


def spoken(*texts: str) -> list[Timed]:
    """Return tokens that follow each other at once."""
    return [(text, STEP_MS * place, STEP_MS * (place + 1)) for place, text in enumerate(texts)]


def transcript(tokens: Sequence[Timed], *, offset_s: float | None = 0.0, duration_s: float | None = None) -> Transcript:
    text = join([text for text, *_ in tokens])
    ends = [end for *_, end in tokens if end is not None]
    return Transcript(
        id=SegmentId("0"),
        device="hall",
        source="http",
        text=text,
        text_raw=text,
        confidence=0.5 if tokens else None,
        started_at=None,
        offset_s=offset_s,
        duration_s=max(ends, default=0) / 1e3 if duration_s is None else duration_s,
        tokens=tuple(Token(text, start, end, 0.9) for text, start, end in tokens),
        latency_ms={},
        within_budget=None,
        decoded_at_pause=False,
        model="tiny",
        engine="onnx-fp32",
    )


def wish(*granularities: str, language: str | None = None) -> Wish:
    return Wish("verbose_json", granularities, logprobs=False, stream=False, language=language)


def texts(spans: Sequence[Span]) -> list[str]:
    return [span.text for span in spans]


def test_a_chinese_character_is_a_word() -> None:
    assert words(transcript(spoken("开", "灯"))) == [Span(0.0, 0.2, "开"), Span(0.2, 0.4, "灯")]


def test_pieces_of_an_english_word_are_one_word_from_its_first_to_its_last() -> None:
    [turn, kitchen] = words(transcript(spoken("turn", "kit@@", "ch@@", "en")))
    assert (turn, kitchen) == (Span(0.0, 0.2, "turn"), Span(0.2, 0.8, "kitchen"))


def test_a_word_that_breaks_off_is_a_word_without_its_mark() -> None:
    assert texts(words(transcript(spoken("turn", "kit@@")))) == ["turn", "kit"]


def test_words_count_from_the_start_of_the_recording() -> None:
    assert words(transcript(spoken("灯"), offset_s=3600.5)) == [Span(3600.5, 3600.7, "灯")]


def test_no_word_ends_after_the_sound() -> None:
    [word] = words(transcript([("灯", 500, 1600)], offset_s=2.0, duration_s=1.5))
    assert (word.start_s, word.end_s) == (2.5, 3.5)


def test_words_whose_time_is_not_known_span_the_transcript() -> None:
    found = words(transcript([("开", None, None), ("灯", None, None)], offset_s=2.0, duration_s=1.5))
    assert found == [Span(2.0, 3.5, "开"), Span(2.0, 3.5, "灯")]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (("打", "开", "灯"), "打开灯"),
        (("turn", "on", "the", "kit@@", "chen", "light"), "turn on the kitchen light"),
        (("打", "开", "wi@@", "fi", "好"), "打开 wifi 好"),
    ],
)
def test_a_cue_reads_as_the_transcript_does(tokens: tuple[str, ...], text: str) -> None:
    one = transcript(spoken(*tokens))
    assert texts(cues(one)) == [text] == [one.text]


def test_a_long_pause_ends_a_cue() -> None:
    pause_ms = round(PAUSE_S * 1e3) + 10
    tokens = [("开", 0, 200), ("灯", 200 + pause_ms, 400 + pause_ms)]
    assert texts(cues(transcript(tokens))) == ["开", "灯"]


def test_a_cue_is_never_too_wide_to_read() -> None:
    found = cues(transcript([("灯", 50 * place, 50 * place + 50) for place in range(100)]))
    assert [len(span.text) for span in found] == [WIDEST // 2] * 3 + [100 - 3 * (WIDEST // 2)]


def test_a_cue_of_english_is_cut_between_words() -> None:
    found = texts(
        cues(transcript([("light@@" if place % 2 else "kit", 50 * place, 50 * place + 50) for place in range(61)]))
    )
    assert len(found) > 1
    assert all(len(text) <= WIDEST for text in found)
    assert all(set(text.split()) <= {"kit", "lightkit"} for text in found)


def test_a_cue_is_never_too_long_to_stay() -> None:
    found = cues(transcript([("灯", 1000 * place, 1000 * place + 1000) for place in range(20)]))
    assert "".join(texts(found)) == "灯" * 20
    assert all(span.end_s - span.start_s <= LONGEST_S for span in found)


def test_a_cue_without_times_is_all_that_was_said() -> None:
    long = transcript([("灯", None, None)] * 100, offset_s=1.0, duration_s=25.0)
    assert cues(long) == [Span(1.0, 26.0, "灯" * 100)]


def test_subrip_numbers_its_cues_through_all_transcripts() -> None:
    found = [transcript(spoken("开", "灯")), transcript(spoken("on"), offset_s=3725.25)]
    assert srt(found) == (
        "1\n00:00:00,000 --> 00:00:00,400\n开灯\n\n2\n01:02:05,250 --> 01:02:05,450\non\n\n"
    )  # fmt: skip


def test_webvtt_has_its_header_hours_and_points() -> None:
    found = [transcript(spoken("开"), offset_s=36_000.0)]
    assert vtt(found) == "WEBVTT\n\n10:00:00.000 --> 10:00:00.200\n开\n\n"


def test_what_webvtt_would_read_as_its_own_is_escaped() -> None:
    body = vtt([transcript(spoken("a-->b", "<i>", "&"))]).split("\n")
    assert body[3] == "a--&gt;b &lt;i&gt; &amp;"


def test_silence_gives_subtitles_without_cues() -> None:
    assert srt([transcript([])]) == ""
    assert vtt([transcript([])]) == "WEBVTT\n\n"


def test_a_cue_never_ends_as_it_begins() -> None:
    [cue] = cues(transcript([("灯", 100, 100)]))
    assert cue.end_s > cue.start_s


def test_the_text_of_several_transcripts_has_spaces_where_words_would_touch() -> None:
    assert text_of([transcript(spoken("开")), transcript([]), transcript(spoken("灯"))]) == "开灯"
    assert text_of([transcript(spoken("on")), transcript(spoken("off")), transcript(spoken("灯"))]) == "on off 灯"


def test_verbose_objects_are_what_openai_describes() -> None:
    found = [transcript(spoken("开", "灯")), transcript(spoken("kit@@", "chen"), offset_s=5.0)]
    read = TranscriptionVerbose.model_validate(verbose(found, 6.0, wish("word", "segment")), strict=True)
    assert (read.text, read.duration, read.language) == ("开灯 kitchen", 6.0, "chinese")
    assert [(one.id, one.start, one.end, one.text) for one in read.segments or ()] == [
        (0, 0.0, 0.4, "开灯"),
        (1, 5.0, 5.4, "kitchen"),
    ]
    assert [one.word for one in read.words or ()] == ["开", "灯", "kitchen"]
    assert read.segments is not None
    assert read.segments[0].avg_logprob == pytest.approx(-0.6931, abs=1e-4)


def test_only_the_granularities_that_were_asked_for_are_told() -> None:
    found = [transcript(spoken("灯"))]
    assert "words" not in verbose(found, 1.0, wish("segment"))
    assert "segments" not in verbose(found, 1.0, wish("word"))


@pytest.mark.parametrize(
    ("tokens", "asked", "language"),
    [(("开", "on"), None, "chinese"), (("on",), "zh", "english"), ((), "zh", "chinese"), ((), None, "unknown")],
)
def test_the_language_is_named_in_words(tokens: tuple[str, ...], asked: str | None, language: str) -> None:
    assert verbose([transcript(spoken(*tokens))], 1.0, wish("segment", language=asked))["language"] == language


def test_clocks_round_up_to_the_next_second() -> None:
    assert re.findall(r"[\d:,]+", srt([transcript([("灯", 0, 0)], offset_s=59.9996)]))[1] == "00:01:00,000"
