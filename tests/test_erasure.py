"""What was said is erased from the outbox: no byte of it stays in any file, and the numbers go on."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from bundled import REPOSITORY
from mosquitto import PATIENCE_S, wait_for

from edge_asr.config_mqtt import OutboxConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.publish import outbox_sync
from edge_asr.publish.outbox import DiskOutbox
from edge_asr.publish.outbox_erasure import Erased, Wish, erase
from edge_asr.publish.outbox_file import Owner

NOBODY = 65534
WORDS = "把窗户关上"


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the log be synced and copied as often as there is something to."""
    monkeypatch.setattr(outbox_sync, "EVERY_S", 0.05)
    monkeypatch.setattr(outbox_sync, "QUIET_S", 0.05)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.sqlite3"


@pytest.fixture
def make(path: Path) -> Iterator[Callable[[], DiskOutbox]]:
    """Return what opens the outbox; at the end all are closed."""
    made: list[DiskOutbox] = []

    def run() -> DiskOutbox:
        made.append(DiskOutbox(OutboxConfig(), path))
        return made[-1]

    yield run
    for outbox in made:
        outbox.close()


def offered(count: int) -> list[tuple[str, str]]:
    """Return transcripts of all sizes: within a page of the file, and over several."""
    return [(f"id-{k}", json.dumps({"text": WORDS * (1 + k * 7)}, ensure_ascii=False)) for k in range(count)]


def holding(folder: Path) -> list[str]:
    """Return the files in which what was said can be found."""
    needle = WORDS.encode()
    return sorted(file.name for file in folder.rglob("*") if file.is_file() and needle in file.read_bytes())


def fill(outbox: DiskOutbox) -> None:
    """Record 60 transcripts, 40 of which the broker has."""
    outbox.acknowledge(outbox.add(offered(60))[:40])


class Asking:
    """`erase` on a thread of its own, as another process would call it."""

    def __init__(self, path: Path, patience_s: float = PATIENCE_S) -> None:
        self.found: list[Erased | EdgeAsrError] = []
        self._thread = threading.Thread(target=self._run, args=(path, patience_s))
        self._thread.start()

    def _run(self, path: Path, patience_s: float) -> None:
        try:
            self.found.append(erase(path, patience_s))
        except EdgeAsrError as error:
            self.found.append(error)

    def answered_by(self, outbox: DiskOutbox) -> tuple[Erased | EdgeAsrError, int]:
        """Return what it came to while the outbox is tended, and how often that said that all was erased."""
        told = 0

        def tended() -> bool:
            nonlocal told
            told += outbox.tend(online=True)
            return bool(self.found)

        wait_for(tended, "the answer")
        self._thread.join()
        return self.found[0], told


def test_an_outbox_that_nobody_has_is_erased_in_all_its_files(path: Path, make: Callable[[], DiskOutbox]) -> None:
    outbox = make()
    fill(outbox)
    outbox.close()
    shutil.copy(path, path.with_name(f"{path.name}.damaged-1763800000"))
    shutil.copy(path, path.with_name(f"{path.name}.damaged-1763800000-wal"))
    assert len(holding(path.parent)) == 3

    assert erase(path) == Erased(rows=60, pending=20, damaged=2)

    assert holding(path.parent) == []
    assert Wish(path).seen() is None
    again = make()
    assert again.stats().rows == 0
    assert again.add(offered(1))[0].seq == 61


def test_what_a_killed_process_left_in_the_log_is_erased(path: Path) -> None:
    program = [sys.executable, "-c", "import sys, test_erasure as t; t.fill_and_die(t.Path(sys.argv[1]))", str(path)]
    subprocess.run(program, cwd=Path(__file__).parent, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=60)
    assert f"{path.name}-wal" in holding(path.parent)

    assert erase(path) == Erased(rows=60, pending=20, damaged=0)

    assert holding(path.parent) == []


def fill_and_die(path: Path) -> None:
    fill(DiskOutbox(OutboxConfig(), path))
    os._exit(9)


def test_whoever_has_the_outbox_erases_it_when_asked(path: Path, make: Callable[[], DiskOutbox]) -> None:
    outbox = make()
    fill(outbox)
    shutil.copy(path, path.with_name(f"{path.name}.damaged-1763800000"))

    assert Asking(path).answered_by(outbox) == (Erased(rows=60, pending=20, damaged=1), 1)

    assert holding(path.parent) == []
    assert Wish(path).seen() is None
    assert (outbox.stats().rows, outbox.stats().pending) == (0, 0)
    assert outbox.pending(None, 100) == []
    assert outbox.add(offered(1))[0].seq == 61
    assert outbox.stats().pending == 1


def test_what_the_broker_acknowledges_after_it_was_erased_changes_no_count(
    path: Path, make: Callable[[], DiskOutbox]
) -> None:
    outbox = make()
    rows = outbox.add(offered(3))
    Asking(path).answered_by(outbox)
    outbox.acknowledge(rows)
    assert outbox.stats().pending == 0


def test_a_program_that_holds_on_to_what_it_read_is_told_of(path: Path, make: Callable[[], DiskOutbox]) -> None:
    fill(outbox := make())
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM transcripts").fetchone()
        answer, _ = Asking(path, patience_s=1.0).answered_by(outbox)
    assert "did not erase it within 1 s; stop it (systemctl stop edge-asr)" in str(answer)
    assert Wish(path).seen() is None


