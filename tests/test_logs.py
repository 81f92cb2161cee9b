"""The log, as whoever reads standard error finds it: people, the journal, programs."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from bundled import REPOSITORY
from daemons import SENTENCES, Daemon, Start, is_ready, texts_on
from mosquitto import PATIENCE_S, Mosquitto, Subscriber

from edge_asr import logs
from edge_asr.config import LogConfig

PRELUDE = """
import logging, sys
from edge_asr import logs
from edge_asr.config import LogConfig

log = logging.getLogger("edge_asr.x")

class Mute:
    def __str__(self):
        raise OSError("nothing to see")
    __repr__ = __str__

def fail(message):
    try:
        try:
            raise ValueError(message)
        except ValueError as error:
            raise EnvironmentError("because of it") from error
    except OSError:
        log.exception("it failed")

"""
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
JOURNAL, TEXT, JSON = "journal", "text", "json"
KINDS = (JOURNAL, TEXT, JSON)
LINE_MAX = 48 * 1024
"""Where the journal cuts."""
ODD = ["\n", "\r\n", "\r", "\0", "\x0b", "\x1b[2K", "\x7f", "\x85", "\u2028", "\u2029", "\u202e", "\udcff"]


def journal_stream(descriptor: int) -> str:
    """Return what systemd puts into JOURNAL_STREAM."""
    found = os.fstat(descriptor)
    return f"{found.st_dev}:{found.st_ino}"


def run(command: list[str], journal: bool = False, **environment: str) -> tuple[int, str]:
    """Return the exit code of a process, and what it wrote to standard error, which may be the journal's."""
    reading, writing = os.pipe()
    known = {key: value for key, value in os.environ.items() if not key.startswith(("EDGE_ASR_", "JOURNAL_"))}
    known |= {"JOURNAL_STREAM": journal_stream(writing if journal else 0), "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-W", "error", *command], stderr=writing, env=known | environment
    ) as process:
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            written = file.read()
        return process.wait(PATIENCE_S), written.decode(environment.get("PYTHONIOENCODING", "utf-8"))


def written(script: str, kind: str, level: str = "DEBUG", **environment: str) -> str:
    """Return what a process writes that logs as `script` says."""
    settings = LogConfig(level=level, format="json" if kind == JSON else "auto").model_dump()  # type: ignore[arg-type]
    command = ["-c", f"{PRELUDE}\nlogs.set_up(LogConfig(**{settings}))\n{script}"]
    code, text = run(command, kind == JOURNAL, **environment)
    assert code == 0, text
    return text


def lines(text: str) -> list[str]:
    """Return the lines; whoever splits otherwise finds the same ones."""
    found = text.split("\n")
    assert found.pop() == ""
    assert found == text.splitlines()
    return found


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(text)]


def test_a_text_is_a_line_with_the_time() -> None:
    found = lines(written("log.info('%s: %d', '听', 7); log.error('no')", TEXT))
    assert [re.sub(f"^{TIME}", "TIME ", line) for line in found] == [
        "TIME INFO    edge_asr.x: 听: 7",
        "TIME ERROR   edge_asr.x: no",
    ]


def test_the_journal_is_told_the_priority_and_no_time() -> None:
    script = "for level in (10, 15, 20, 30, 35, 40, 50, 60): log.log(level, 'at %d', level)"
    assert lines(written(script, JOURNAL)) == [
        "<7>DEBUG   edge_asr.x: at 10",
        "<7>Level 15 edge_asr.x: at 15",
        "<6>INFO    edge_asr.x: at 20",
        "<4>WARNING edge_asr.x: at 30",
        "<4>Level 35 edge_asr.x: at 35",
        "<3>ERROR   edge_asr.x: at 40",
        "<2>CRITICAL edge_asr.x: at 50",
        "<2>Level 60 edge_asr.x: at 60",
    ]


def test_json_is_an_object_a_line() -> None:
    script = "logs.iso_time = lambda _: 'NOW'; log.info('%s \": %d', '听', 7)"
    [line] = lines(written(script, JSON))
    assert "听" in line
    expected = {"time": "NOW", "level": "INFO", "logger": "edge_asr.x", "message": '听 ": 7', "thread": "MainThread"}
    assert json.loads(line) == expected
    [found] = objects(written("log.info('.')", JSON))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found["time"])


