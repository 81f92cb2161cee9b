"""A bundle on disk: a model as FunASR or sherpa-onnx publishes it, read and checked, never changed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from edge_asr.config import GatesConfig
from edge_asr.errors import BundleError
from edge_asr.recognizer.features import WIDTH, Features
from edge_asr.recognizer.model_config import ModelConfig, read_model_config

FP32, INT8, CHECKPOINT = "onnx-fp32", "onnx-int8", "checkpoint"
GRAPHS = ("model.onnx", "model_quant.onnx", "model.int8.onnx")
"""File names of published graphs; whether one is in fp32 or int8 it says itself."""
CHECKPOINTS = ("model.pt", "model.pb")
"""File names of torch checkpoints, today's and the older one."""
UNFIT = {
    "model_eb.onnx": "an export with hot words; use the model's own model.pt, or an export without them",
    "encoder.onnx": "a streaming Paraformer; use one that is not",
    "encoder.int8.onnx": "a streaming Paraformer; use one that is not",
}
"""Files of bundles that look like ours and are not."""
QUANTIZED_MARKS = (b"MatMulInteger", b"DynamicQuantizeLinear", b"DynamicQuantizeMatMul")
"""Operators of an int8 graph; they stand before the weights."""
HEADER_BYTES = 1 << 24
TOKEN_FILES = ("tokens.json", "tokens.txt")
CARD = "card.yaml"
"""What we know of a model beyond what it was published with: thresholds of the gates."""


@dataclass(frozen=True, slots=True)
class Cmvn:
    """Normalisation of features: `(x + neg_mean) * inv_stddev`, `[560]` each."""

    neg_mean: Features
    inv_stddev: Features


@dataclass(frozen=True, slots=True)
class Bundle:
    """What is in the folder of a model."""

    name: str
    folder: Path
    files: Mapping[str, Path]
    """What the weights are read from, by kind: `onnx-fp32`, `onnx-int8`, `checkpoint`; at least one."""
    config: ModelConfig
    tokens: tuple[str, ...]
    cmvn: Cmvn | None
    """None: the graph's metadata has it (sherpa-onnx layout)."""
    gates: Mapping[str, float]
    """Thresholds from the card, by key of the configuration's `gates`."""

    @property
    def graph(self) -> Path:
        """The file to name, and to run where no engine can be built: fp32 before int8, as it was published."""
        return next(self.files[kind] for kind in (FP32, INT8, CHECKPOINT) if kind in self.files)

    @property
    def kind(self) -> str:
        """What `graph` is: `onnx-fp32`, `onnx-int8` or `checkpoint`."""
        return next(kind for kind in (FP32, INT8, CHECKPOINT) if kind in self.files)


def read_bundle(folder: Path) -> Bundle:
    """Read what lies in `folder`; raises BundleError where something is missing or damaged."""
    try:
        readable = folder.is_dir() and any(folder.iterdir())
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}: cannot be read ({error}); correct the name or its permissions") from error
    if not readable:
        raise BundleError(
            f"{folder}: no such folder, or empty; set `model` (or --model) to the folder of a Paraformer bundle"
        )
    files = _find_files(folder)
    config = read_model_config(folder)
    tokens = _read_tokens(folder)
    mvn = folder / "am.mvn"
    return Bundle(
        name=folder.resolve().name,
        folder=folder,
        files=files,
        config=config,
        tokens=tokens,
        cmvn=_read_mvn(mvn) if mvn.exists() else None,
        gates=_read_card(folder / CARD),
    )


def cmvn_from_metadata(metadata: Mapping[str, str], graph: Path) -> Cmvn:
    """Return the CMVN that sherpa-onnx keeps in the graph; raises BundleError where it is not there."""
    try:
        rows = [np.array(metadata[key].split(","), np.float32) for key in ("neg_mean", "inv_stddev")]
    except KeyError as error:
        raise BundleError(f"{graph.parent}: no am.mvn, and the graph carries no CMVN; copy the bundle again") from error
    except ValueError as error:
        raise BundleError(f"{graph}: the CMVN in its metadata is damaged; copy the bundle again") from error
    return _checked_cmvn(rows, graph)


