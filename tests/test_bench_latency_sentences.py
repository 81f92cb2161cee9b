"""bench.latency_sentences: the same sentences every time, with their texts and ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from bundled import BUNDLE, SHARED_DATA, sound_of, transcripts

from bench import latency_sentences as sentences
from edge_asr.audio.decode import read
from edge_asr.types import SAMPLE_RATE

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


def table(folder: Path) -> dict[str, str]:
    return dict(line.split("\t") for line in (folder / "transcripts.tsv").read_text(encoding="utf-8").splitlines())


@needs_espeak
def test_sentences_are_made_alike_every_time_and_differ_by_seed(tmp_path: Path) -> None:
    for name, seed in (("one", "5"), ("again", "5"), ("other", "6")):
        sentences.main(["--out", str(tmp_path / name), "--count", "3", "--seed", seed])
    contents = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("one", "again", "other")
    }
    assert contents["one"] == contents["again"]
    assert contents["one"].keys() == {"0000.wav", "0001.wav", "0002.wav", "transcripts.tsv", "manifest.json"}
    assert contents["one"]["transcripts.tsv"] != contents["other"]["transcripts.tsv"]


@needs_espeak
def test_the_end_of_speech_is_known_and_silence_follows(tmp_path: Path) -> None:
    sentences.main(["--out", str(tmp_path), "--count", "4"])
    described = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["sentences"]
    assert {each["file"]: each["text"] for each in described} == table(tmp_path)
    assert len({each["origin"] for each in described}) == 4
    for each in described:
        samples = read(tmp_path / each["file"])
        assert each["seconds"] == round(len(samples) / SAMPLE_RATE, 3)
        end = round(each["speech_ends_s"] * SAMPLE_RATE)
        assert 0.5 < each["speech_ends_s"] <= each["seconds"] - sentences.SILENCE_S + 0.02
        assert np.abs(samples[end:]).max() < 0.1 * np.abs(samples).max()


def test_recordings_are_copied_with_their_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences.main(["--out", str(tmp_path), "--count", "0", "--recordings", str(BUNDLE / "samples")])
    assert table(tmp_path) == {f"samples/{name}": text for name, text in transcripts().items()}
    np.testing.assert_array_equal(read(tmp_path / "samples/01.wav"), sound_of("01.wav"))
    assert f"{len(transcripts())} sentences, " in capsys.readouterr().out


def test_a_folder_without_texts_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        sentences.main(["--out", str(tmp_path), "--count", "0", "--recordings", str(tmp_path / "nowhere")])
    assert str(ended.value.code).startswith("bench.latency_sentences: ")
    assert "transcripts.tsv" in str(ended.value.code)


@needs_espeak
@pytest.mark.slow
def test_with_the_recordings_of_people_there_are_three_hundred(tmp_path: Path) -> None:
    folders = [SHARED_DATA / "speech" / name for name in ("aishell_sample_zh", "mandarin_singles")]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip("the recordings are not here")
    sentences.main(["--out", str(tmp_path), *(part for folder in folders for part in ("--recordings", str(folder)))])
    assert len(table(tmp_path)) >= 300
