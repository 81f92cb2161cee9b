"""What published configurations say of their models, and which of them are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from bundled import BUNDLE, SHARED_DATA

from edge_asr.errors import BundleError
from edge_asr.recognizer.model_config import ModelConfig, read_model_config

CONTRACT = SHARED_DATA / "contract"
USUAL = ModelConfig(heads=4, input_scale=None, tail=0.45, smooth_factor=1.0, noise_threshold=0.0)
PUBLISHED: dict[str, ModelConfig | str] = {
    "paraformer-aishell1": USUAL,
    "paraformer-large": USUAL,
    "paraformer-large-online": "model is paraformer_online",
    "paraformer-large-onnx-v0": USUAL,
    "paraformer-small-sherpa": USUAL,
    "paraformer-streaming-bilingual-sherpa": USUAL,
    "seaco-paraformer-large": USUAL,
}
"""What is read, or why it is refused; those of sherpa-onnx have no configuration."""
WHOLE = (BUNDLE / "config.yaml").read_text(encoding="utf-8")


def read(folder: Path, text: str | bytes, name: str = "config.yaml") -> ModelConfig:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_model_config(folder)


def refused(folder: Path, text: str | bytes, *named: str) -> str:
    """Read a configuration that must be refused in one line that names the file and all of `named`."""
    with pytest.raises(BundleError) as caught:
        read(folder, text)
    line = str(caught.value)
    assert line.startswith(f"{folder / 'config.yaml'}: ")
    assert "\n" not in line
    assert len(line) < 500
    assert all(part in line for part in named), line
    return line


def changed(old: str, new: str) -> str:
    """Return the bundled model's configuration with one line changed, everywhere."""
    assert f"{old}\n" in WHOLE
    return WHOLE.replace(f"{old}\n", f"{new}\n")


