"""Whether a text is complete: tables of what people say, and properties of any text and any phrases."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_asr.speech.completeness import (
    GROWING_ENDPOINT,
    OPEN_ALONE,
    OPEN_ENDINGS,
    OPEN_ENDPOINT,
    SURE,
    Completeness,
    ContentEndpoint,
    completeness,
    normalize,
)
from edge_asr.speech.grammar import WORDS, row_of
from edge_asr.speech.segmenter import ENDPOINTS

COMPLETE, GROWING = Completeness.COMPLETE, Completeness.GROWING
OPEN, UNKNOWN = Completeness.OPEN, Completeness.UNKNOWN
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
        "", " 。", "好的", "对", "不对", "今天星期一", "下周三", "二号机器", "三点", "设置五分钟",
        "打开小明", "把那个苹果", "请打开客厅灯吧", "五月三号", "我在三楼", "想听歌曲红豆", "闹钟", "今天天气",
        "return", "reset", "banana", "fifty percent", "weighty", "the weather of today",
    ],
)  # fmt: skip
def test_what_may_or_may_not_go_on_is_unknown(text: str) -> None:
    assert completeness(text) is UNKNOWN


@pytest.mark.parametrize(
    "text",
    [
        "打开客厅灯", "请打开客厅的灯", "打开小明房间的灯", "关掉所有灯", "启动三号产线", "急停仓库传送带",
        "调高温度", "播放音乐", "把灯打开", "把空调调低", "音量调低", "客厅灯打开", "停止播放", "暂停", "下一首",
        "把空调调到二十六度", "空调设置为制冷", "调到二十六点五度", "设定二十度", "音量调到百分之三十五",
        "调到 26℃", "调到 50%",
        "设置二十分钟闹钟", "设置五分钟的倒计时", "现在几点", "现在几点了", "今天天气怎么样", "灯关了吗",
        "Turn on the living room light.", "turn the light on", "increase the volume", "start machine number three",
        "set the temperature to twenty six degrees", "what time is it", "Pause!",
    ],
)  # fmt: skip
def test_a_whole_command_is_complete_without_being_listed(text: str) -> None:
    assert completeness(text) is COMPLETE


@pytest.mark.parametrize(
    "text", ["音量调到百分之三", "音量调到百分之三十", "音量调高", "停止", "急停", "播放", "stop", "play"]
)
def test_a_whole_command_that_may_grow_is_growing(text: str) -> None:
    assert completeness(text) is GROWING


@pytest.mark.parametrize(
    "text",
    [
        "打开客厅", "启动三号", "急停仓库", "把卧室空调", "把空调调到", "空调设置为", "音量", "客厅空调", "客厅",
        "今天", "调高",
        "turn on the living room", "turn the light", "set the volume", "set the volume to", "start machine number",
    ],
)  # fmt: skip
def test_a_command_that_lacks_something_is_open(text: str) -> None:
    assert completeness(text) is OPEN


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("打开客厅灯", "VPD"),
        ("把小明灯带关掉", "B??DV"),  # 灯带 is one thing, not a lamp and something more
        ("十分钟", "nH"),
        ("百分之三十五", "Cf"),
        ("二十六点五度", "nU"),
        ("三点", "n?"),
        ("点五度", "?nU"),
        ("turn on the light", "VXD"),
        ("turn the light on", "GXDR"),
    ],
)
def test_the_longest_word_that_fits_is_read(text: str, row: str) -> None:
    assert row_of(normalize(text)) == row


def test_every_word_of_the_lists_is_read_as_one() -> None:
    for letter, entries in WORDS.items():
        for entry in entries.split():
            assert row_of(normalize(entry.replace("_", " "))) == letter, entry


def test_a_long_text_is_judged_at_once() -> None:
    assert completeness("把的客厅一号" * 400) is OPEN
    assert completeness("打开的那个" * 400) is UNKNOWN


@pytest.mark.parametrize("text", ["打开客厅灯", "打开 客厅灯。", "Turn off the light", "turn off the light!", "二十"])
def test_a_known_phrase_is_complete(text: str) -> None:
    assert completeness(text, known("打开客厅灯", "turn off the light", "二十")) is COMPLETE


def test_a_phrase_that_another_one_begins_with_is_not_complete() -> None:
    phrases = known("打开客厅灯", "打开客厅灯带", "turn on the light", "turn on the lights")
    assert completeness("打开客厅灯", phrases) is GROWING
    assert completeness("turn on the light", phrases) is GROWING
    assert completeness("打开客厅灯带", phrases) is COMPLETE


@pytest.mark.parametrize("text", ["打开客厅", "打", "Turn off"])
def test_the_beginning_of_a_phrase_is_open(text: str) -> None:
    assert completeness(text, known("打开客厅灯", "turn off the light")) is OPEN


@pytest.mark.parametrize("text", ["小爱打开花灯", "花灯走马灯吧", "走马灯"])
def test_more_or_less_than_a_phrase_is_not_complete(text: str) -> None:
    assert completeness(text, known("花灯走马灯")) is UNKNOWN


@PROPERTY
@given(TEXTS)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@PROPERTY
@given(TEXTS, st.sets(TEXTS))
def test_of_the_phrases_those_are_complete_that_no_other_one_begins_with(text: str, phrases: set[str]) -> None:
    all_known = known(text, *phrases)
    longer = any(phrase != normalize(text) and phrase.startswith(normalize(text)) for phrase in all_known)
    if normalize(text):
        assert completeness(text, all_known) is (GROWING if longer else COMPLETE)


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
    assert [endpoint.chunks(text) for text in ("打开客厅灯", "调到", "好的")] == [complete, 31, unknown]


@pytest.mark.parametrize(("preset", "growing"), [("aggressive", 14), ("default", 14), ("relaxed", 25)])
def test_what_may_grow_waits_as_long_as_people_pause_inside_a_sentence(preset: str, growing: int) -> None:
    assert ContentEndpoint(ENDPOINTS[preset]).chunks("音量调到百分之三十") == growing
    assert GROWING_ENDPOINT * 32 == 448


def test_a_word_misheard_ends_nothing_early() -> None:
    endpoint = ContentEndpoint(ENDPOINTS["aggressive"])
    assert endpoint.chunks("把空调调到二十度", SURE) == 5
    assert endpoint.chunks("把空调调到二十度", SURE - 0.01) == GROWING_ENDPOINT
    assert endpoint.chunks("好的", 0.0) == 5


@PROPERTY
@given(TEXTS, st.sets(TEXTS), st.sampled_from(sorted(ENDPOINTS.values())))
def test_no_pause_lasts_less_than_five_chunks_or_more_than_a_second(text: str, phrases: set[str], preset: int) -> None:
    assert 5 <= ContentEndpoint(preset, known(*phrases)).chunks(text) <= OPEN_ENDPOINT
    assert OPEN_ENDPOINT * 32 <= 1000
