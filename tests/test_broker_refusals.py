"""A broker that says no: a clear line, patience that fits the cause, the other transcripts go on, no secret is told."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Certificates
from chaos import Appliance, appliance
from daemons import Start, is_ready
from mosquitto import PATIENCE_S, Mosquitto, Subscriber, wait_for
from publishers import connected, texts_on, transcript

PATIENT: dict[str, Any] = {"reconnect_min_s": 0.02, "reconnect_max_s": 600}
SECRET, WRONG_SECRET, KEY_SECRET = "r1ght-s3cret", "wr0ng-s3cret", "k3y-s3cret"

pytestmark = pytest.mark.slow


@pytest.fixture
def brokers(tmp_path: Path, mosquitto_installed: None) -> Iterator[Callable[..., Mosquitto]]:
    """Return what starts a Mosquitto with these settings."""
    started: list[Mosquitto] = []

    def start(**settings: Any) -> Mosquitto:
        folder = tmp_path / f"broker-{len(started)}"
        folder.mkdir()
        started.append(Mosquitto(folder, **settings))
        started[-1].start()
        return started[-1]

    yield start
    for broker in started:
        broker.kill()


def pauses(caplog: pytest.LogCaptureFixture) -> list[tuple[str, float]]:
    """Return level and planned pause of the attempts that have failed."""
    found = [
        (record.levelname, re.search(r"trying again in ([\d.]+) s", record.getMessage())) for record in caplog.records
    ]
    return [(level, float(match[1])) for level, match in found if match]


def is_refused_for_long(caplog: pytest.LogCaptureFixture, guest: Appliance, cause: str) -> None:
    """Check that one attempt was made, said in words, and that the next one is far away."""
    wait_for(lambda: pauses(caplog), "the first failure")
    [(level, pause_s)] = pauses(caplog)
    assert level == "WARNING"
    assert pause_s >= PATIENT["reconnect_max_s"] / 2
    assert cause in caplog.text
    assert cause in guest.publisher.stats().last_failure


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_a_wrong_password(
    version: str, brokers: Callable[..., Mosquitto], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    broker = brokers(username="hall", password=SECRET)
    keys: dict[str, Any] = {"username": "hall", "password": WRONG_SECRET, "protocol": version}
    with appliance(tmp_path, broker.port, **keys, **PATIENT) as guest:
        guest.publisher.offer(transcript("打开"))
        is_refused_for_long(caplog, guest, "not authorized")
        wait_for(lambda: guest.outbox.stats().pending == 1, "the record")
        assert broker.log().count("not authorised") == 1
        assert WRONG_SECRET not in caplog.text + repr(guest.publisher.stats())


def test_a_password_that_is_put_right_is_used_by_the_next_attempt(
    brokers: Callable[..., Mosquitto], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = brokers(username="hall", password=SECRET)
    file = tmp_path / "password"
    file.write_text(WRONG_SECRET)
    with appliance(tmp_path, broker.port, username="hall", password_file=file, reconnect_max_s=0.1) as guest:
        guest.publisher.offer(transcript("打开"))
        wait_for(lambda: broker.log().count("not authorised") >= 3, "three attempts")
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
        file.write_text(SECRET)
        connected(guest.publisher)
        wait_for(lambda: guest.outbox.stats().pending == 0, "the end of the drain")
    assert WRONG_SECRET not in caplog.text


def test_an_untrusted_certificate(
    brokers: Callable[..., Mosquitto],
    tmp_path: Path,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = brokers(tls=certificates.server)
    tls = {"ca_file": certificates.foreign.file}
    with appliance(tmp_path, broker.tls_port, tls=tls, **PATIENT) as guest:
        is_refused_for_long(caplog, guest, "mqtt.tls.ca_file")


def test_a_certificate_for_another_host(
    brokers: Callable[..., Mosquitto],
    tmp_path: Path,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = brokers(tls=certificates.authority.issue("elsewhere", ("elsewhere.example",)))
    tls = {"ca_file": certificates.authority.file}
    with appliance(tmp_path, broker.tls_port, tls=tls, **PATIENT) as guest:
        is_refused_for_long(caplog, guest, "elsewhere.example")


def test_a_broker_that_is_away_is_looked_for_more_and_more_rarely(
    brokers: Callable[..., Mosquitto], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    broker = brokers()
    broker.kill()
    with appliance(tmp_path, broker.port, reconnect_min_s=0.02, reconnect_max_s=0.2) as guest:
        wait_for(lambda: len(pauses(caplog)) >= 6, "six attempts")
        planned = pauses(caplog)
        assert [level for level, _ in planned[:6]] == ["WARNING", *["DEBUG"] * 5]
        for number, (_, pause_s) in enumerate(planned):
            longest = min(0.2, 0.02 * 2**number)
            assert longest / 2 - 0.05 <= pause_s <= longest + 0.05  # it is told with one digit
        broker.start()
        connected(guest.publisher)


def test_what_the_access_list_forbids_stays_until_it_is_allowed(
    brokers: Callable[..., Mosquitto],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = ["topic write edge_asr/hall/status", "topic write edge_asr/hall/said", "topic read #"]
    broker = brokers(access=allowed)
    with appliance(tmp_path, broker.port, protocol="5") as guest, Subscriber(broker.port) as subscriber:
        connected(guest.publisher)
        for text in ("一", "二", "三"):
            guest.publisher.offer(transcript(text))
        wait_for(lambda: "not authorized" in guest.publisher.trouble, "the trouble")
        subscriber.wait_for(lambda s: texts_on(s, "said") == ["一", "二", "三"], "the commands")
        assert guest.outbox.stats().pending == 3
        assert guest.outbox.stats().refused == 0
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
        assert guest.publisher.stats().reconnects == 0


@pytest.mark.parametrize(
    ("version", "option", "told"),
    [
        ("5", "message_size_limit 2000", "packet too large; raise the limit"),
        ("5", "max_packet_size 2000", "bytes, and the broker takes 2000; raise the limit"),
        ("3.1.1", "max_packet_size 2000", "the broker hangs up on its "),  # it says no more; a smaller one passes
    ],
)
def test_what_is_too_large_for_the_broker_is_set_aside_and_lets_the_others_pass(
    version: str,
    option: str,
    told: str,
    brokers: Callable[..., Mosquitto],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = brokers(options=[option])
    with appliance(tmp_path, broker.port, protocol=version) as guest, Subscriber(broker.port) as subscriber:
        connected(guest.publisher)
        for text in ("一", "长" * 2000, "二"):
            guest.publisher.offer(transcript(text))
        subscriber.wait_for(lambda s: texts_on(s, "transcript")[-1:] == ["二"], "the transcript behind it")
        assert list(dict.fromkeys(texts_on(subscriber, "transcript"))) == ["一", "二"]
        wait_for(lambda: guest.outbox.stats().pending == 0, "the acknowledgements")
        assert guest.outbox.stats().refused == 1
        assert told in caplog.text


def test_no_password_is_told_anywhere(
    brokers: Callable[..., Mosquitto], start: Start, tmp_path: Path, certificates: Certificates
) -> None:
    broker = brokers(username="hall", password=SECRET)
    key_password = tmp_path / "key-password"
    key_password.write_text(KEY_SECRET)
    account, wrong = (
        ["-o", "mqtt.username=hall", "-o", f"mqtt.password={secret}", "-o", "log.level=DEBUG"]
        for secret in (SECRET, WRONG_SECRET)
    )
    told = []
    with Subscriber(broker.port, username="hall", password=SECRET) as subscriber:
        refused = start(broker.port, "--source", "stdin", *wrong, "-o", f"state_dir={tmp_path / 'wrong'}")
        refused.wait_for("not authorized")
        refused.stop()
        accepted = start(broker.port, "--source", "stdin", *account, "-o", f"state_dir={tmp_path / 'right'}")
        subscriber.wait_for(is_ready, "ready")
        accepted.stop()
        told += [refused.log, accepted.log, *(message.payload for message in subscriber.messages)]
    locked = certificates.authority.issue("locked", key_password=key_password)
    files = {"ca_file": certificates.authority.file, "cert_file": locked.file, "key_file": locked.key}
    tls = [part for key, file in files.items() for part in ("-o", f"mqtt.tls.{key}={file}")]
    tls += ["-o", f"mqtt.tls.key_password_file={key_password}"]
    for command in (["check-config"], ["doctor", "--json"]):
        for options in (account, wrong, [*wrong, *tls]):
            program = [sys.executable, "-m", "edge_asr", *command, "-o", f"mqtt.port={broker.port}", *options]
            done = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
            assert done.stdout
            told += [done.stdout, done.stderr]
    kept = [path for folder in ("wrong", "right") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    told += [path.read_bytes().decode(errors="replace") for path in kept]
    for secret in (SECRET, WRONG_SECRET, KEY_SECRET):
        assert not [text for text in told if secret in text]