def test_every_published_folder_is_known_here() -> None:
    if not CONTRACT.is_dir():
        pytest.skip(f"side files of published models are absent: {CONTRACT}")
    assert {path.name for path in CONTRACT.iterdir() if path.is_dir()} == set(PUBLISHED)


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_published_configuration_is_read_or_refused_in_a_line(model: str) -> None:
    folder, expected = CONTRACT / model, PUBLISHED[model]
    if not folder.is_dir():
        pytest.skip(f"side files of published models are absent: {folder}")
    if isinstance(expected, ModelConfig):
        assert read_model_config(folder) == expected
        return
    with pytest.raises(BundleError, match=expected) as caught:
        read_model_config(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("use a plain Paraformer")


def test_the_bundled_configuration_is_read() -> None:
    assert read_model_config(BUNDLE) == USUAL


def test_without_a_configuration_the_usual_numbers_hold(tmp_path: Path) -> None:
    assert read_model_config(tmp_path) == USUAL


def test_numbers_come_from_the_configuration(tmp_path: Path) -> None:
    predictor = "{tail_threshold: 0.3, smooth_factor: 0.9, noise_threshold: 0.1}"
    text = f"encoder_conf: {{attention_heads: 8}}\npredictor_conf: {predictor}\n"
    assert read(tmp_path, text) == ModelConfig(heads=8, tail=0.3, smooth_factor=0.9, noise_threshold=0.1)


def test_the_older_layout_has_other_names_for_the_same(tmp_path: Path) -> None:
    text = (
        "frontend: wav_frontend\nmodel: bicif_paraformer\nencoder: sanm\nencoder_conf: {attention_heads: 2}\n"
        "decoder: paraformer_decoder_sanm\npredictor: cif_predictor_v3\npredictor_conf: {threshold: 1}\n"
        "preencoder: null\n"
    )
    assert read(tmp_path, text, "asr.yaml").heads == 2


def test_the_present_layout_goes_before_the_older_one(tmp_path: Path) -> None:
    (tmp_path / "asr.yaml").write_text("encoder_conf: {attention_heads: 2}")
    assert read(tmp_path, "encoder_conf: {attention_heads: 8}").heads == 8


def test_a_section_without_content_is_as_usual(tmp_path: Path) -> None:
    assert read(tmp_path, "encoder_conf:\npredictor_conf:\n") == USUAL


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("model: Paraformer", "model: SenseVoiceSmall", "model is SenseVoiceSmall"),
        ("model: Paraformer", "model: ParaformerStreaming", "model is ParaformerStreaming"),
        ("encoder: SANMEncoder", "encoder: ConformerEncoder", "encoder is ConformerEncoder"),
        ("encoder: SANMEncoder", "encoder: SANMEncoderChunkOpt", "encoder is SANMEncoderChunkOpt"),
        ("decoder: ParaformerSANMDecoder", "decoder: TransformerDecoder", "decoder is TransformerDecoder"),
        ("predictor: CifPredictorV2", "predictor: CifPredictor", "predictor is CifPredictor,"),
        ("frontend: WavFrontend", "frontend: WavFrontendOnline", "frontend is WavFrontendOnline"),
        ("  fs: 16000", "  fs: 8000", "frontend_conf.fs is 8000, edge_asr needs 16000"),
        ("  window: hamming", "  window: povey", "frontend_conf.window is povey"),
        ("  n_mels: 80", "  n_mels: 40", "frontend_conf.n_mels is 40"),
        ("  frame_length: 25", "  frame_length: 32", "frontend_conf.frame_length is 32"),
        ("  frame_shift: 10", "  frame_shift: 12.5", "frontend_conf.frame_shift is 12.5"),
        ("  lfr_m: 7", "  lfr_m: 5", "frontend_conf.lfr_m is 5"),
        ("  lfr_n: 6", "  lfr_n: 1", "frontend_conf.lfr_n is 1"),
        ("  input_layer: pe", "  input_layer: conv2d", "encoder_conf.input_layer is conv2d"),
        ("  normalize_before: true", "  normalize_before: false", "encoder_conf.normalize_before is False"),
        ("  sanm_shfit: 0", "  sanm_shfit: 5", "encoder_conf.sanm_shfit is 5"),
        ("  selfattention_layer_type: sanm", "  selfattention_layer_type: self", "selfattention_layer_type is self,"),
        ("  threshold: 1.0", "  threshold: 0.9", "predictor_conf.threshold is 0.9, edge_asr needs 1"),
        ("  l_order: 1", "  l_order: 3", "predictor_conf.l_order is 3"),
        ("  r_order: 1", "  r_order: 0", "predictor_conf.r_order is 0"),
    ],
)  # fmt: skip
def test_a_model_of_another_kind_is_refused(tmp_path: Path, old: str, new: str, named: str) -> None:
    refused(tmp_path, changed(old, new), named, "another kind of model", "use a plain Paraformer")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "Paraformer", "encoder_conf: 4", "encoder_conf: [", "model: [Paraformer]", "\x00", b"model: \xff\xfe",
        "[" * 100_000, "encoder_conf: {attention_heads: four}", "encoder_conf: {attention_heads: [4]}",
        "encoder_conf: {attention_heads: 0}", "encoder_conf: {attention_heads: -4}",
        "encoder_conf: {attention_heads: 2.5}",
        "predictor_conf: {tail_threshold: much}", "predictor_conf: {tail_threshold: .nan}",
        "predictor_conf: {tail_threshold: -1}", "predictor_conf: {smooth_factor: .inf}",
        "predictor_conf: {noise_threshold: .nan}", "predictor_conf: 0.45",
    ],
    ids=[
        "empty", "list", "word", "number for a section", "no yaml", "list for a name", "no text", "no utf-8", "nested",
        "word for a number", "list for a number", "no heads", "negative heads", "half a head", "tail in words",
        "tail nan",
        "tail negative", "infinite factor", "threshold nan", "number for the predictor",
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_refused(tmp_path: Path, text: str | bytes) -> None:
    refused(tmp_path, text, "not the configuration of a model", "copy the bundle again")


def test_a_configuration_that_is_a_folder_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    assert read_model_config(tmp_path) == USUAL


@pytest.mark.parametrize("error", [OSError(), ValueError(""), ValueError("\nmore")], ids=["os", "empty", "empty line"])
def test_an_error_without_a_message_is_called_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(text: str) -> None:
        raise error

    monkeypatch.setattr(yaml, "safe_load", fail)
    refused(tmp_path, WHOLE, f"({str(error).strip() or type(error).__name__})", "copy the bundle again")
