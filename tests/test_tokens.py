"""Tokens to text."""

from __future__ import annotations

import pytest

from edge_asr.recognizer.tokens import join


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([], ""),
        (["打", "开", "客", "厅", "灯"], "打开客厅灯"),
        (["hello", "world"], "hello world"),
        (["hel@@", "lo"], "hello"),
        (["hel@@", "lo", "wor@@", "l@@", "d"], "hello world"),
        (["打", "开", "app"], "打开 app"),
        (["app", "打", "开"], "app 打开"),
        (["我", "爱", "py@@", "thon", "你", "呢"], "我爱 python 你呢"),
        (["a@@", "b", "c"], "ab c"),
        (["二", "0", "二", "六"], "二 0 二六"),
        (["<unk>"], "<unk>"),
    ],
    ids=[
        "nothing", "chinese", "english", "a word of two pieces", "words of pieces", "english after chinese",
        "chinese after english", "english within chinese", "a word after a word of pieces", "a digit", "unknown",
    ],
)  # fmt: skip
def test_chinese_joins_without_spaces_and_english_with_one(tokens: list[str], text: str) -> None:
    assert join(tokens) == text


def test_a_piece_that_nothing_follows_keeps_its_letters() -> None:
    assert join(["今", "天", "hel@@"]) == "今天 hel"


def test_a_piece_before_chinese_is_a_word_by_itself() -> None:
    assert join(["hel@@", "今", "天"]) == "hel 今天"


def test_an_empty_piece_adds_nothing() -> None:
    assert join(["", "打", "@@", "开"]) == "打开"
