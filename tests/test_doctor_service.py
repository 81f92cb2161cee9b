"""What the doctor says of the configuration, the model, its engine and the broker."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from bundled import BUNDLE, bundle_of, engine_of
from certificates import Certificates
from machines import (
    GPU_ANSWERS,
    ORIN,
    PLAIN_ANSWERS,
    SERVER,
    configured,
    examined,
    lay_out,
    patient,
    release,
    run_doctor,
)
from mosquitto import Mosquitto, Subscriber, free_port

from edge_asr.config import Config
from edge_asr.doctor import service
from edge_asr.doctor.children import Answer
from edge_asr.doctor.examination import CHECKS, Check, examine
from edge_asr.doctor.patient import Patient
from edge_asr.doctor.report import Finding, ok
from edge_asr.errors import ConfigError
from edge_asr.loader import engine_folder
from edge_asr.recognizer import tensorrt_network
from edge_asr.recognizer.bundle import FP32
from edge_asr.recognizer.manifest import FILE, TENSORRT, Plan, read_manifest, write_manifest
from edge_asr.recognizer.tensorrt_network import GpuFacts
from edge_asr.tree import Tree


def test_a_check_that_breaks_fails_and_the_others_go_on(tmp_path: Path) -> None:
    def breaks(patient: Patient) -> Finding:
        raise RuntimeError("unforeseen")

    checks = (Check("first", breaks), Check("second", lambda patient: ok("fine")))
    report = examine(configured, Tree(tmp_path), PLAIN_ANSWERS.__getitem__, checks)
    assert [result.finding.status for result in report.results] == ["fail", "ok"]
    assert report.results[0].finding.found == "the check itself broke: RuntimeError: unforeseen"
    assert report.exit_code == 1


def test_a_wrong_configuration_fails_with_2_and_the_machine_is_looked_at_all_the_same(tmp_path: Path) -> None:
    def read() -> Config:
        raise ConfigError("config.yaml:3: mqtt.hots: unknown key\nconfig.yaml:4: drain_s: should be a number")

    report = examine(read, Tree(lay_out(tmp_path, ORIN)), GPU_ANSWERS.__getitem__)
    found = {result.name: result.finding for result in report.results}
    assert report.exit_code == 2
    assert len(found["configuration"].found.splitlines()) == 2
    assert found["bundle"].found == "not looked at: configuration comes first"
    assert found["l4t"].status == "ok"


def test_a_model_that_is_not_there_fails_with_3_and_is_named_once(tmp_path: Path) -> None:
    report, found = examined(tmp_path, SERVER, PLAIN_ANSWERS, model=tmp_path / "nowhere")
    assert report.exit_code == 3
    assert found["bundle"].status == "fail"
    assert "set `model`" in str(found["bundle"].remedy)
    for name in ("engine", "memory", "disk"):
        assert (found[name].status, found[name].found) == ("warn", "not looked at: bundle comes first")


def test_an_engine_is_not_looked_at_where_onnxruntime_crashes(tmp_path: Path) -> None:
    answers = {**PLAIN_ANSWERS, "onnxruntime": Answer(error="loading it crashed with SIGILL")}
    _, found = examined(tmp_path, SERVER, answers)
    assert found["engine"].found == "not looked at: onnxruntime comes first"


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """Give a copy of the bundled model's engine."""
    return Path(shutil.copytree(engine_of(FP32), tmp_path / "engine"))


def look_at(folder: Path, root: Path, **engine: Any) -> Finding:
    return service.engine(patient(root, SERVER, dir=folder, **engine))


def test_an_engine_that_fits_is_all_right(built: Path, tmp_path: Path) -> None:
    assert look_at(built, tmp_path / "machine") == ok(f"{built}, undamaged")


def test_a_flipped_byte_of_an_engine_is_found(built: Path, tmp_path: Path) -> None:
    path = next(built.glob("encoder-*.data"))
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    finding = look_at(built, tmp_path / "machine")
    assert (finding.status, finding.found) == ("fail", f"{path}: damaged")
    assert str(finding.remedy).startswith(f"edge-asr build-engine --model {BUNDLE}")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": null}'])
def test_a_damaged_manifest_is_found(built: Path, tmp_path: Path, text: str) -> None:
    (built / FILE).write_text(text)
    finding = look_at(built, tmp_path / "machine")
    assert finding.status == "fail"
    assert FILE in finding.found


def change(folder: Path, **keys: Any) -> None:
    path = folder / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"schema": "edge_asr.engine/1"}, "another version of edge_asr (edge_asr.engine/1)"),
        ({"machine": "abacus"}, "it was built for abacus"),
        ({"versions": {"onnxruntime": "1.0"}}, "it was measured with onnxruntime 1.0"),
    ],
)
def test_a_stale_engine_is_built_again_unless_it_was_named(
    tmp_path: Path, built: Path, keys: Mapping[str, Any], why: str
) -> None:
    change(built, **keys)
    assert look_at(built, tmp_path / "machine").status == "fail"
    config = configured(state_dir=tmp_path / "state")
    place = engine_folder(bundle_of(FP32), config.state_dir)
    shutil.copytree(built, place)
    finding = service.engine(Patient(Tree(tmp_path), config, "", PLAIN_ANSWERS))
    assert finding.status == "warn"
    assert why in finding.found
    assert "built at the first start" in finding.found