def _find_files(folder: Path) -> Mapping[str, Path]:
    """Return the files with weights by kind."""
    for name, why in UNFIT.items():
        if (folder / name).is_file():
            raise BundleError(f"{folder}: with its {name} it is {why}")
    files: dict[str, Path] = {}
    for path in (folder / name for name in GRAPHS):
        if path.is_file():
            files.setdefault(_kind_of_graph(path), path)
    for path in (folder / name for name in CHECKPOINTS):
        if path.is_file():
            files.setdefault(CHECKPOINT, path)
    if not files:
        expected = ", ".join((*GRAPHS, CHECKPOINTS[0]))
        raise BundleError(f"{folder}: no model found, expected one of {expected}; copy the bundle again")
    return files


def _kind_of_graph(path: Path) -> str:
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error}); correct its permissions") from error
    return INT8 if any(mark in header for mark in QUANTIZED_MARKS) else FP32


def _read_tokens(folder: Path) -> tuple[str, ...]:
    path = next((folder / name for name in TOKEN_FILES if (folder / name).is_file()), None)
    if path is None:
        raise BundleError(f"{folder}: no token list, expected one of {', '.join(TOKEN_FILES)}; copy the bundle again")
    try:
        text = path.read_text(encoding="utf-8")
        tokens = _token_array(json.loads(text)) if path.suffix == ".json" else _token_lines(text)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not a token list ({error}); copy the bundle again") from error
    if len(tokens) < 4:
        raise BundleError(f"{path}: holds {len(tokens)} tokens, which is no vocabulary; copy the bundle again")
    return tokens


def _token_array(loaded: Any) -> tuple[str, ...]:
    if not isinstance(loaded, list) or not all(isinstance(token, str) for token in loaded):
        raise ValueError("expected a JSON list of strings")
    return tuple(loaded)


def _token_lines(text: str) -> tuple[str, ...]:
    """Return the tokens of `token id` lines (sherpa-onnx), or of one token a line (FunASR's older layout)."""
    lines = [line for line in text.split("\n") if line.strip()]
    pairs = [line.rsplit(maxsplit=1) for line in lines]
    if all(len(pair) == 1 for pair in pairs):
        return tuple(line.strip() for line in lines)
    if [pair[1:] for pair in pairs] != [[str(number)] for number in range(len(pairs))]:
        raise ValueError("ids do not count from 0 upwards")
    return tuple(pair[0] for pair in pairs)


def _read_mvn(path: Path) -> Cmvn:
    """Read kaldi's text form: the rows that follow `<AddShift>` and `<Rescale>`."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = []
        for component in ("<AddShift>", "<Rescale>"):
            # No other component may stand between the name and its numbers.
            numbers = re.search(component + r"[^\[<]*(?:<LearnRateCoef>[^\[<]*)?\[([^\]]*)\]", text)
            if numbers is None:
                raise ValueError(f"{component} is missing")
            rows.append(np.array(numbers.group(1).split(), np.float32))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: not a CMVN file ({error}); copy the bundle again") from error
    return _checked_cmvn(rows, path)


def _checked_cmvn(rows: list[Features], path: Path) -> Cmvn:
    for row in rows:
        if row.shape != (WIDTH,):
            raise BundleError(f"{path}: CMVN of {row.size} values, expected {WIDTH}; it belongs to another model")
        if not np.isfinite(row).all():
            raise BundleError(f"{path}: CMVN holds values that are not finite; copy the bundle again")
    return Cmvn(*rows)


def _read_card(path: Path) -> Mapping[str, float]:
    if not path.exists():
        return {}
    try:
        card = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        gates = GatesConfig.model_validate(card.get("gates") or {})
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
        known = ", ".join(GatesConfig.model_fields)
        raise BundleError(
            f"{path}: not a card; expected `gates:` with numbers for {known}; correct it, or remove the file"
        ) from error
    return gates.model_dump(exclude_none=True)
