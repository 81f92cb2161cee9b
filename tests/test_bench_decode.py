"""`edge-asr bench decode`: what it prints, on the bundled model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from bundled import BUNDLE, engine_of

from edge_asr.cli import main
from edge_asr.cli_bench import noise
from edge_asr.recognizer.bundle import FP32, INT8

FIELDS = ["engine", "threads", "seconds", "batch", "tokens", "median_ms", "rtf", "peak_memory_mb", "stages"]
"""As the wire contract has them."""


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "decode", "--model", str(BUNDLE), *arguments])
    return int(str(ended.value.code))


def cases(capsys: pytest.CaptureFixture[str], engine: str, *arguments: str) -> list[dict[str, Any]]:
    assert bench("--engine", str(engine_of(engine)), "--threads", "1", "--json", *arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("engine", [FP32, INT8])
def test_a_case_a_line_has_the_fields_of_the_contract(capsys: pytest.CaptureFixture[str], engine: str) -> None:
    found = cases(capsys, engine, "--seconds", "0.5,2")
    assert [case["seconds"] for case in found] == [0.5, 2]
    for case in found:
        assert list(case) == FIELDS
        assert (case["engine"], case["threads"], case["batch"]) == (engine, 1, 1)
        assert list(case["stages"])[:3] == ["features", "encoder", "cif"]
        assert case["tokens"] >= 0
        assert 0 < sum(case["stages"].values()) <= case["median_ms"] * 2
        assert case["rtf"] == pytest.approx(case["median_ms"] / 1e3 / case["seconds"], abs=2e-5)
        assert 10 < case["peak_memory_mb"] < 4_000


@pytest.mark.parametrize("engine", [FP32, INT8])
def test_a_batch_is_decoded_together_or_one_by_one(capsys: pytest.CaptureFixture[str], engine: str) -> None:
    [case] = cases(capsys, engine, "--seconds", "2", "--batch", "4")
    assert (case["engine"], case["batch"]) == (engine, 4)
    assert case["rtf"] == pytest.approx(case["median_ms"] / 1e3 / 8, abs=2e-5)


def test_without_json_a_line_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--engine", str(engine_of(FP32)), "--threads", "1", "--seconds", "1") == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("onnx-fp32  1 s x 1: ")
    assert "real-time factor 0." in line
    assert "encoder" in line


def test_the_sound_is_that_of_the_contract() -> None:
    expected = np.random.default_rng(0).standard_normal(32_000) * 0.1
    np.testing.assert_array_equal(noise(2.0), expected.astype(np.float32))


@pytest.mark.parametrize("seconds", ["", "two", "2,,5", "0", "-1", "601", "nan", "inf"])
def test_lengths_that_are_none_are_refused(capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    assert bench("--seconds", seconds) == 2
    out, complaint = capsys.readouterr()
    assert out == ""
    assert complaint.startswith("edge-asr: --seconds")
    assert len(complaint.splitlines()) == 1


def test_an_engine_that_is_missing_is_said_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert bench("--engine", str(tmp_path), "--json") == 3
    out, complaint = capsys.readouterr()
    assert out == ""
    assert len(complaint.splitlines()) == 1
    assert "build-engine" in complaint
