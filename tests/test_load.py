"""A tenth of the load that the bench puts on a daemon: nobody is forgotten, or told what others said."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.load import Setting, bundled_sentences, measure

SECONDS = 30.0


@pytest.mark.slow
async def test_clients_and_streams_get_their_own_texts_and_the_microphone_its_own(tmp_path: Path) -> None:
    found = await measure(Setting(5, 2, SECONDS, every_s=0.5), bundled_sentences(), tmp_path)
    assert found["wrong"] == []
    assert found["refused"] == {}
    assert found["request_ms"]["count"] > SECONDS
    assert found["stream_sentences"] > 5
    microphone = found["microphone"]
    assert microphone["sentences"] > 3
    assert (microphone["wrong"], microphone["lost"]) == (0, 0)


@pytest.mark.slow
async def test_who_asks_for_more_than_the_machine_can_do_is_told_to_come_back(tmp_path: Path) -> None:
    """Everybody asks again at once, and less may wait than they ask for; what is answered is right all the same."""
    options = ("http.limits.wait_s=0.05",)
    found = await measure(Setting(30, 0, 15.0, every_s=0.0, options=options), bundled_sentences(), tmp_path)
    assert found["wrong"] == []
    assert found["refused"]
    assert set(found["refused"]) <= {429, 503}
    assert found["request_ms"]["count"] > 0
    microphone = found["microphone"]
    assert (microphone["wrong"], microphone["lost"]) == (0, 0)