def test_the_answer_waits_until_a_program_that_reads_has_let_go_of_the_log(
    path: Path, make: Callable[[], DiskOutbox]
) -> None:
    fill(outbox := make())
    asking = Asking(path)
    wait_for(lambda: outbox.tend(online=True), "the erasing")
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM transcripts").fetchone()
        wait_for(lambda: outbox.tend(online=True) or path.stat().st_size > 4096, "the copy of the log")
        assert holding(path.parent) == [f"{path.name}-wal"]
        assert asking.found == []
    assert asking.answered_by(outbox) == (Erased(rows=60, pending=20, damaged=0), 0)
    assert holding(path.parent) == []


def test_who_asks_again_before_the_outbox_was_tended_has_what_came_meanwhile_erased(
    path: Path, make: Callable[[], DiskOutbox]
) -> None:
    outbox = make()
    for wish in (Wish(path), Wish(path)):
        wish.withdraw()
        outbox.add(offered(2))
        os.close(wish.ask())
        assert outbox.tend(online=True)
    assert outbox.stats().rows == 0
    assert not outbox.tend(online=True)


def test_an_owner_that_does_not_answer_is_told_of(path: Path, make: Callable[[], DiskOutbox]) -> None:
    fill(make())
    with pytest.raises(EdgeAsrError, match=r"did not erase it within 0 s; stop it"):
        erase(path, patience_s=0.2)
    assert Wish(path).seen() is None


def test_who_ends_before_answering_leaves_it_to_the_one_who_asks(path: Path, make: Callable[[], DiskOutbox]) -> None:
    make().close()
    owner = Owner(path)
    asking = Asking(path)
    wait_for(Wish(path).seen, "the wish")
    owner.release()
    wait_for(lambda: asking.found, "the answer")
    assert asking.found == [Erased(rows=0, pending=0, damaged=0)]
    assert Wish(path).seen() is None


def test_a_damaged_outbox_is_erased_with_what_was_set_aside(path: Path, make: Callable[[], DiskOutbox]) -> None:
    outbox = make()
    fill(outbox)
    outbox.close()
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 3 + 200] = b"\xff" * 200
    path.write_bytes(content)

    assert erase(path).damaged == 1

    assert holding(path.parent) == []
    again = make()
    assert (again.add(offered(1))[0].seq or 0) > 60


def test_without_an_outbox_nothing_is_said_to_be_erased(path: Path) -> None:
    with pytest.raises(EdgeAsrError, match=rf"there is no outbox at {path}, so nothing was erased"):
        erase(path)
    with pytest.raises(EdgeAsrError, match="there is no outbox"):
        erase(path.parent / "nowhere" / path.name)
    assert list(path.parent.iterdir()) == []


def test_another_programs_file_is_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA application_id = 7")
        other.execute("CREATE TABLE transcripts (seq)")
    before = path.read_bytes()
    with pytest.raises(EdgeAsrError, match=r"not erased: .* belongs to another program"):
        erase(path)
    assert path.read_bytes() == before


def test_why_the_one_who_has_the_outbox_cannot_erase_it_is_told(path: Path, make: Callable[[], DiskOutbox]) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA application_id = 7")
        other.execute("CREATE TABLE transcripts (seq)")
    answer, _ = Asking(path).answered_by(make())
    assert str(answer) == f"not erased: {path} belongs to another program; set outbox.file to another file"


def forget(state: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "edge_asr", "forget", "-o", f"state_dir={state}", *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S)


def test_the_command_says_what_is_gone(path: Path, make: Callable[[], DiskOutbox]) -> None:
    outbox = make()
    fill(outbox)
    outbox.close()
    done = forget(path.parent)
    assert done.stdout == f"erased 60 transcripts in {path}, 20 of which no broker had acknowledged\n"
    assert (done.stderr, done.returncode) == ("", 0)
    assert holding(path.parent) == []

    missing = forget(path.parent, "-o", f"outbox.file={path.parent}/other")
    assert missing.stderr.startswith(f"edge-asr: there is no outbox at {path.parent}/other")
    assert missing.returncode == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_root_leaves_no_file_that_the_service_cannot_use() -> None:
    state = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        fill(outbox := DiskOutbox(OutboxConfig(), state / "outbox.sqlite3"))
        outbox.close()
        (state / "outbox.sqlite3.lock").unlink()
        shutil.copy(state / "outbox.sqlite3", state / "outbox.sqlite3.damaged-1")
        for file in (state, *state.iterdir()):
            os.chown(file, NOBODY, NOBODY)
        assert forget(state).returncode == 0
        assert {(file.name, file.stat().st_uid) for file in state.iterdir()} == {
            ("outbox.sqlite3", NOBODY),
            ("outbox.sqlite3.lock", NOBODY),
        }
    finally:
        shutil.rmtree(state)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_stranger_is_told_who_may_erase_it(path: Path, make: Callable[[], DiskOutbox]) -> None:
    fill(make())
    path.parent.chmod(0o700)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(EdgeAsrError, match="is another user's; run this as root, or as that user"):
            erase(path)
    finally:
        os.seteuid(0)
