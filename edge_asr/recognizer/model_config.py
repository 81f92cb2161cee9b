"""What a bundle's configuration says of its model: the numbers beside the weights, and whether we can run it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from edge_asr.errors import BundleError

FILES = ("config.yaml", "asr.yaml")
"""FunASR's configuration, in the present and in the older layout."""

MODELS = ("Paraformer", "BiCifParaformer", "SeacoParaformer")
"""Models whose encoder, predictor and decoder are Paraformer's; the rest (hot words, finer times) is unused."""
EXPECTED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "frontend_conf": {
        "fs": (16000,),
        "window": ("hamming",),
        "n_mels": (80,),
        "frame_length": (25,),
        "frame_shift": (10,),
        "lfr_m": (7,),
        "lfr_n": (6,),
    },
    "encoder_conf": {
        "input_layer": ("pe",),
        "normalize_before": (True,),
        "sanm_shfit": (0,),  # FunASR's spelling
        "selfattention_layer_type": ("sanm",),
    },
    "decoder_conf": {"sanm_shfit": (0, None)},
    "predictor_conf": {"threshold": (1, 1.0), "l_order": (1,), "r_order": (1,)},
}
"""Settings that our features and networks are written for; what a file does not name is as expected."""
CLASSES = {
    "encoder": ("SANMEncoder",),
    "decoder": ("ParaformerSANMDecoder",),
    "predictor": ("CifPredictorV2", "CifPredictorV3"),
    "frontend": ("WavFrontend",),
}
OLD_NAMES = {
    "paraformer": "Paraformer",
    "bicif_paraformer": "BiCifParaformer",
    "sanm": "SANMEncoder",
    "paraformer_decoder_sanm": "ParaformerSANMDecoder",
    "cif_predictor_v2": "CifPredictorV2",
    "cif_predictor_v3": "CifPredictorV3",
    "wav_frontend": "WavFrontend",
}
"""How the older layout calls the same classes."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers of a Paraformer that are no weights, as most published models have them."""

    heads: int = 4
    input_scale: float | None = None
    """Features are multiplied by it. None: the square root of the encoder's width, as in FunASR's code."""
    tail: float = 0.45
    """What the predictor adds behind the last frame, so that a token that is nearly complete counts."""
    smooth_factor: float = 1.0
    noise_threshold: float = 0.0


def read_model_config(folder: Path) -> ModelConfig:
    """Read a bundle's configuration; without one (sherpa-onnx layout) the usual numbers. Raises BundleError."""
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        return ModelConfig()
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        sections = {key: value for key, value in loaded.items() if value is not None}
        _check(path, sections)
        return _numbers(sections)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]  # some have no message
        raise BundleError(f"{path}: not the configuration of a model ({reason}); copy the bundle again") from error


def _check(path: Path, sections: Mapping[str, Any]) -> None:
    """Raise BundleError for a model of another kind."""
    for key, known in {"model": MODELS, **CLASSES}.items():
        name = sections.get(key, known[0])
        if OLD_NAMES.get(name, name) not in known:
            raise _unfit(path, key, name, known)
    for section, settings in EXPECTED.items():
        for key, allowed in settings.items():
            value = sections.get(section, {}).get(key, allowed[0])
            if value not in allowed:
                raise _unfit(path, f"{section}.{key}", value, allowed[:1])


def _numbers(sections: Mapping[str, Any]) -> ModelConfig:
    usual = ModelConfig()
    predictor = sections.get("predictor_conf", {})
    heads = sections.get("encoder_conf", {}).get("attention_heads", usual.heads)
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"attention_heads is {heads}")
    return ModelConfig(
        heads=heads,
        tail=_share(predictor, "tail_threshold", usual.tail),
        smooth_factor=_share(predictor, "smooth_factor", usual.smooth_factor),
        noise_threshold=_share(predictor, "noise_threshold", usual.noise_threshold),
    )


def _share(settings: Mapping[str, Any], key: str, usual: float) -> float:
    """Return a number that is finite and not negative. Raises ValueError."""
    value = float(settings.get(key, usual))
    if not 0 <= value < math.inf:
        raise ValueError(f"{key} is {value}")
    return value


def _unfit(path: Path, key: str, value: Any, known: tuple[Any, ...]) -> BundleError:
    expected = " or ".join(map(str, known))
    return BundleError(
        f"{path}: {key} is {value}, edge_asr needs {expected}: this is another kind of model (a streaming one, for"
        " example); use a plain Paraformer"
    )
