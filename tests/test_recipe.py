"""The recipe's phrases and its measure of errors; nothing here trains."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import pytest
from bundled import BUNDLE, recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.false_sentences import FOREIGN

phrases: Any = recipe("phrases")
evaluate: Any = recipe("evaluate")
foreign: Any = recipe("foreign")

PROPERTY = settings(deadline=None, derandomize=True)
ACTIONS = ["打开", "关闭", "关掉", "启动", "停止", "急停"]
PLACES = ["客厅", "卧室", "厨房", "书房", "阳台", "浴室", "车间", "仓库"]
THINGS = ["灯", "空调", "电视", "窗帘", "风扇", "热水器", "门", "机器", "电机", "水泵", "传送带"]


@pytest.fixture(scope="module")
def drawn() -> list[Any]:
    """Many sentences of all kinds, trained and held out."""
    rng = random.Random(1)
    return [phrases.sentence(rng, held_out=held_out) for held_out in (False, True) for _ in range(6_000)]


# Numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "零"), (1, "一"), (2, "二"), (9, "九"), (10, "十"), (11, "十一"), (19, "十九"), (20, "二十"),
        (25, "二十五"),
        (99, "九十九"), (100, "一百"), (101, "一百零一"), (105, "一百零五"), (110, "一百一十"), (112, "一百一十二"),
        (200, "二百"), (350, "三百五十"), (909, "九百零九"), (999, "九百九十九"),
    ],
)  # fmt: skip
def test_a_number_is_read_as_it_is_spoken(value: int, text: str) -> None:
    assert "".join(phrases.number(value)) == text


def value_of(text: str) -> int:
    """Read a number back."""
    total = digit = 0
    for character in text:
        if character in phrases.DIGITS:
            digit = phrases.DIGITS.index(character)
        else:
            total += max(1, digit) * {"十": 10, "百": 100}[character]
            digit = 0
    return total + digit


def test_every_number_is_read_differently_and_can_be_read_back() -> None:
    readings = ["".join(phrases.number(value)) for value in range(1000)]
    assert [value_of(text) for text in readings] == list(range(1000))
    assert len(set(readings)) == 1000


# Vocabulary and readings


def test_every_character_of_every_phrase_is_a_token(drawn: list[Any]) -> None:
    assert set("".join(spoken.text for spoken in drawn)) <= set(phrases.TOKENS)
    assert set("".join(phrases.READINGS)) == set(phrases.TOKENS[3:-1])


def test_the_vocabulary_is_funasrs_special_tokens_and_single_characters() -> None:
    assert phrases.TOKENS[:3] == ("<blank>", "<s>", "</s>")
    assert phrases.TOKENS[-1] == "<unk>"
    assert len(set(phrases.TOKENS)) == len(phrases.TOKENS)
    assert all(len(token) == 1 for token in phrases.TOKENS[3:-1])


def test_the_bundled_model_has_the_recipes_vocabulary() -> None:
    assert tuple(json.loads((BUNDLE / "tokens.json").read_text(encoding="utf-8"))) == phrases.TOKENS


@pytest.mark.parametrize("word", phrases.READINGS)
def test_a_reading_has_a_toned_syllable_for_each_character(word: str) -> None:
    for reading in phrases.READINGS[word]:
        syllables = reading.split()
        assert len(syllables) == len(word)
        assert all(re.fullmatch(r"[a-z]+[1-5]", syllable) for syllable in syllables)


@pytest.mark.parametrize(
    ("word", "reading"), [("调到", "tiao2 dao4"), ("音乐", "yin1 yue4"), ("播放", "bo1 fang4"), ("幺", "yao1")]
)
def test_words_that_a_dictionary_misreads_have_their_own_reading(word: str, reading: str) -> None:
    assert phrases.READINGS[word] == (reading,)


def test_a_sentence_is_read_word_by_word() -> None:
    spoken = phrases.Sentence(("打开", "客厅", "灯"), "switch")
    assert spoken.text == "打开客厅灯"
    assert spoken.reading(random.Random(0)) == ["da3 kai1", "ke4 ting1", "deng1"]


# What the kinds cover


def test_actions_places_and_things_are_those_asked_for() -> None:
    assert list(phrases.ACTIONS) == ACTIONS
    assert list(phrases.PLACES) == PLACES
    assert list(phrases.THINGS) == THINGS


def texts_of(kind: str, count: int = 12_000) -> set[str]:
    rng = random.Random(2)
    draw = phrases.KINDS[kind][1]
    return {"".join(draw(rng)) for _ in range(count)}


def test_every_thing_can_be_switched_in_every_place() -> None:
    asked = {"".join(words) for words in itertools.product(ACTIONS, PLACES, THINGS)}
    assert asked <= texts_of("switch")
    assert {"".join(words) for words in itertools.product(ACTIONS, THINGS)} <= texts_of("switch")


def test_the_air_conditioning_is_set_from_16_to_35_degrees() -> None:
    texts = texts_of("air conditioning")
    degrees = {"".join(phrases.number(value)) for value in range(16, 36)}
    for how in ("调到", "设置为", "设定"):
        assert {f"把空调{how}{value}度" for value in degrees} <= texts
        assert all(any(re.fullmatch(f"把{place}空调{how}.+度", text) for text in texts) for place in PLACES)
    assert {re.sub(r".*(?:调到|设置为|设定)(.+)度", r"\1", text) for text in texts} == degrees


def test_levels_go_from_1_to_99_per_cent() -> None:
    texts = texts_of("level")
    for what in ("音量", "亮度", "温度"):
        assert {f"{what}调高", f"{what}调低"} <= texts
        assert {f"{what}调到百分之" + "".join(phrases.number(value)) for value in range(1, 100)} <= texts


def test_alarms_go_from_1_to_59_minutes_and_hours() -> None:
    texts = texts_of("timer")
    for unit, value in itertools.product(("分钟", "小时"), range(1, 60)):
        assert f"设置{''.join(phrases.number(value))}{unit}闹钟" in texts
    assert {"设置两分钟闹钟", "设置两小时"} <= texts


def test_machines_and_lines_are_numbered_from_1_to_12() -> None:
    texts = texts_of("numbered")
    for value, what in itertools.product(range(1, 13), ("机器", "产线")):
        assert "".join(phrases.number(value)) + "号" + what in texts
    assert {action + "三号产线" for action in ACTIONS} <= texts


def test_numbers_go_from_0_to_999() -> None:
    assert texts_of("number", 20_000) == {"".join(phrases.number(value)) for value in range(1000)}


def test_digits_come_in_strings_of_1_to_11_with_both_ones() -> None:
    texts = texts_of("digits")
    assert {len(text) for text in texts} == set(range(1, 12))
    assert set("".join(texts)) == set("零一二三四五六七八九幺")
    assert any("幺" in text and "一" in text for text in texts)


def test_fixed_phrases_are_those_asked_for() -> None:
    assert texts_of("fixed") == {
        "调高温度", "调低温度", "现在几点", "今天天气怎么样", "播放音乐", "停止播放", "下一首", "上一首", "暂停",
        "继续", "报告状态", "确认", "取消", "急停",
    }  # fmt: skip


def test_a_quarter_is_random_words_and_every_word_is_among_them() -> None:
    assert phrases.KINDS["random"][0] == 0.25
    assert sum(share for share, _ in phrases.KINDS.values()) == pytest.approx(1)
    rng = random.Random(3)
    drawn = [phrases.KINDS["random"][1](rng) for _ in range(3_000)]
    assert {word for words in drawn for word in words} == set(phrases.READINGS)
    assert {len(words) for words in drawn} == set(range(1, 8))


# Training and evaluation


def test_training_and_evaluation_have_no_text_in_common(drawn: list[Any]) -> None:
    held_out = {spoken.text for spoken in drawn if spoken.held_out}
    trained = {spoken.text for spoken in drawn if not spoken.held_out}
    assert not held_out & trained
    assert min(len(held_out), len(trained)) > 1_000


@pytest.mark.parametrize(
    ("words", "held_out"),
    [
        (("打开", "客厅", "灯"), False),
        (("设置", "二", "十", "五", "分钟"), True),
        (("启动", "八", "号", "机器"), False),
        (("零",), False),
    ],
)
def test_which_texts_are_held_out_never_changes(words: tuple[str, ...], held_out: bool) -> None:
    assert phrases.Sentence(words, "any").held_out is held_out


@pytest.mark.parametrize("words", phrases.FIXED, ids="".join)
def test_fixed_phrases_are_always_trained_on(words: tuple[str, ...]) -> None:
    assert not phrases.Sentence(words, "fixed").held_out


def test_a_tenth_of_the_texts_is_held_out() -> None:
    rng = random.Random(4)
    texts = {phrases.KINDS["random"][1](rng) for _ in range(5_000)}
    share = sum(phrases.Sentence(words, "random").held_out for words in texts) / len(texts)
    assert 0.08 < share < 0.12


def test_the_same_seed_draws_the_same_sentences() -> None:
    first, second = ([phrases.sentence(rng) for _ in range(50)] for rng in (random.Random(5), random.Random(5)))
    assert first == second


# The measure of errors


@pytest.mark.parametrize(
    ("reference", "hypothesis", "edits"),
    [("", "", 0), ("打开", "打开", 0), ("打开灯", "打开门", 1), ("打开灯", "开灯", 1), ("开灯", "打开灯", 1),
     ("打开灯", "", 3), ("", "打开", 2), ("一二三四", "二三四五", 2), ("kitten", "sitting", 3)],
)  # fmt: skip
def test_distance_counts_the_edits(reference: str, hypothesis: str, edits: int) -> None:
    assert evaluate.distance(reference, hypothesis) == edits


TEXTS = st.text("一二三", max_size=8)


@PROPERTY
@given(TEXTS, TEXTS, TEXTS)
def test_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert (evaluate.distance(a, b) == 0) == (a == b)
    assert evaluate.distance(a, b) == evaluate.distance(b, a)
    assert evaluate.distance(a, c) <= evaluate.distance(a, b) + evaluate.distance(b, c)


def test_the_error_rate_is_edits_over_reference_characters_in_per_cent() -> None:
    assert evaluate.character_error_rate([("打开客厅灯", "打开客厅门"), ("急停", "急停"), ("一二三", "")]) == 40.0
    assert evaluate.character_error_rate([]) == 0.0


def test_the_model_is_tested_in_languages_that_it_was_not_taught_to_refuse() -> None:
    taught = {language for script in foreign.SCRIPTS for language in script.languages}
    assert not taught & {language.partition("-")[0] for language in FOREIGN}
    assert "cmn" not in taught


@pytest.mark.parametrize("script", foreign.SCRIPTS, ids=lambda script: script.languages[0])
def test_made_up_speech_is_one_word_to_eight_of_a_languages_own_letters(script: Any) -> None:
    rng = random.Random(1)
    drawn = [foreign._words(rng, script) for _ in range(500)]
    assert {len(words) for words in drawn} == {1, 2, 3, 4, 5, 6, 8}
    letters = set("".join((*script.onsets, *script.vowels, *script.codas))) | set("0123456789,?")
    assert set("".join(itertools.chain.from_iterable(drawn))) <= letters