def test_json_has_no_priority_in_the_journal_either() -> None:
    script = "logs.set_up(LogConfig(format='json')); log.warning('.')"
    assert [found["level"] for found in objects(written(script, JOURNAL))] == ["WARNING"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_traceback_keeps_its_lines(kind: str) -> None:
    text = written("fail('one\\ntwo')", kind)
    if kind == JSON:
        [found] = objects(text)
        trace = found["exception"].splitlines()
        assert (found["message"], found["level"]) == ("it failed", "ERROR")
    else:
        head, *below = lines(text)
        start = "<3>" if kind == JOURNAL else ""
        assert head.endswith("ERROR   edge_asr.x: it failed")
        assert all(line.startswith(f"{start}  ") for line in below), "indented: no record begins like that"
        trace = [line.removeprefix(f"{start}  ") for line in below]
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == "OSError: because of it"
    cause = trace.index("ValueError: one")
    assert trace[cause + 1] == "two"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_outside_of_any_exception_has_no_traceback(kind: str) -> None:
    [line] = lines(written("log.exception('none')", kind))
    assert "NoneType" not in line


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_record_comes_from_may_be_asked_for(kind: str) -> None:
    text = written("log.info('here', stack_info=True)", kind)
    assert "Stack (most recent call last)" in text
    assert (len(lines(text)) == 1) == (kind == JSON)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_from_outside_begins_a_record(kind: str) -> None:
    forged = "2026-01-01 00:00:00,000 ERROR   edge_asr: <3>forged"
    said = [f"a{odd}{forged}" for odd in ODD]
    text = written(f"for name in {said!a}: log.info('%s', name)", kind)
    found = lines(text)
    assert len(found) == len(ODD)
    start = {JOURNAL: "<6>INFO ", TEXT: TIME + "INFO ", JSON: '{"time": '}[kind]
    assert all(re.match(start, line) for line in found), text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]", text)
    if kind == JSON:
        messages = [json.loads(line)["message"] for line in found]
        assert messages == [one.replace("\udcff", "\\udcff") for one in said], "all as it was, but what is no Unicode"
    else:
        assert found[0].endswith(rf"edge_asr.x: a\n{forged}")
        assert found[5].endswith(rf"edge_asr.x: a\x1b[2K{forged}")


@pytest.mark.parametrize("kind", KINDS)
def test_nor_does_what_an_exception_says(kind: str) -> None:
    forged = "2026-01-01 00:00:00,000 ERROR   edge_asr: forged"
    text = written("\n".join(f"fail({f'a{odd}{forged}'!a})" for odd in ODD), kind)
    starts = {JOURNAL: "<3>ERROR ", TEXT: f"{TIME}ERROR ", JSON: '{"time": '}[kind]
    assert len([line for line in lines(text) if re.match(starts, line)]) == len(ODD)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]", text)


