"""`edge-asr token`: what it prints is let in, and nothing else is."""

from __future__ import annotations

import json

import pytest

from edge_asr.cli import main
from edge_asr.config_server import HttpConfig
from edge_asr.serve.access import Access


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["token", *arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_a_token_is_let_in_by_its_hash(capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(run(capsys, "--json"))
    access = Access(HttpConfig(tokens=(made["hash"],)))
    assert access.knows(made["token"])
    assert not access.knows(made["hash"])
    assert not access.knows("")


def test_each_token_is_another_one_and_says_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [run(capsys) for _ in range(2)]
    assert texts[0] != texts[1]
    assert all("http.tokens" in text and "Bearer" in text for text in texts)