def test_an_engine_that_is_not_there_yet_is_built_at_the_first_start(tmp_path: Path) -> None:
    _, found = examined(tmp_path, SERVER, PLAIN_ANSWERS, state_dir=tmp_path / "state")
    assert found["engine"].status == "warn"
    assert found["engine"].found == "there is none yet; it is built at the first start"


PLAN = Plan(
    tensorrt="10.3.0", cuda="12.6", gpu="Orin", sm="8.7", multiprocessors=8, memory_gb=7,
    l4t=release(36, "4.7").splitlines()[0], typing="strong", softmax_fp16=False, accumulation="fp16",
    scale=1, profiles={},
)  # fmt: skip
HERE = GpuFacts(
    tensorrt="10.3.0", cuda="12.6", driver="12.6", gpu="Orin", sm="8.7", multiprocessors=8,
    total_bytes=8_000_000_000, integrated=True, l4t=PLAN.l4t,
)  # fmt: skip


def with_a_plan(folder: Path, state_dir: Path, **changed: Any) -> Config:
    """Pass an engine off as TensorRT's, put it in its place, and return the configuration that looks there."""
    manifest = read_manifest(folder)
    assert manifest is not None
    place = engine_folder(bundle_of(FP32), state_dir, TENSORRT)
    shutil.copytree(folder, place)
    plan = dataclasses.replace(PLAN, **changed)
    write_manifest(place, dataclasses.replace(manifest, engine=TENSORRT, plan=plan))
    return configured(state_dir=state_dir)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"tensorrt": "10.13.3"}, "it was built for TensorRT 10.13.3, here is 10.3.0"),
        ({"gpu": "Xavier"}, "it was built for GPU Xavier, here is Orin"),
        ({"sm": "7.2"}, "it was built for compute capability 7.2, here is 8.7"),
        ({"multiprocessors": 16}, "it was built for multiprocessors 16, here is 8"),
        ({"memory_gb": 30}, "it was built for memory in GB 30, here is 7"),
        ({"l4t": "# R35 (release)"}, "it was built for L4T # R35 (release), here is # R36"),
        ({"softmax_fp16": True}, "it was built with engine.tensorrt.softmax_fp16 on"),
    ],
)
def test_a_plan_is_held_against_the_machine(
    tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch, changed: Mapping[str, Any], why: str | None
) -> None:
    monkeypatch.setattr(tensorrt_network, "machine", lambda gpu: HERE)
    config = with_a_plan(built, tmp_path / "state", **changed)
    finding = service.tensorrt_engine(Patient(Tree(lay_out(tmp_path / "orin", ORIN)), config, "", GPU_ANSWERS))
    assert finding.status == ("ok" if why is None else "warn")
    assert (why or "undamaged") in finding.found


@pytest.mark.parametrize(("subject", "check"), [("tensorrt", "tensorrt"), ("cuda", "cuda_driver")])
def test_a_plan_is_not_looked_at_where_its_library_does_not_load(tmp_path: Path, subject: str, check: str) -> None:
    answers = {**GPU_ANSWERS, subject: Answer(error="it hung")}
    _, found = examined(tmp_path, ORIN, answers)
    assert found["tensorrt_engine"].found == f"not looked at: {check} comes first"


def test_a_file_in_the_place_of_the_state_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report, found = examined(tmp_path / "machine", SERVER, PLAIN_ANSWERS, state_dir=tmp_path / "file" / "state")
    assert found["state_dir"].found == f"{tmp_path / 'file'} is no folder"
    assert report.exit_code == 1


def test_a_state_folder_is_made_by_nobody_who_only_looks(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    _, found = examined(tmp_path / "machine", SERVER, PLAIN_ANSWERS, state_dir=folder)
    assert found["state_dir"] == ok(f"{folder}, to be made in {tmp_path}")
    assert not (tmp_path / "a").exists()


def test_a_state_folder_that_cannot_be_written_to_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: not mode & os.W_OK)
    _, found = examined(tmp_path / "machine", SERVER, PLAIN_ANSWERS, state_dir=tmp_path)
    assert (found["state_dir"].status, found["state_dir"].found) == ("fail", f"{tmp_path} cannot be written to")


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000))
    finding = service.disk(patient(tmp_path, SERVER))
    assert finding.status == "warn"
    assert finding.found.startswith("1 MB free in ")


def visit(port: int, **account: Any) -> Finding:
    config = configured(mqtt={"port": port, **account})
    return service.broker(Patient(Tree(), config, "", {}))


