"""From a checkpoint to a published bundle, by FunASR's exporter and its quantisation recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import torch
import yaml
from dataset import read_shard
from funasr.models.paraformer.export_meta import export_rebuild_model
from funasr.models.paraformer.model import Paraformer
from model import configuration
from onnxruntime.quantization import QuantType, quantize_dynamic
from phrases import TOKENS
from train import collate, rows

AUTHOR = "edge_asr"
REFUSAL_SHARE = 0.7
"""Of the second stage in the weights; with all of it, people's voices are refused as well."""
MODEL_LIMIT = 16_000_000
"""Bytes of the fp32 graph at most."""


def export(commands: Path, refused: Path, bundle: Path) -> None:
    """Blend the checkpoints of both stages; write the graphs, `am.mvn`, the tokens and `config.yaml` to `bundle`."""
    bundle.mkdir(parents=True, exist_ok=True)
    state = torch.load(commands)
    average = _blended(state["average"], torch.load(refused)["average"])
    shift, scale = (-state["mean"]).repeat(7).tolist(), (1 / state["deviation"]).repeat(7).tolist()
    example = _example(commands.parent / "shards" / "0000.npz", state["mean"], state["deviation"])
    _export_graph(_network(average), example, bundle / "model.onnx")
    _add_metadata(bundle / "model.onnx", shift, scale)
    _quantize(bundle / "model.onnx", bundle / "model_quant.onnx")
    _write_cmvn(bundle / "am.mvn", shift, scale)
    (bundle / "tokens.json").write_text(json.dumps(TOKENS, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = "".join(f"{token} {index}\n" for index, token in enumerate(TOKENS))
    (bundle / "tokens.txt").write_text(lines, encoding="utf-8")
    _write_config(bundle / "config.yaml")
    if (size := (bundle / "model.onnx").stat().st_size) > MODEL_LIMIT:
        raise RuntimeError(f"model.onnx has {size} bytes, more than {MODEL_LIMIT}; make the network smaller")


def _blended(commands: dict[str, torch.Tensor], refused: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: torch.lerp(commands[key].float(), value.float(), REFUSAL_SHARE) for key, value in refused.items()}


def _network(average: dict[str, torch.Tensor]) -> Paraformer:
    """The trained network without its CTC branch."""
    prefix = "module.paraformer."
    weights = {key[len(prefix) :]: value for key, value in average.items() if key.startswith(prefix)}
    network = Paraformer(**configuration())
    network.load_state_dict({key: value for key, value in weights.items() if not key.startswith("ctc.")})
    return network.eval()


def _example(shard: Path, mean: torch.Tensor, deviation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sentences to trace the graph with: in the exporter's noise the network hears no token, and the trace ends."""
    frames, lengths, *_ = collate([(read_shard(shard), index) for index in (0, 1)], np.random.default_rng(0))
    features, row_lengths = rows((frames - mean) / deviation, lengths)
    return features, row_lengths.to(torch.int32)


def _export_graph(network: Paraformer, example: tuple[torch.Tensor, torch.Tensor], path: Path) -> None:
    parts = {part: configuration()[part] for part in ("encoder", "predictor", "decoder")}
    rebuilt = export_rebuild_model(network, type="onnx", device="cpu", max_seq_len=512, **parts)
    torch.onnx.export(
        rebuilt,
        example,
        str(path),
        opset_version=14,
        do_constant_folding=True,
        input_names=rebuilt.export_input_names(),
        output_names=rebuilt.export_output_names(),
        dynamic_axes=rebuilt.export_dynamic_axes(),
        dynamo=False,
    )


def _add_metadata(path: Path, shift: list[float], scale: list[float]) -> None:
    """What sherpa-onnx wants in the graph."""
    graph = onnx.load(str(path))
    metadata = {
        "vocab_size": len(TOKENS),
        "model_type": "paraformer",
        "version": "1",
        "model_author": AUTHOR,
        "comment": "paraformer-tiny",
        "lfr_window_size": 7,
        "lfr_window_shift": 6,
        "neg_mean": ",".join(map(repr, shift)),
        "inv_stddev": ",".join(map(repr, scale)),
    }
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=str(value))
    onnx.save(graph, str(path))


def _quantize(source: Path, target: Path) -> None:
    """FunASR's recipe: unsigned weights per channel, the output layer left alone."""
    skipped = [node.name for node in onnx.load(str(source)).graph.node if "output" in node.name]
    quantize_dynamic(
        str(source),
        str(target),
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QUInt8,
        nodes_to_exclude=skipped,
    )


def _write_cmvn(path: Path, shift: list[float], scale: list[float]) -> None:
    def row(values: list[float]) -> str:
        return "[ " + " ".join(map(repr, values)) + " ]"

    path.write_text(
        "<Nnet>\n<Splice> 560 560\n[ 0 ]\n"
        f"<AddShift> 560 560\n<LearnRateCoef> 0 {row(shift)}\n"
        f"<Rescale> 560 560\n<LearnRateCoef> 0 {row(scale)}\n</Nnet>\n",
        encoding="utf-8",
    )


def _write_config(path: Path) -> None:
    frontend = {"fs": 16000, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10, "lfr_m": 7}
    published = {
        "model": "Paraformer",
        "frontend": "WavFrontend",
        "frontend_conf": {**frontend, "lfr_n": 6},
        "model_conf": {"predictor_bias": 1},
        "tokenizer": "CharTokenizer",
        "tokenizer_conf": {"unk_symbol": "<unk>", "split_with_space": True},
        **configuration(),
    }
    path.write_text(yaml.safe_dump(published, sort_keys=False), encoding="utf-8")
