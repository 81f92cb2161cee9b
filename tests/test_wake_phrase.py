"""Wake phrases: what sounds like one, what does not, and how much of a transcript it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_asr.speech.wake_phrase import FILLERS, WakePhrase

PROPERTY = settings(deadline=None, derandomize=True)
PHRASES = ("小爱同学", "小智", "hey jarvis", "小度 assistant", "好")
WAKE = WakePhrase(PHRASES)
HAN = st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF)
TOKENS = st.lists(
    st.one_of(HAN, st.text(max_size=4), st.sampled_from(["hey", "jar@@", "vis", "@@", "a@@", "小", "爱"]))
)


def after(phrase: str, text: str) -> int | None:
    return WakePhrase([phrase]).after(list(text))


# Chinese


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("小爱同学", 4), ("小爱同学打开灯", 4), ("小艾同学", 4), ("小爱童学", 4), ("晓爱同学", 4), ("小爱痛学", 4),
        ("晓艾童雪打开灯", 4), ("小爱铜靴", 4), ("小爱同血", 4),
        # one syllable off, with the same initial or final
        ("小爱头学打开灯", 4), ("小白同学打开灯", 4), ("小爱同些打开灯", 4), ("表爱同学", 4),
        # one missing
        ("爱同学打开灯", 3), ("小同学打开灯", 3), ("小爱学打开灯", 3), ("小爱同打开灯", 3), ("小爱同", 3),
        # one too many
        ("小爱的同学打开灯", 5), ("小小爱同学打开灯", 5), ("小爱同同学打开灯", 5), ("小爱同学学打开灯", 4),
        # something else
        ("大爱同学", None), ("小学同学", None), ("小张同学", None), ("同学小爱", None), ("我叫小爱同学", None),
        ("小白童鞋们", None), ("小百合同学", None), ("小爱", None), ("爱学", None), ("同学", None), ("打开灯", None),
        ("今天小爱同学", None), ("小时候", None), ("", None),
    ],
)  # fmt: skip
def test_four_syllables_may_have_one_off(text: str, count: int | None) -> None:
    assert after("小爱同学", text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("小智", 2),
        ("小志打开灯", 2),
        ("晓子", 2),
        ("小知", 2),
        ("小", None),
        ("智", None),
        ("小大智", None),
        ("小在", None),
    ],
)
def test_fewer_syllables_must_all_be_there(text: str, count: int | None) -> None:
    assert after("小智", text) == count


@pytest.mark.parametrize(
    ("phrase", "heard"),
    [
        ("知春", "资村"), ("师傅", "思夫"), ("牛奶", "刘来"), ("飞机", "费鸡"), ("很湖", "分福"), ("热", "乐"),
        ("上班", "三帮"), ("城市", "层四"), ("星星", "心新"), ("光床", "关川"), ("良乡", "连先"), ("人", "愣"),
        ("女", "吕"),
        ("〇", "零"), ("〇", "玲"),
    ],
)  # fmt: skip
def test_what_ears_confuse_is_the_same(phrase: str, heard: str) -> None:
    assert after(phrase, heard) == len(heard)
    assert after(heard, phrase) == len(phrase)


@pytest.mark.parametrize(("phrase", "heard"), [("吕", "路"), ("波", "坡"), ("东", "通"), ("家", "巴"), ("同", "屯")])
def test_what_ears_tell_apart_is_not(phrase: str, heard: str) -> None:
    assert after(phrase, heard) is None


@pytest.mark.parametrize(
    ("phrase", "heard"),
    [("音乐", "因月"), ("音乐", "因勒"), ("银行", "银航"), ("银行", "银形"), ("长城", "常城"), ("长城", "掌城")],
)
def test_a_character_is_any_of_its_readings(phrase: str, heard: str) -> None:
    assert after(phrase, heard) == 2


def test_a_character_without_a_known_reading_is_itself() -> None:
    assert after("㐀小", "㐀晓灯") == 2
    assert after("㐀小", "㐂晓灯") is None


# Letters


@pytest.mark.parametrize(
    ("tokens", "count"),
    [
        (["hey", "jar@@", "vis", "turn", "on"], 3), (["hey", "jarvis"], 2), (["Hey", "Jarvis"], 2),
        (["hey", "j@@", "ar@@", "v@@", "is"], 5), (["hey", "jar@@", "vi@@"], 3), (["hey", "jar@@", "vice"], None),
        (["hey", "jarvi"], 2), (["hey", "jarviss"], 2), (["hey", "garvis"], 2), (["hey", "jarbis", "on"], 2),
        (["hey", "gravis"], None), (["he", "jarvis"], None), (["jarvis"], None), (["hey"], None),
        (["uh", "hey", "jar@@", "vis"], 4), (["hey", "hey", "jarvis"], 3), (["hey", "jarvis", "灯"], 2),
        (["hey", "jarvis@@", "灯"], 2),
    ],
)  # fmt: skip
def test_english_words_are_joined_and_long_ones_may_have_one_letter_off(tokens: list[str], count: int | None) -> None:
    assert WakePhrase(["Hey, Jarvis!"]).after(tokens) == count


@pytest.mark.parametrize(
    ("tokens", "count"),
    [
        (["小", "度", "assist@@", "ant"], 4), (["晓", "肚", "assistent", "开"], 3), (["小", "度", "assis"], None),
        (["assistant", "小", "度"], None),
    ],
)  # fmt: skip
def test_chinese_and_english_mix(tokens: list[str], count: int | None) -> None:
    assert WakePhrase(["小度assistant"]).after(tokens) == count


# What stands before and behind


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("嗯小爱同学", 5), ("那个小爱同学打开灯", 6), ("嗯啊小爱同学打开灯", 6), ("那个那个小爱同学", 8),
        ("嗯嗯嗯小爱同学", None), ("那小爱同学", None), ("嗯", None), ("那个", None), ("啊大爱同学", None),
    ],
)  # fmt: skip
def test_two_fillers_are_passed_over(text: str, count: int | None) -> None:
    assert after("小爱同学", text) == count


def test_a_phrase_that_begins_with_a_filler_needs_it() -> None:
    assert after("嘿小智", "嘿小智开灯") == 3
    assert after("嘿小智", "小智开灯") is None


def test_punctuation_behind_the_phrase_goes_with_it() -> None:
    assert after("小爱同学", "小爱，同学。打开灯！") == 6
    assert after("小爱同学", "小爱同学！") == 5


def test_the_longer_phrase_is_taken() -> None:
    wake = WakePhrase(["小爱", "小爱同学"])
    assert wake.after(list("小爱同学打开")) == 4
    assert wake.after(list("小爱打开")) == 2


def test_tokens_of_several_characters_are_whole() -> None:
    assert WakePhrase(["小爱同学"]).after(["小爱", "同学打", "开"]) == 2


@pytest.mark.parametrize("phrases", [[], [""], ["！？"]])
def test_without_phrases_nothing_is_addressed(phrases: list[str]) -> None:
    assert WakePhrase(phrases).after(["好"]) is None
    assert not WakePhrase(phrases).may_follow(["好"])


@given(st.sampled_from(PHRASES), st.lists(HAN, max_size=12))
@PROPERTY
def test_a_phrase_and_anything_is_the_phrase(phrase: str, rest: list[str]) -> None:
    begins = phrase.split() if phrase.isascii() else list(phrase.replace(" assistant", ""))
    if "assistant" in phrase:
        begins.append("assistant")
    assert WakePhrase([phrase]).after([*begins, *rest]) == len(begins)


@given(TOKENS)
@PROPERTY
def test_nothing_raises_and_the_count_is_of_the_tokens(tokens: list[str]) -> None:
    count = WAKE.after(tokens)
    assert count is None or 0 < count <= len(tokens)


# A text that grows


@given(TOKENS)
@PROPERTY
def test_while_an_address_grows_it_may_always_follow(tokens: list[str]) -> None:
    for phrase in (["小", "爱", "同", "学"], ["hey", "jar@@", "vis"]):
        whole = [*phrase, *tokens]
        if WAKE.after(whole) is not None:
            assert all(WAKE.may_follow(whole[:count]) for count in range(len(whole) + 1))


@pytest.mark.parametrize("text", ["", "小", "小爱", "小爱同", "爱同", "小白", "嗯", "那", "那个小", "小的", "小小"])
def test_what_may_become_an_address(text: str) -> None:
    assert WakePhrase(["小爱同学"]).may_follow(list(text))


@pytest.mark.parametrize("text", ["大", "打开", "小打开", "小爱灯开", "嗯打", "那么"])
def test_what_cannot_become_an_address(text: str) -> None:
    assert not WakePhrase(["小爱同学"]).may_follow(list(text))


@pytest.mark.parametrize(
    ("tokens", "may"),
    [(["h@@"], True), (["hey", "jar@@"], True), (["hey", "ju"], False), (["ho@@"], False), (["u@@"], False)],
)
def test_half_a_word_may_become_the_whole(tokens: list[str], may: bool) -> None:
    assert WakePhrase(["hey jarvis"]).may_follow(tokens) is may


@pytest.mark.parametrize("filler", FILLERS)
def test_a_filler_alone_may_be_followed(filler: tuple[str, ...]) -> None:
    assert WakePhrase(["小爱同学"]).may_follow(filler)


# What it costs


def test_neither_importing_nor_matching_loads_the_dictionary_of_phrases() -> None:
    code = (
        "import json, sys; from edge_asr.speech.wake_phrase import WakePhrase; before = list(sys.modules);"
        " assert WakePhrase(['小爱同学']).after(list('晓艾童雪')) == 4; print(json.dumps([before, list(sys.modules)]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    before, then = json.loads(result.stdout)
    assert not [name for name in before if "pinyin" in name or name == "numpy"]
    assert not [name for name in then if "pinyin" in name]
