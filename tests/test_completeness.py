"""Whether a text is complete: tables of what people say, and properties of any text and any phrases."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_asr.speech.completeness import (
    OPEN_ALONE,
    OPEN_ENDINGS,
    OPEN_ENDPOINT,
    Completeness,
    ContentEndpoint,
    completeness,
    normalize,
)
from edge_asr.speech.segmenter import ENDPOINTS

COMPLETE, OPEN, UNKNOWN = Completeness.COMPLETE, Completeness.OPEN, Completeness.UNKNOWN
PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
TEXTS = st.text(alphabet="打开客厅灯带调到二十百分之 ,。ABturnthe'’9%İßﬁ", max_size=12)


def known(*phrases: str) -> frozenset[str]:
    return frozenset(map(normalize, phrases))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("打开 客厅灯。", "打 开 客 厅 灯"),
        ("Turn  ON the light!", "turn on the light"),
        ("what’s ＴＨＥ time", "what's the time"),
        ("调到26.5℃", "调 到 26 5 ° c"),
        ("50%", "50 %"),
        ("……", ""),
    ],
)
def test_capitals_spaces_widths_and_punctuation_do_not_matter(text: str, normal: str) -> None:
    assert normalize(text) == normal


@pytest.mark.parametrize(
    "text",
    [
        "把", "把客厅空调调到", "设置", "温度设定为", "音量调到百分之", "请", "打开客厅灯和", "关灯然后",
        "二十", "一三八", "调到二十", "幺三八零零", "三百", "调到 26", "第", "第三",
        "set the", "Set", "turn", "turn on the", "Turn on", "remind me to", "call my", "lights off, and", "please",
        "set it to twenty", "twenty-one", "one three eight", "打开", "关掉。",
    ],
)  # fmt: skip
def test_what_ends_open_is_open(text: str) -> None:
    assert completeness(text) is OPEN


@pytest.mark.parametrize(
    "text",
    [
        "", " 。", "打开客厅灯", "把灯打开", "把空调调高", "现在几点", "今天天气怎么样", "暂停", "播放",
        "好的", "对", "不对",
        "调到二十六度", "设置五分钟", "音量调到百分之三十", "今天星期一", "下周三", "二号机器", "调到 26℃",
        "调到 50%", "三点",
        "turn the light on", "what time is it", "return", "reset", "banana", "fifty percent", "weighty", "play",
    ],
)  # fmt: skip
def test_what_may_or_may_not_go_on_is_unknown(text: str) -> None:
    assert completeness(text) is UNKNOWN


@pytest.mark.parametrize("text", ["打开客厅灯", "打开 客厅灯。", "Turn off the light", "turn off the light!", "二十"])
def test_a_known_phrase_is_complete(text: str) -> None:
    assert completeness(text, known("打开客厅灯", "turn off the light", "二十")) is COMPLETE


def test_a_phrase_that_another_one_begins_with_is_not_complete() -> None:
    phrases = known("打开客厅灯", "打开客厅灯带", "turn on the light", "turn on the lights")
    assert completeness("打开客厅灯", phrases) is UNKNOWN
    assert completeness("turn on the light", phrases) is UNKNOWN
    assert completeness("打开客厅灯带", phrases) is COMPLETE


@pytest.mark.parametrize("text", ["打开客厅", "打", "Turn off"])
def test_the_beginning_of_a_phrase_is_open(text: str) -> None:
    assert completeness(text, known("打开客厅灯", "turn off the light")) is OPEN


@pytest.mark.parametrize("text", ["请打开客厅灯", "打开客厅灯吧", "客厅灯"])
def test_more_or_less_than_a_phrase_is_not_complete(text: str) -> None:
    assert completeness(text, known("打开客厅灯")) is UNKNOWN


@PROPERTY
@given(TEXTS)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@PROPERTY
@given(TEXTS, st.sets(TEXTS))
def test_only_phrases_that_no_other_one_begins_with_are_complete(text: str, phrases: set[str]) -> None:
    all_known = known(*phrases)
    alone = normalize(text) in all_known and not any(
        phrase != normalize(text) and phrase.startswith(normalize(text)) for phrase in all_known
    )
    assert (completeness(text, all_known) is COMPLETE) == (alone and bool(normalize(text)))


@PROPERTY
@given(TEXTS, st.sampled_from(OPEN_ENDINGS))
def test_an_open_ending_is_open_after_anything(text: str, ending: str) -> None:
    assert completeness(f"{text} {ending}") is OPEN


@pytest.mark.parametrize("ending", [*OPEN_ENDINGS, *OPEN_ALONE])
def test_every_entry_of_the_tables_can_be_met(ending: str) -> None:
    assert normalize(ending)
    assert completeness(ending) is OPEN


@pytest.mark.parametrize(
    ("preset", "complete", "unknown"), [("aggressive", 5, 5), ("default", 8, 12), ("relaxed", 8, 25)]
)
def test_a_complete_phrase_ends_after_five_to_eight_chunks_and_what_ends_open_after_31(
    preset: str, complete: int, unknown: int
) -> None:
    endpoint = ContentEndpoint(ENDPOINTS[preset], known("打开客厅灯"))
    assert [endpoint.chunks(text) for text in ("打开客厅灯", "调到", "现在几点")] == [complete, 31, unknown]


@PROPERTY
@given(TEXTS, st.sets(TEXTS), st.sampled_from(sorted(ENDPOINTS.values())))
def test_no_pause_lasts_less_than_five_chunks_or_more_than_a_second(text: str, phrases: set[str], preset: int) -> None:
    assert 5 <= ContentEndpoint(preset, known(*phrases)).chunks(text) <= OPEN_ENDPOINT
    assert OPEN_ENDPOINT * 32 <= 1000
