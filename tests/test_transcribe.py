"""`edge-asr transcribe` seen from outside: text, JSON, formats, long files, and every kind of error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from bundled import BUNDLE, recording, sound_of, transcripts, write_wav
from test_decode import encode

from edge_asr import cli
from edge_asr.types import SAMPLE_RATE, TRANSCRIPT_SCHEMA, Samples

TEXTS = transcripts()
NAMES = list(TEXTS)
SECOND = np.zeros(SAMPLE_RATE, np.float32)
WIRE_KEYS = {
    *("schema", "id", "seq", "device", "source", "text", "text_itn", "text_raw", "language", "confidence", "start"),
    *("end", "offset_s", "time_synced", "duration_s", "tokens", "latency_ms", "within_budget", "decoded_at_pause"),
    *("enforced", "model", "engine", "replayed", "age_s"),
}


class Result(NamedTuple):
    """What a run of the command left."""

    exit_code: object
    out: list[str]
    err: list[str]

    @property
    def transcripts(self) -> list[dict[str, Any]]:
        """The lines of `--json`."""
        return [json.loads(line) for line in self.out]


Run = Callable[..., Result]


@pytest.fixture
def transcribe(capfd: pytest.CaptureFixture[str]) -> Run:
    """Return the command, run in this process: `transcribe(file, "--json", ...)`."""

    def run(*arguments: str | Path) -> Result:
        with pytest.raises(SystemExit) as caught:
            cli.main(["transcribe", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Result(caught.value.code, out.splitlines(), err.splitlines())

    return run


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "edge_asr", "transcribe", *map(str, arguments)]


def bundle_like(folder: Path, without: str = "") -> Path:
    """Return a new folder with links to the files of the bundled model, so that a test can replace some."""
    folder.mkdir()
    for path in BUNDLE.iterdir():
        if path.name not in (without, "samples"):
            (folder / path.name).symlink_to(path)
    return folder


def replaced(bundle: Path, name: str, content: bytes) -> Path:
    path = bundle / name
    path.unlink()
    path.write_bytes(content)
    return path


def resampled(samples: Samples, rate: int) -> Samples:
    import soxr

    result: Samples = soxr.resample(samples, SAMPLE_RATE, rate).clip(-1, 1)
    return result


def test_every_bundled_sample_gives_its_text_in_order(transcribe: Run) -> None:
    result = transcribe(*(recording(name) for name in NAMES))
    assert result == Result(0, list(TEXTS.values()), [])


def test_json_is_a_transcript_a_line_with_the_path_as_given(transcribe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BUNDLE)
    paths = [f"samples/{NAMES[0]}", f"./samples/{NAMES[1]}"]
    result = transcribe("--json", "-o", "device_id=hall", *paths)
    assert (result.exit_code, result.err) == (0, [])
    assert [found["source"] for found in result.transcripts] == [f"file:{path}" for path in paths]
    assert [found["text"] for found in result.transcripts] == [TEXTS[name] for name in NAMES[:2]]
    for found, name in zip(result.transcripts, NAMES, strict=False):
        assert set(found) == WIRE_KEYS
        assert found["schema"] == TRANSCRIPT_SCHEMA
        assert (found["device"], found["model"], found["engine"]) == ("hall", BUNDLE.name, "onnx-fp32")
        assert found["text"] == found["text_raw"] == "".join(token["text"] for token in found["tokens"])
        assert 0 < found["confidence"] <= 1
        assert found["duration_s"] == pytest.approx(len(sound_of(name)) / SAMPLE_RATE, abs=0.001)
        assert (found["offset_s"], found["replayed"], found["age_s"]) == (0, False, 0)
        unknown = ("seq", "start", "end", "time_synced", "within_budget", "language", "text_itn")
        assert {key: found[key] for key in unknown} == dict.fromkeys(unknown)
        assert set(found["latency_ms"]) == {"features", "encoder", "cif", "decoder"}
    assert len({found["id"] for found in result.transcripts}) == 2


@pytest.mark.parametrize(
    ("ending", "codec", "rate", "channels"),
    [
        ("wav", "pcm_u8", 16_000, 1),
        ("wav", "pcm_s16le", 96_000, 2),
        ("mp3", "libmp3lame", 44_100, 1),
        ("ogg", "libopus", 48_000, 2),
        ("m4a", "aac", 44_100, 2),
    ],
)
def test_the_same_text_whatever_the_format(
    transcribe: Run, tmp_path: Path, ending: str, codec: str, rate: int, channels: int
) -> None:
    samples = (resampled(sound_of(NAMES[0]), rate) * 32767).astype(np.int16)
    path = encode(tmp_path / f"speech.{ending}", np.tile(samples, (channels, 1)), rate, codec)
    assert transcribe(path) == Result(0, [TEXTS[NAMES[0]]], [])


@pytest.mark.parametrize("seconds", [0.05, 3, 31])
def test_silence_of_any_length_is_a_line_of_empty_text(transcribe: Run, tmp_path: Path, seconds: float) -> None:
    path = write_wav(tmp_path / "silence.wav", np.zeros(round(seconds * SAMPLE_RATE), np.float32))
    assert transcribe(path) == Result(0, [""], [])
    [found] = transcribe("--json", path).transcripts
    assert (found["text"], found["tokens"], found["confidence"], found["offset_s"]) == ("", [], None, 0)


def test_fifty_milliseconds_out_of_the_middle_of_speech_are_empty_text(transcribe: Run, tmp_path: Path) -> None:
    speech = sound_of(NAMES[0])
    middle = len(speech) // 2
    path = write_wav(tmp_path / "short.wav", speech[middle : middle + SAMPLE_RATE // 20])
    assert transcribe(path) == Result(0, [""], [])


def test_a_long_file_is_cut_into_segments_each_with_its_place(transcribe: Run, tmp_path: Path) -> None:
    sounds = [sound_of(name) for name in NAMES]
    starts, tape, position = [], [], 0
    for sound in sounds:
        starts.append(position / SAMPLE_RATE)
        tape += [sound, SECOND]
        position += len(sound) + len(SECOND)
    assert position > 30 * SAMPLE_RATE, "short files are decoded whole"
    result = transcribe("--json", write_wav(tmp_path / "tape.wav", np.concatenate(tape)))
    assert result.exit_code == 0
    assert [found["text"] for found in result.transcripts] == list(TEXTS.values())
    for found, start, sound in zip(result.transcripts, starts, sounds, strict=True):
        assert start - 0.3 <= found["offset_s"]
        assert found["offset_s"] + found["duration_s"] <= start + len(sound) / SAMPLE_RATE + 0.5
        assert found["duration_s"] > 0.5


def test_a_file_that_is_not_longer_than_the_cap_is_decoded_whole(transcribe: Run, tmp_path: Path) -> None:
    names = NAMES[:2]
    samples = np.concatenate([sound_of(names[0]), SECOND, sound_of(names[1])])
    path = write_wav(tmp_path / "two.wav", samples)
    [found] = transcribe("--json", path).transcripts
    assert found["offset_s"] == 0
    assert found["duration_s"] == pytest.approx(len(samples) / SAMPLE_RATE, abs=0.001)


def test_bad_files_are_a_line_each_and_the_others_are_done(transcribe: Run, tmp_path: Path) -> None:
    good = recording(NAMES[0])
    bad: dict[str, Path] = {name: tmp_path / name for name in ("empty.wav", "cut.wav", "text.wav", "missing.wav")}
    bad["empty.wav"].touch()
    bad["cut.wav"].write_bytes(good.read_bytes()[:44])
    bad["text.wav"].write_text("this is no audio, though its name says so\n" * 100)
    bad["folder"] = tmp_path
    result = transcribe(*bad.values(), good)
    assert result.out == [TEXTS[NAMES[0]]]
    assert result.exit_code == 2
    assert [line.split(": ")[1] for line in result.err] == [str(path) for path in bad.values()]
    assert all(line.startswith("edge-asr: ") and "; " in line for line in result.err), "each names a remedy"


def test_a_file_that_breaks_off_gives_what_is_there(transcribe: Run, tmp_path: Path) -> None:
    path = tmp_path / "cut.wav"
    path.write_bytes(recording(NAMES[0]).read_bytes()[:-1000])
    result = transcribe(path)
    assert (result.exit_code, result.out) == (0, [TEXTS[NAMES[0]]])


def test_no_file_is_wrong_usage(transcribe: Run) -> None:
    result = transcribe()
    assert (result.exit_code, result.out) == (2, [])
    assert "FILE" in result.err[-1]


def test_a_bundle_with_the_quantised_graph_only_gives_the_same_text(transcribe: Run, tmp_path: Path) -> None:
    bundle = bundle_like(tmp_path / "int8", without="model.onnx")
    result = transcribe("--json", "--model", bundle, "-o", "engine.target=onnx-int8", recording(NAMES[0]))
    [found] = result.transcripts
    assert (found["text"], found["engine"], found["model"]) == (TEXTS[NAMES[0]], "onnx-int8", "int8")


def _one_token_less(bundle: Path) -> Path:
    tokens = json.loads((bundle / "tokens.json").read_text(encoding="utf-8"))
    replaced(bundle, "tokens.json", json.dumps(tokens[:-1], ensure_ascii=False).encode())
    return bundle


def _short_cmvn(bundle: Path) -> Path:
    lines = (bundle / "am.mvn").read_text(encoding="utf-8").splitlines()
    shorter = [line.replace(f" {line.split()[-2]} ]", " ]") if line.endswith("]") else line for line in lines]
    return replaced(bundle, "am.mvn", "\n".join(shorter).encode())


def _truncated_graph(bundle: Path) -> Path:
    content = (bundle / "model.onnx").read_bytes()
    return replaced(bundle, "model.onnx", content[: len(content) // 2])


def _no_graph_at_all(bundle: Path) -> Path:
    return replaced(bundle, "model.onnx", b"version https://git-lfs.github.com/spec/v1\n")


def _no_tokens(bundle: Path) -> Path:
    for name in ("tokens.json", "tokens.txt"):
        (bundle / name).unlink(missing_ok=True)
    return bundle


def _empty(bundle: Path) -> Path:
    for path in bundle.iterdir():
        path.unlink()
    return bundle


@pytest.mark.parametrize(
    "damage", [_one_token_less, _short_cmvn, _truncated_graph, _no_graph_at_all, _no_tokens, _empty]
)
def test_a_damaged_bundle_is_one_line_that_names_the_file(
    transcribe: Run, tmp_path: Path, damage: Callable[[Path], Path]
) -> None:
    bundle = bundle_like(tmp_path / "bundle")
    culprit = damage(bundle)
    result = transcribe("--model", bundle, recording(NAMES[0]), "-o", "log.level=WARNING")
    assert (result.exit_code, result.out) == (3, [])
    [line] = result.err
    assert line.startswith(f"edge-asr: {culprit}")
    assert len(line) < 400


def test_a_missing_bundle_is_one_line_that_names_the_option(transcribe: Run, tmp_path: Path) -> None:
    result = transcribe("--model", tmp_path / "nowhere", recording(NAMES[0]))
    assert (result.exit_code, result.out) == (3, [])
    assert len(result.err) == 1
    assert "nowhere: no such folder" in result.err[0]
    assert "--model" in result.err[0]


def test_a_reader_that_goes_away_ends_it_without_a_word() -> None:
    files = [recording(name) for name in NAMES] * 20
    with subprocess.Popen(command(*files), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().decode().strip() == TEXTS[NAMES[0]]
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_output_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    strange = Path(os.fsdecode(os.fsencode(tmp_path / "speech-") + b"\xff.wav"))
    strange.symlink_to(recording(NAMES[0]))
    result = subprocess.run(
        command("--json", strange, strange.with_suffix(".mp3")),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert json.loads(result.stdout)["text"] == TEXTS[NAMES[0]]
    assert result.stderr.splitlines() == [
        f"edge-asr: {tmp_path}/speech-\\udcff.mp3: no such file; check the path",
    ]


def test_nothing_but_the_engine_is_left_behind_and_nobody_is_told(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    for folder in (home, temporary):
        folder.mkdir()

    def run() -> str:
        result = subprocess.run(
            command(recording(NAMES[0])),
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(home), "TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (result.returncode, result.stdout.strip()) == (0, TEXTS[NAMES[0]])
        return result.stderr

    def kept() -> set[Path]:
        return {path.relative_to(home) for path in home.rglob("*") if path.is_file()}

    [told] = run().splitlines()
    assert "building the engine of paraformer-tiny, once for this machine, in " in told
    engine, *others = {path.parent for path in kept()}
    assert (engine.parent, others) == (Path(".local/share/edge_asr/engines"), [])
    before = kept()
    assert {path.suffix for path in before} == {".json", ".onnx", ".data"}, "the manifest and the networks"
    assert run() == ""
    assert kept() == before, "onnxruntime's telemetry keeps a device id and a queue of reports"
    assert list(temporary.iterdir()) == []


def peak_of(path: Path) -> tuple[list[dict[str, Any]], float]:
    """Transcribe a file in a process of its own; return the transcripts and the peak of its memory in MB."""
    output = path.with_suffix(".json")
    with output.open("wb") as out:
        # From a small process between: a child's peak begins with what its parent held, which may be much here.
        code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"
        done = subprocess.run(
            [sys.executable, "-c", code, *command("--json", path)],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
    peak_mb = int(done.stderr.split()[-1]) / 1024
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()], peak_mb


def write_sparse_tape(path: Path, minutes: int) -> list[tuple[float, str]]:
    """Write 8 kHz, 8-bit audio, silent but for a sample every tenth of it; return the seconds and texts."""
    rate = 8_000
    told = []
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(1)
        out.setframerate(rate)
        for k in range(10):
            name = NAMES[k % len(NAMES)]
            sound = np.round(resampled(sound_of(name), rate) * 127 + 128).astype(np.uint8)
            told.append((k * minutes * 6.0, TEXTS[name]))
            out.writeframes(sound.tobytes())
            out.writeframes(b"\x80" * (minutes * 6 * rate - len(sound)))
    return told


@pytest.mark.slow
def test_three_hours_are_streamed_with_flat_memory_and_nothing_is_missed(tmp_path: Path) -> None:
    write_sparse_tape(tmp_path / "short.wav", minutes=2)
    _, short_mb = peak_of(tmp_path / "short.wav")
    told = write_sparse_tape(tmp_path / "long.wav", minutes=180)
    found, long_mb = peak_of(tmp_path / "long.wav")
    assert [transcript["text"] for transcript in found] == [text for _, text in told]
    for transcript, (start, _) in zip(found, told, strict=True):
        assert start - 0.5 <= transcript["offset_s"] <= start + 3
    assert long_mb < short_mb + 40
    assert long_mb < 400
