"""What is stable of a text that grows: what two decodes in a row agree on, and never less than before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr.recognizer.hypotheses import Hypotheses


@pytest.mark.parametrize(
    ("decodes", "stable"),
    [
        (["打开灯"], ""),
        (["打开灯", "打开灯"], "打"),
        (["打开", "打开客厅"], ""),
        (["打卡客厅", "打开客厅的", "打开客厅的灯吧"], "打开客"),
        (["打开客厅", "打开客厅", "大开客厅灯", "大开客厅灯"], "打开"),
        (["打开客厅", "打开客厅", ""], "打开"),
        (["turn on the li@@ ght s", "turn on the li@@ ght s on"], "turn on the"),
        (["li@@ ght s on", "li@@ ght s on now"], "light"),
        (["", ""], ""),
    ],
)
def test_what_two_decodes_in_a_row_agree_on_is_stable_but_for_its_end(decodes: list[str], stable: str) -> None:
    hypotheses = Hypotheses()
    found = [hypotheses.add(text.split() if text.isascii() else list(text)) for text in decodes]
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