@pytest.fixture
def guarded(tmp_path: Path, mosquitto_installed: None) -> Iterator[Mosquitto]:
    """Yield a Mosquitto that admits one account only."""
    server = Mosquitto(tmp_path, username="hall", password="open-sesame")
    server.start()
    yield server
    server.kill()


def test_a_broker_admits_its_account_and_nothing_is_published(guarded: Mosquitto) -> None:
    with Subscriber(guarded.port, username="hall", password="open-sesame") as subscriber:
        finding = visit(guarded.port, username="hall", password="open-sesame")
        assert finding == ok(f"127.0.0.1:{guarded.port} admits us as hall (MQTT 5)")
        command = ["mosquitto_pub", "-p", str(guarded.port), "-u", "hall", "-P", "open-sesame", "-t", "end", "-m", "."]
        subprocess.run(command, check=True, timeout=30)
        subscriber.wait_for(lambda seen: seen.messages, "the end")
        assert [message.topic for message in subscriber.messages] == ["end"]


@pytest.mark.parametrize("account", [{"username": "hall", "password": "0pen-sesame"}, {}])
def test_a_wrong_account_is_told_from_a_broker_that_is_away(guarded: Mosquitto, account: Mapping[str, str]) -> None:
    finding = visit(guarded.port, **account)
    assert finding.status == "fail"
    assert finding.found.endswith(": it refused: not authorized")
    assert "mqtt.username" in str(finding.remedy)


def test_a_closed_port_is_told() -> None:
    finding = visit(free_port())
    assert finding.status == "fail"
    assert finding.found.endswith("without an account: connection refused: nobody listens there")


def test_a_name_that_nobody_knows_is_told() -> None:
    finding = visit(1883, host="no.such.invalid")
    assert finding.found == "no.such.invalid:1883, without an account: its name cannot be resolved"
    assert "mqtt.host" in str(finding.remedy)


def test_what_listens_and_is_no_broker_is_told() -> None:
    def hang_up(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                with listener.accept()[0] as visitor:
                    visitor.recv(4096)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=hang_up, args=(listener,), daemon=True)
        thread.start()
        finding = visit(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(30)
    assert finding.found.endswith("it hangs up without an answer")


def test_the_broker_is_visited_over_tls_and_what_is_wrong_there_is_told(
    tmp_path: Path, mosquitto_installed: None, certificates: Certificates
) -> None:
    server = Mosquitto(tmp_path, tls=certificates.server)
    server.start()
    try:
        finding = visit(server.tls_port, tls={"ca_file": certificates.authority.file})
        assert finding == ok(f"127.0.0.1:{server.tls_port} admits us without an account (MQTT 5, TLS)")
        finding = visit(server.tls_port, tls={"ca_file": certificates.foreign.file})
        assert "its certificate is not trusted" in finding.found
        assert "mqtt.tls.ca_file" in str(finding.remedy)
    finally:
        server.kill()


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = threading.Event()
    monkeypatch.setattr(service, "BROKER_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *place, **kind: enough.wait(30) and [])
    finding = visit(1883, host="broker.local")
    enough.set()
    assert finding.found == "broker.local:1883, without an account: no answer in time"


def test_what_breaks_on_the_way_to_the_broker_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *place, **kind: 1 // 0)
    assert "division" in visit(1883).found


@pytest.mark.slow
def test_a_broker_that_hangs_is_given_up(broker: Mosquitto) -> None:
    broker.freeze()
    assert visit(broker.port).found.endswith("it accepts connections but does not answer")


def test_the_command_prints_one_object_with_stable_keys(guarded: Mosquitto) -> None:
    options = [f"mqtt.port={guarded.port}", "mqtt.username=hall", "mqtt.password=open-sesame", "engine.target=onnx"]
    result = run_doctor("--json", *(part for option in options for part in ("-o", option)))
    report = json.loads(result.stdout)
    assert list(report) == ["schema", "version", "verdict", "exit_code", "checks"]
    assert report["schema"] == "edge_asr.doctor/1"
    assert [check["name"] for check in report["checks"]] == [check.name for check in CHECKS]
    for check in report["checks"]:
        assert list(check) == ["name", "status", "found", "remedy"]
        assert (check["remedy"] is None) == (check["status"] == "ok")
        assert check["found"]
    assert report["verdict"] in ("ok", "warn")
    assert (result.returncode, report["exit_code"], result.stderr) == (0, 0, "")
    assert "open-sesame" not in result.stdout


def test_the_command_says_what_is_wrong_with_the_broker_and_never_the_password(guarded: Mosquitto) -> None:
    options = [f"mqtt.port={guarded.port}", "mqtt.username=hall", "mqtt.password=wrong-word"]
    result = run_doctor(*(part for option in options for part in ("-o", option)))
    assert result.returncode == 1
    assert "it refused: not authorized\n" in result.stdout
    assert "wrong-word" not in result.stdout + result.stderr
    assert "\x1b" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("This machine is not ready: 1 check failed, ")
