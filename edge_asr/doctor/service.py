"""Checks of what the appliance is given: configuration, Python, disk, model, engine and broker."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

from edge_asr.config_mqtt import MqttConfig
from edge_asr.doctor.patient import CannotTellError, Patient
from edge_asr.doctor.report import Finding, fail, ok, warn
from edge_asr.errors import BundleError, ConfigError, EngineError
from edge_asr.loader import engine_folder
from edge_asr.recognizer.bundle import Bundle
from edge_asr.recognizer.manifest import AUTO, FILE, ONNX, SCHEMA, TENSORRT, check_files, read_manifest, unfit

BROKER_S = 12.0
"""For name, connection, handshakes and the broker's answer together, also where a second version of MQTT is tried."""


def configuration(patient: Patient) -> Finding:
    """Return whether the configuration can be used."""
    if patient.config is None:
        return fail(patient.problems, "correct it; edge-asr check-config shows what is in effect")
    return ok(f"device_id {patient.config.device_id}, engine.target {patient.config.engine.target}")


def python(patient: Patient) -> Finding:
    """Return which Python this is; what it cannot load the other checks tell."""
    return ok(f"{platform.python_version()} on {platform.machine()}, {sys.executable}")


def state_dir(patient: Patient) -> Finding:
    """Return whether what outlives a restart can be written."""
    folder = patient.settings.state_dir
    there = _existing(folder)
    if not there.is_dir():
        return fail(f"{there} is no folder", "set state_dir to a folder, or move the file away")
    if not os.access(there, os.W_OK | os.X_OK):
        return fail(f"{there} cannot be written to", f"sudo chown $USER {there}, or set state_dir to a folder of yours")
    return ok(str(folder) if there == folder else f"{folder}, to be made in {there}")


def disk(patient: Patient) -> Finding:
    """Return whether there is room for an engine, which is about as big as the bundle's files."""
    folder = _existing(patient.settings.engine.dir or patient.settings.state_dir)
    free = shutil.disk_usage(folder).free
    needed = sum(path.stat().st_size for path in patient.bundle.files.values())
    found = f"{free / 1e6:,.0f} MB free in {folder}, an engine takes about {needed / 1e6:,.0f} MB"
    return ok(found) if free >= needed else warn(found, "make room, or set state_dir to a larger disk")


def _existing(folder: Path) -> Path:
    """Return the folder itself, or the first one above that is there."""
    folder = folder.absolute()
    return next((place for place in (folder, *folder.parents) if place.exists()), folder)


def bundle(patient: Patient) -> Finding:
    """Return whether the configured model can be read."""
    try:
        model = patient.bundle
    except BundleError as error:
        return fail(*split(error))
    return ok(f"{model.name}: {', '.join(model.files)}, {len(model.tokens)} tokens, in {model.folder}")


def engine(patient: Patient) -> Finding:
    """Return whether the engine fits model and machine, is undamaged, or is still to be built.

    Where TensorRT is to run the model, this is about the one on onnxruntime that stands in for it.
    """
    config = patient.settings.engine
    if config.dir is not None:
        return _engine(patient, config.target, config.dir)
    if config.target == TENSORRT and config.strict:
        return ok(f"not needed: engine.target is {TENSORRT}, engine.strict is true")
    target = ONNX if config.target in (AUTO, TENSORRT) else config.target
    return _engine(patient, target, engine_folder(_readable(patient), patient.settings.state_dir, target))


def tensorrt_engine(patient: Patient) -> Finding:
    """Return the same of the engine on TensorRT."""
    if patient.needs_tensorrt == "ok":
        return ok("not needed here")
    if patient.settings.engine.dir is not None:
        return ok("engine.dir names the only one; see engine")
    _check_plans_run(patient)
    return _engine(patient, TENSORRT, engine_folder(_readable(patient), patient.settings.state_dir, TENSORRT))


def _engine(patient: Patient, target: str, folder: Path) -> Finding:
    config, model = patient.settings.engine, _readable(patient)
    build = f"edge-asr build-engine --model {model.folder} --target {target}"
    build += f" --out {folder}" if config.dir else ""
    try:
        why = _unfit(patient, folder, model, target)
    except EngineError as error:
        return fail(split(error)[0], build)
    if why is None:
        return ok(f"{folder}, undamaged")
    # An engine that is named is not built by itself; any other is, when the model is loaded.
    return fail(f"{folder}: {why}", build) if config.dir else warn(f"{why}; it is built at the first start", build)


def _unfit(patient: Patient, folder: Path, model: Bundle, target: str) -> str | None:
    """Return why the engine in `folder` is not to be used as it is. Raises EngineError where it is damaged."""
    schema = _schema(folder)
    if schema not in (None, SCHEMA):
        return f"it is of another version of edge_asr ({schema})"
    manifest = read_manifest(folder)
    if manifest is None:
        return "there is none yet"
    if manifest.plan is not None:
        _check_plans_run(patient)
    config = patient.settings.engine
    if why := unfit(manifest, model, target, config.gpu, config.tensorrt):
        return f"it does not fit: {why}"
    check_files(folder, manifest)
    return None


def _check_plans_run(patient: Patient) -> None:
    """Raise CannotTellError where what runs plans does not load: nobody should try that in this process."""
    for subject, check in (("tensorrt", "tensorrt"), ("cuda", "cuda_driver"), ("pycuda", "pycuda")):
        if patient.answer(subject).error is not None:
            raise CannotTellError(check)


def _schema(folder: Path) -> Any:
    """Return the schema that a manifest names; None where there is none, or nothing that can be read."""
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8")).get("schema")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _readable(patient: Patient) -> Bundle:
    """Return the bundle. Raises CannotTellError where it, or what is to run it, is to blame already."""
    if patient.answer("onnxruntime").error is not None:
        raise CannotTellError("onnxruntime")
    try:
        return patient.bundle
    except BundleError as error:
        raise CannotTellError("bundle") from error


def broker(patient: Patient) -> Finding:
    """Return whether the broker admits the configured account; nothing is published."""
    from edge_asr.publish.visit import visiting

    config = patient.settings.mqtt
    if not config.enabled:
        return ok("mqtt.enabled is false")
    where, account = f"{config.host}:{config.port}", _account(config)
    name = f"doctor-{uuid.uuid4().hex[:12]}"  # the daemon's own would throw out the one that runs
    with visiting(config, name, BROKER_S) as connection:
        if connection.problem is not None:
            return fail(f"{where}, {account}: {connection.problem.why}", connection.problem.remedy)
        way = "".join((", TLS" * config.tls.enabled, ", WebSocket" * (config.transport == "websockets")))
        return ok(f"{where} admits us {account} (MQTT {connection.protocol}{way})")


def _account(config: MqttConfig) -> str:
    try:
        name = config.read_username()
    except ConfigError:  # the connection will say so
        return f"as told in {config.username_file}"
    return "without an account" if name is None else f"as {name}"


def split(error: Exception) -> tuple[str, str]:
    """Return what is wrong, and the remedy: our errors name it after their last semicolon."""
    found, _, remedy = str(error).rpartition("; ")
    return (found, remedy) if found else (remedy, "correct it")
