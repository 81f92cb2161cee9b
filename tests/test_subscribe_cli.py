"""`edge-asr subscribe`, as a process, on a real Mosquitto."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mosquitto import PATIENCE_S, Mosquitto, Subscriber, free_port, send, send_lines, wait_for

from edge_asr import cli_subscribe
from edge_asr.cli import main
from edge_asr.cli_subscribe_view import json_line, plain
from edge_asr.config_mqtt import MqttConfig
from edge_asr.errors import ConfigError

HALL = "edge_asr/hall"


def row(seq: int | None, text: str = "打开客厅灯", **keys: object) -> str:
    content = {
        "id": f"0192f6e2-0000-7000-8000-{seq or 0:012d}",
        "seq": seq,
        "source": "desk",
        "text": text,
        "confidence": 0.97,
        "start": "2026-11-22T06:12:03.412Z",
        "latency_ms": {"response": 2.1},
        "within_budget": True,
        "replayed": False,
    }
    return json.dumps({**content, **keys})


class Program:
    """`edge-asr subscribe`, and what it has written."""

    def __init__(self, folder: Path, port: int, *arguments: str, **keys: str) -> None:
        self._files = [folder / "out", folder / "err"]
        quick = [f"mqtt.port={port}", "mqtt.reconnect_min_s=0.05", "mqtt.reconnect_max_s=0.1"]
        options = [part for option in quick for part in ("-o", option)]
        command = [sys.executable, "-W", "error", "-m", "edge_asr", "subscribe", *options, *arguments]
        environment = {**os.environ, "TZ": "UTC", **keys}
        with self._files[0].open("ab") as out, self._files[1].open("ab") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)

    @property
    def out(self) -> str:
        return self._files[0].read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        text = self._files[1].read_text(encoding="utf-8")
        assert "Traceback" not in text, text
        return text

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def numbers(self) -> list[int]:
        return [line["seq"] for line in self.lines]

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        wait_for(lambda: condition() or self.process.poll() is not None, f"{what}; so far: {self.out}{self.err}")
        assert condition(), self.out + self.err

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(PATIENCE_S)


Subscribe = Callable[..., Program]


@pytest.fixture
def subscribe(tmp_path: Path) -> Iterator[Subscribe]:
    """Return what starts the program, and returns when it has subscribed; at the end none is left."""
    programs: list[Program] = []

    def start(broker: Mosquitto, *arguments: str, port: int | None = None) -> Program:
        before = broker.log().count("edge_asr-subscribe-")
        programs.append(Program(tmp_path, port or broker.port, *arguments))
        programs[-1].wait_for(lambda: broker.log().count("edge_asr-subscribe-") > before, "the subscription")
        return programs[-1]

    yield start
    for program in programs:
        program.process.kill()
        program.process.wait(PATIENCE_S)


@contextlib.contextmanager
def replaying(port: int, kept: dict[int, str]) -> Iterator[list[int]]:
    """Answer one `cmd/replay` after the other as an appliance that keeps these; yield what was asked for."""
    asked: list[int] = []
    with Subscriber(port, f"{HALL}/cmd/replay") as commands:

        class Requests(list):  # type: ignore[type-arg]
            def append(self, message: Any) -> None:
                asked.append(message.json["from_seq"])
                wanted = [seq for seq in kept if seq >= asked[-1]]
                span = {"from_seq": wanted[0], "to_seq": wanted[-1]} if wanted else {"from_seq": None, "to_seq": None}
                answer = {"ok": True, "rows": len(wanted), **span}
                send(port, f"{HALL}/cmd/replay/result", json.dumps(answer))
                if wanted:
                    send_lines(port, f"{HALL}/transcript", [kept[seq] for seq in wanted])

        commands.messages = Requests()
        yield asked


def test_transcripts_are_json_lines_with_their_topic(broker: Mosquitto, subscribe: Subscribe) -> None:
    program = subscribe(broker, "--json")
    send(broker.port, f"{HALL}/said", row(1))
    send(broker.port, f"{HALL}/transcript", row(1))
    send(broker.port, "edge_asr/kitchen/transcript", row(9, "关灯"))
    program.wait_for(lambda: len(program.out.splitlines()) == 2, "two lines")
    assert [(line["topic"], line["text"], line["seq"]) for line in program.lines] == [
        ("edge_asr/hall/transcript", "打开客厅灯", 1),
        ("edge_asr/kitchen/transcript", "关灯", 9),
    ]
    assert program.end(signal.SIGINT) == 130
    assert program.err == ""


def test_all_topics_of_one_device(broker: Mosquitto, subscribe: Subscribe) -> None:
    send(broker.port, f"{HALL}/status", "online", retained=True)
    program = subscribe(broker, "--json", "--device", "hall", "--topic", "all")
    send(broker.port, "edge_asr/kitchen/transcript", row(1))
    send(broker.port, f"{HALL}/cmd/mute/result", '{"ok": true, "topic": "mine"}')
    send(broker.port, f"{HALL}/partial", "\x1b]0;junk")
    program.wait_for(lambda: len(program.out.splitlines()) == 3, "three lines")
    assert program.lines == [
        {"topic": f"{HALL}/status", "payload": "online"},
        {"topic": f"{HALL}/cmd/mute/result", "ok": True},
        {"topic": f"{HALL}/partial", "payload": "\x1b]0;junk"},
    ]
    assert "\x1b" not in program.out
    assert program.end(signal.SIGTERM) == 0


def test_people_get_a_line_a_sentence(broker: Mosquitto, subscribe: Subscribe) -> None:
    send(broker.port, f"{HALL}/status", "online", retained=True)
    program = subscribe(broker)
    program.wait_for(lambda: "online" in program.out, "the status")
    send(broker.port, f"{HALL}/state", '{"state": "degraded", "why": "the disk is full", "mute": true}')
    send_lines(
        broker.port,
        f"{HALL}/transcript",
        [
            row(1),
            row(1),  # QoS 1 may deliver twice
            row(2, "", lost=True, confidence=None, within_budget=False, replayed=True, start=None),
            row(5, "\x1b[2Jrm -rf\r\n\u202eevil\ud800", source=["junk"], confidence=10**400, latency_ms=7),
        ],
    )
    send(broker.port, f"{HALL}/transcript", "no JSON\x07")
    send(broker.port, f"{HALL}/status", "offline")
    program.wait_for(lambda: "offline" in program.out, "the end")
    assert program.out.splitlines() == [
        "hall: online",
        "hall: degraded, muted: the disk is full",
        "2026-11-22 06:12:03  hall  desk  打开客厅灯  0.97  2 ms",
        "          hall  desk  lost: nobody had the time to recognise it  2 ms  late replayed",
        "hall: transcripts 3 to 4 are missing",
        "2026-11-22 06:12:03  hall    \\x1b[2Jrm -rf\\r\\n\\u202eevil\\ud800",
        "hall transcript no JSON\\x07",
        "hall: offline",
    ]
    assert program.err == ""


def test_on_a_terminal_it_shows_what_is_being_said(broker: Mosquitto) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "edge_asr", "subscribe", "-o", f"mqtt.port={broker.port}"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    shown = b""

    def show_until(text: str) -> None:
        nonlocal shown
        while text.encode() not in shown:
            shown += os.read(ours, 4096)

    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        wait_for(lambda: "edge_asr-subscribe-" in broker.log(), "the subscription")
        partial = {"id": "a", "source": "desk", "text": "打\x1b[2J开", "stable": ""}
        send(broker.port, f"{HALL}/partial", json.dumps(partial))
        show_until("打\\x1b[2J开")
        send(broker.port, f"{HALL}/partial", json.dumps({"id": "a", "source": "desk", "text": "", "end": True}))
        send(broker.port, f"{HALL}/transcript", row(1, "打开客厅灯"))
        show_until("打开客厅灯")
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal is gone
            while more := os.read(ours, 4096):
                shown += more
        assert process.wait(PATIENCE_S) == 130
    os.close(ours)
    assert b"Traceback" not in shown
    assert "打\x1b".encode() not in shown
    assert b"\x1b[?25h" in shown  # the cursor is back


def test_complete_goes_on_where_the_last_run_was_killed(
    broker: Mosquitto, subscribe: Subscribe, tmp_path: Path
) -> None:
    options = "--json", "--complete", "--state", str(tmp_path / "state")
    program = subscribe(broker, *options)
    send_lines(broker.port, f"{HALL}/transcript", [row(1), row(2)])
    program.wait_for(lambda: (tmp_path / "state").exists() and '"seq": 2' in (tmp_path / "state").read_text(), "two")
    program.end(signal.SIGKILL)
    kept = {seq: row(seq) for seq in (1, 2, 3, 4)}
    with replaying(broker.port, kept) as asked:
        program = subscribe(broker, *options)
        program.wait_for(lambda: program.numbers == [1, 2, 3, 4], "what was published meanwhile")
        send(broker.port, f"{HALL}/transcript", row(5))
        program.wait_for(lambda: program.numbers == [1, 2, 3, 4, 5], "what comes then")
    assert asked == [3]
    assert program.end(signal.SIGTERM) == 0
    assert json.loads((tmp_path / "state").read_text())["hall"]["seq"] == 5


def test_complete_fills_a_gap_and_tells_of_what_is_gone(broker: Mosquitto, subscribe: Subscribe) -> None:
    kept: dict[int, str] = {}
    with replaying(broker.port, kept) as asked:
        program = subscribe(broker, "--json", "--complete", "--device", "hall", "--since-seq", "1")
        program.wait_for(lambda: asked == [1], "the first request")
        kept.update({seq: row(seq) for seq in (3, 4, 5, 6)})
        send(broker.port, f"{HALL}/transcript", row(6))
        program.wait_for(lambda: program.numbers == [3, 4, 5, 6], "all that are kept")
    expected = "edge-asr: hall: transcripts 1 to 2 are missing: the appliance does not keep them any more\n"
    assert program.err == expected


def test_an_appliance_that_comes_online_is_asked_again(broker: Mosquitto, subscribe: Subscribe) -> None:
    program = subscribe(broker, "--json", "--complete", "--device", "hall", "--since-seq", "1")
    with replaying(broker.port, {1: row(1)}) as asked:
        send(broker.port, f"{HALL}/status", "online", retained=True)
        program.wait_for(lambda: program.numbers == [1], "what it keeps")
    assert asked == [1]


def test_a_broker_that_is_away_is_told_once_and_waited_for(broker: Mosquitto, subscribe: Subscribe) -> None:
    program = subscribe(broker, "--json")
    broker.stop()
    program.wait_for(lambda: "no connection" in program.err, "the loss")
    before = broker.log().count("edge_asr-subscribe-")
    broker.start()
    program.wait_for(lambda: broker.log().count("edge_asr-subscribe-") > before, "the subscription")
    send(broker.port, f"{HALL}/transcript", row(1))
    program.wait_for(lambda: program.numbers == [1], "what comes then")
    first, second = program.err.splitlines()
    assert first.startswith(f"edge-asr: no connection to the broker at 127.0.0.1:{broker.port}: ")
    assert second == f"edge-asr: connected to the broker at 127.0.0.1:{broker.port} again"


def test_a_broker_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    program = Program(tmp_path, free_port())
    program.wait_for(lambda: "no connection" in program.err, "the attempt")
    assert program.end(signal.SIGINT) == 130
    assert len(program.err.splitlines()) == 1


def test_a_wrong_password_ends_it_with_one_line(tmp_path: Path, mosquitto_installed: None) -> None:
    server = Mosquitto(tmp_path, username="home", password="secret")
    server.start()
    try:
        program = Program(tmp_path, server.port, "-o", "mqtt.username=home", "-o", "mqtt.password=wrong")
        assert program.process.wait(PATIENCE_S) == 1
        (line,) = program.err.splitlines()
        assert line.startswith(f"edge-asr: no connection to the broker at 127.0.0.1:{server.port}: it refused: ")
        assert "wrong" not in line.replace("wrong user", "")
    finally:
        server.kill()


def test_a_reader_that_goes_away_ends_it_quietly(broker: Mosquitto) -> None:
    command = [sys.executable, "-m", "edge_asr", "subscribe", "--json", "-o", f"mqtt.port={broker.port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        wait_for(lambda: "edge_asr-subscribe-" in broker.log(), "the subscription")
        process.stdout.close()
        send(broker.port, f"{HALL}/transcript", row(1))
        assert process.wait(PATIENCE_S) == 1
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--device", "a/b"], "--device a/b: should be the device_id of an appliance, or + for all of them"),
        (["--topic", "sayd"], "--topic sayd: should be one of transcript, said, partial, state, status, or all"),
        (["--state", "file"], "--state and --since-seq are about --complete; add it"),
        (["--since-seq", "3"], "--state and --since-seq are about --complete; add it"),
        (["--complete", "--since-seq", "3"], "--since-seq counts for one device; name it with --device"),
        (["--complete", "--topic", "said"], "--complete is about transcripts; add --topic transcript"),
        (["--complete", "--state", "/"], "--state /: cannot read it: Is a directory; correct the path"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["subscribe", *arguments])
    assert (ended.value.code, capsys.readouterr().err) == (2, f"edge-asr: {complaint}\n")


@pytest.mark.parametrize("content", ["", "[]", "7", '{"hall": 1}', '{"hall": {"seq": "x", "id": ""}}', "[" * 100_000])
def test_a_state_file_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text(content)
    with pytest.raises(ConfigError, match="is no state of `subscribe`; remove it to begin anew"):
        cli_subscribe.subscribe(MqttConfig(), "+", (), complete=True, state=path)


def test_text_for_a_terminal_is_cut_and_holds_nothing_that_it_would_obey() -> None:
    assert plain("打开 light ñ é") == "打开 light ñ é"
    assert plain("a\x00\x1b\x7f\x9b\u200e\u2028\ue000\U000e0041\ud800b") == (
        "a\\x00\\x1b\\x7f\\x9b\\u200e\\u2028\\ue000\\U000e0041\\ud800b"
    )
    assert plain("x" * 3000) == "x" * 2000 + "…"
    assert plain(7) == ""


@pytest.mark.parametrize(
    "payload",
    [b"\xff\xfe", b"", b"null", b'{"a": NaN}', b'{"a":' * 2000 + b"1" + b"}" * 2000, b'{"a": "\\ud800\\u009b"}'],
)
def test_a_json_line_is_json_whatever_came(payload: bytes) -> None:
    line = json_line("edge_asr/hall/partial\u2028", payload)
    assert json.loads(line)["topic"] == "edge_asr/hall/partial\u2028"
    assert len(line.splitlines()) == 1
    assert line.encode()
    assert not set(line) & {"\x9b", "\u2028"}
