"""What is stable of a text that grows: what two decodes in a row agree on, and never less than before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr.recognizer.hypotheses import Hypotheses


@pytest.mark.parametrize(
    ("decodes", "stable"),
    [
        ([["打"]], ""),
        ([["打"], ["打", "开"]], "打"),
        ([["打", "卡"], ["打", "开"], ["打", "开", "灯"]], "打开"),
        ([["打", "开"], ["打", "开"], ["大", "开", "灯"], ["大", "开", "灯"]], "打开"),
        ([["打", "开"], ["打", "开"], []], "打开"),
        ([["turn", "on", "the", "li@@"], ["turn", "on", "the", "li@@", "ght"]], "turn on the"),
        ([["li@@", "ght"], ["li@@", "ght", "s"]], "light"),
        ([[], []], ""),
    ],
)
def test_what_two_decodes_in_a_row_agree_on_is_stable(decodes: list[list[str]], stable: str) -> None:
    hypotheses = Hypotheses()
    found = [hypotheses.add(tokens) for tokens in decodes]
    assert found[-1][1] == stable


def test_the_text_is_always_the_last_decode() -> None:
    hypotheses = Hypotheses()
    assert [hypotheses.add(list(text))[0] for text in ("打", "打卡", "打开")] == ["打", "打卡", "打开"]


@given(st.lists(st.lists(st.sampled_from("甲乙丙"), max_size=6)))
def test_what_is_stable_only_grows(decodes: list[list[str]]) -> None:
    hypotheses, before = Hypotheses(), ""
    for tokens in decodes:
        _, stable = hypotheses.add(tokens)
        assert stable.startswith(before)
        before = stable