@pytest.mark.parametrize("kind", KINDS)
def test_no_line_is_longer_than_the_journal_takes(kind: str) -> None:
    script = r"for one in 'x听😀\n\x01\u2028\"': log.info(60_000 * one); fail(60_000 * one); log.info('after')"
    text = written(script, kind)
    assert max(len(line.encode()) for line in lines(text)) < LINE_MAX
    assert len([line for line in lines(text) if "edge_asr.x: after" in line or '"after"' in line]) == 7
    if kind == JSON:
        assert all(found["exception"].endswith("OSError: because of it") for found in objects(text)[1::3])


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_written_is_told_and_harms_nothing(kind: str) -> None:
    records = ["'%d', 'secret'", "'%s %s', 'secret'", "'%s', Mute()", "Mute()", "'%(a)s', {'b': 'secret'}"]
    found = lines(written("\n".join([*(f"log.info({record})" for record in records), "log.info('after')"]), kind))
    assert len(found) == len(records) + 1
    told = [re.search(r"<string>:(\d+): this message cannot be written \((\w+)\)", line) for line in found[:-1]]
    assert [one and one[2] for one in told] == ["TypeError", "TypeError", "OSError", "OSError", "KeyError"]
    assert len({one and one[1] for one in told}) == len(records), "which line of the program it was"
    assert not any("secret" in line for line in found)
    assert "after" in found[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_traceback_that_cannot_be_written_costs_no_message(kind: str) -> None:
    script = "log.error('it failed', exc_info=(ValueError, 1, 2)); fail(Mute()); log.info('after')"
    text = written(script, kind)
    assert re.search(r"<string>:\d+: this traceback cannot be written \(\w+\)", text)
    assert text.count("it failed") == 2
    assert "after" in lines(text)[-1]


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_terminal_that_does_not_know_a_character(kind: str, encoding: str) -> None:
    text = written("log.info('听 😀 \\udcff'); log.info('after')", kind, PYTHONIOENCODING=encoding)
    assert len(lines(text)) == 2
    if kind == JSON:
        assert objects(text)[0]["message"] == "听 😀 \\udcff"


@pytest.mark.parametrize("kind", KINDS)
def test_it_works_without_standard_error(kind: str) -> None:
    form = "json" if kind == JSON else "auto"
    script = f"{PRELUDE}\nlogs.set_up(LogConfig(format={form!r})); log.info('.'); fail('.'); print('after')"
    shell = ["/bin/sh", "-c", 'exec "$0" -W error -c "$1" 2>&-', sys.executable, script]
    environment = {**os.environ, "JOURNAL_STREAM": journal_stream(0), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(shell, stdout=subprocess.PIPE, text=True, env=environment, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, "after\n")


@pytest.mark.parametrize("value", [None, "", "nonsense", "1:2", "-"])
def test_another_pipe_is_not_the_journal(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `edge-asr run 2>&1 | tee log` from a service's shell, which leaves its JOURNAL_STREAM to us."""
    if value is None:
        monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    else:
        monkeypatch.setenv("JOURNAL_STREAM", value)
    assert not logs.in_journal()
    monkeypatch.setenv("JOURNAL_STREAM", journal_stream(2))
    assert logs.in_journal()


def test_text_is_text_in_the_journal_too() -> None:
    [line] = lines(written("logs.set_up(LogConfig(format='text')); log.warning('.')", JOURNAL))
    assert re.fullmatch(f"{TIME}WARNING edge_asr.x: .", line)


def test_what_a_command_complains_of_is_an_error_to_the_journal() -> None:
    wrong = ["-m", "edge_asr", "run", "-o", "segmant.x=1"]
    complaint = "edge-asr: -o segmant.x: segmant: unknown key; did you mean 'segment'?\n"
    assert run(wrong, journal=True) == (2, f"<3>{complaint}")
    assert run(wrong) == (2, complaint)


def test_it_may_be_set_up_again(capsys: pytest.CaptureFixture[str]) -> None:
    log, library = logging.getLogger("edge_asr.x"), logging.getLogger("some.library")
    library.setLevel(logging.ERROR)
    logs.set_up(LogConfig(level="WARNING", format="text"))
    log.info("1")
    log.warning("2")
    logs.set_up(LogConfig(level="INFO", format="json"))
    log.info("3")
    library.warning("4")
    logs.set_up(LogConfig(level="DEBUG", format="text"))
    log.debug("5")
    library.warning("6")
    found = lines(capsys.readouterr().err)
    assert [line[-1] for line in found] == ["2", "}", "5"]
    assert json.loads(found[1])["message"] == "3"
    assert library.level == logging.ERROR
    assert len(logging.getLogger().handlers) == 1


def test_no_record_is_lost_or_written_twice_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(LogConfig(format="json"))
    ended = threading.Event()
    wrote: list[int] = []

    def write() -> None:
        for number in count():
            if ended.is_set():
                return
            logging.getLogger("edge_asr.x").info("%d", number)
            wrote.append(number)

    writing = threading.Thread(target=write)
    writing.start()
    try:
        while writing.is_alive() and len(wrote) < 2_000:
            logs.set_up(LogConfig(format="json"))
    finally:
        ended.set()
        writing.join(PATIENCE_S)
    assert [int(found["message"]) for found in objects(capsys.readouterr().err)] == wrote


Log = Callable[..., tuple[Daemon, Path]]


@pytest.fixture
def heard(tmp_path: Path, broker: Mosquitto, start: Start, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return what has a daemon hear sentences: `heard(kind, level)` is what it has logged at its end."""

    def hear(kind: str, level: str) -> str:
        file = tmp_path / "daemon-0.log"
        file.touch()
        if kind == JOURNAL:
            found = file.stat()
            monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        else:
            monkeypatch.delenv("JOURNAL_STREAM", raising=False)
        form = "json" if kind == JSON else "auto"
        daemon = start(broker.port, "--source", "stdin", "-o", f"log.level={level}", "-o", f"log.format={form}")
        with Subscriber(broker.port) as subscriber:
            subscriber.wait_for(is_ready, "ready")
            for sentence in SENTENCES[:2]:
                daemon.is_told(sentence)
                subscriber.wait_for(lambda _, said=sentence: said in texts_on(subscriber, "transcript"), sentence)  # type: ignore[misc]
        assert daemon.stop() == 0
        return file.read_text(encoding="utf-8")

    return hear


def forms_of(sentence: str) -> tuple[str, ...]:
    return sentence, json.dumps(sentence)[1:-1], repr(sentence.encode())[2:-1], sentence[:4]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_is_in_no_log_at_info(heard: Callable[..., str], kind: str) -> None:
    text = heard(kind, "INFO")
    starts = {JOURNAL: "<[46]>(INFO|WARNING) ", TEXT: f"{TIME}(INFO|WARNING) ", JSON: r"\{.*\}$"}[kind]
    assert all(re.match(starts, line) for line in lines(text)), text
    assert "listening to stdin" in text
    assert not [form for sentence in SENTENCES[:2] for form in forms_of(sentence) if form in text]
    if kind == JSON:
        assert {"INFO"} <= {found["level"] for found in objects(text)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentence_is_a_line_at_debug(heard: Callable[..., str], kind: str) -> None:
    found = lines(heard(kind, "DEBUG"))
    for sentence in SENTENCES[:2]:
        [line] = [line for line in found if any(form in line for form in forms_of(sentence))]
        if kind == JSON:
            line = json.loads(line)["message"]
            assert line == f"stdin: {sentence}"
        else:
            assert re.fullmatch(f"({TIME}|<7>)DEBUG   edge_asr.answers: stdin: {sentence}", line)
    if kind == JSON:
        assert all(isinstance(json.loads(line), dict) for line in found)
