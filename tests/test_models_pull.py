"""Pulling from a server that breaks, lies, redirects and stalls: never a wrong file in place, always resumable."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import re
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPMessage
from pathlib import Path

import pytest
from bundled import BUNDLE, transcripts
from model_server import (
    ModelServer,
    Trick,
    answers,
    breaks_after,
    claims_range,
    etag,
    ignores_range,
    in_chunks,
    sends,
    stalls_after,
)

from edge_asr.catalogue import Entry, Golden, ModelFile, Source
from edge_asr.cli_models import transcribe_recordings
from edge_asr.errors import BundleError, ConfigError, EdgeAsrError, EngineError
from edge_asr.models import download
from edge_asr.models.download import Patience, UnavailableError, fetch
from edge_asr.models.store import Store

NAME = "paraformer-test"
GRAPH, TOKENS, RECORDING = "model_quant.onnx", "tokens.json", "samples/01.wav"
PATHS = (GRAPH, "am.mvn", TOKENS, RECORDING)
BODIES = {path: (BUNDLE / path).read_bytes() for path in PATHS}
SIZE = len(BODIES[GRAPH])
PATIENCE = Patience(timeout_s=0.3, tries=3, pause_s=0)
MIB = 1 << 20


def entry_of(url: str, *, known: bool = True, mirrors: tuple[str, ...] = ()) -> Entry:
    """Return the bundled model as if it were published at `url`; not `known`: without sizes and hashes."""
    files = tuple(
        ModelFile(path, len(body), hashlib.sha256(body).hexdigest()) if known else ModelFile(path)
        for path, body in BODIES.items()
    )
    sources = tuple(Source(f"server {number}", base) for number, base in enumerate((url, *mirrors), 1))
    text = transcripts()[Path(RECORDING).name]
    return Entry(NAME, "", "published-name", (), files, (Golden(RECORDING, text),), sources)


class Said:
    """Progress that remembers its lines; `interrupt_at`: Ctrl-C after so many bytes."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.lines: list[str] = []
        self._left = interrupt_at

    def begin(self, name: str, done: int, total: int | None) -> None:
        pass

    def advance(self, count: int) -> None:
        if self._left is not None:
            self._left -= count
            if self._left < 0:
                raise KeyboardInterrupt

    def say(self, line: str) -> None:
        self.lines.append(line)


class Puller:
    """A store in a folder of its own, and the server it pulls from."""

    def __init__(self, folder: Path, server: ModelServer) -> None:
        self.folder = folder
        self.server = server
        self.entry = entry_of(server.url)
        self.store = Store(folder, partial(transcribe_recordings, 1))
        self.said = Said()

    def pull(self, patience: Patience = PATIENCE) -> None:
        take = partial(fetch, sources=self.entry.sources, progress=self.said, patience=patience)
        self.store.pull(self.entry, take, self.said)

    def refused(self) -> str:
        """Pull in vain; return the one line that says why."""
        with pytest.raises(EdgeAsrError) as caught:
            self.pull()
        self.assert_not_here()
        (line,) = str(caught.value).splitlines()
        return line

    def assert_here(self) -> None:
        """The model is in place, as published, with nothing left over."""
        found = {str(path.relative_to(self.model)): path for path in self.model.rglob("*") if path.is_file()}
        assert {name: path.read_bytes() for name, path in found.items()} == BODIES
        assert sorted(path.name for path in self.folder.iterdir()) == [f".{NAME}.lock", "default", NAME]

    def assert_not_here(self) -> None:
        assert not self.model.exists()
        assert not (self.folder / "default").exists()

    @property
    def model(self) -> Path:
        return self.folder / NAME

    @property
    def partial(self) -> Path:
        return self.folder / f".{NAME}.partial"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def serve() -> Iterator[Callable[[], ModelServer]]:
    servers: list[ModelServer] = []

    def start() -> ModelServer:
        servers.append(ModelServer(dict(BODIES)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def puller(tmp_path: Path, serve: Callable[[], ModelServer]) -> Puller:
    return Puller(tmp_path / "models", serve())


def test_a_pull_puts_the_published_files_in_place_and_makes_them_the_default(puller: Puller) -> None:
    puller.pull()
    puller.assert_here()
    assert (puller.folder / "default").read_text() == f"{NAME}\n"
    assert [request.path for request in puller.server.requests] == list(PATHS)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "tricks",
    [
        pytest.param([breaks_after(MIB)], id="breaks"),
        pytest.param([breaks_after(MIB), breaks_after(MIB), breaks_after(MIB), breaks_after(MIB)], id="breaks often"),
        pytest.param([breaks_after(0), breaks_after(100)], id="breaks at once"),
        pytest.param([stalls_after(MIB)], id="stalls"),
        pytest.param([answers(500), answers(503), breaks_after(MIB), answers(429)], id="is busy"),
        pytest.param([breaks_after(MIB), answers(416)], id="416"),
        pytest.param([breaks_after(MIB), ignores_range], id="ignores the range"),
        pytest.param([breaks_after(MIB), claims_range(f"bytes 0-{SIZE - 1}/{SIZE}")], id="another part"),
        pytest.param([breaks_after(MIB), claims_range("bytes 1048576-/x")], id="no range at all"),
        pytest.param([breaks_after(MIB), claims_range(f"bytes {MIB}-{SIZE}/{SIZE + 1}")], id="another length"),
        pytest.param([answers(302, Location="/elsewhere?signed=1")], id="redirects"),
        pytest.param([in_chunks], id="in chunks"),
        pytest.param([partial(in_chunks, whole=False)], id="breaks in chunks"),
        pytest.param([breaks_after(MIB, ETag='W/"weak"'), breaks_after(MIB, ETag=None)], id="no version"),
    ],
)
def test_what_goes_wrong_on_the_way_is_made_good(puller: Puller, tricks: list[Trick], known: bool) -> None:
    puller.entry = entry_of(puller.server.url, known=known)
    puller.server.files["elsewhere?signed=1"] = BODIES[GRAPH]
    puller.server.tricks[GRAPH] = list(tricks)
    puller.pull()
    puller.assert_here()


def test_what_is_here_is_not_sent_again(puller: Puller) -> None:
    puller.server.tricks[GRAPH] = [breaks_after(MIB), stalls_after(MIB)]
    puller.pull()
    assert puller.server.sent(GRAPH) == SIZE
    assert puller.server.asked(GRAPH) == [None, f"bytes={MIB}-", f"bytes={2 * MIB}-"]


def test_a_version_is_named_by_a_strong_tag_or_else_by_its_date(puller: Puller) -> None:
    date = "Sun, 22 Nov 2026 10:00:00 GMT"
    puller.server.tricks[GRAPH] = [breaks_after(MIB, ETag='W/"weak"', Last_Modified=date), ignores_range]
    puller.server.tricks[TOKENS] = [breaks_after(9, Last_Modified=date)]
    puller.pull()
    asked = [request.headers.get("if-range") for request in puller.server.requests]
    assert asked == [None, date, None, None, etag(BODIES[TOKENS]), None]


def test_a_server_that_is_down_for_too_long_is_one_line_and_the_next_pull_goes_on(puller: Puller) -> None:
    puller.server.tricks[GRAPH] = [breaks_after(MIB), *[breaks_after(0)] * 2]
    puller.server.tricks[TOKENS] = [answers(503)] * 3
    line = puller.refused()
    assert line.startswith(f"{GRAPH}: server 1: connection broke at 1.0 MB of 4.6 MB; pull again to go on")
    assert "tokens.json: server 1: HTTP 503" in puller.refused()
    assert puller.server.sent(GRAPH) == SIZE
    puller.pull()
    puller.assert_here()
    assert puller.server.sent(GRAPH) == SIZE
    assert puller.server.asked("am.mvn") == [None]


def test_slow_steps_are_no_failures_but_no_step_at_all_is(puller: Puller) -> None:
    puller.server.tricks[GRAPH] = [breaks_after(MIB - 1)] * 3
    assert "connection broke at" in puller.refused()
    assert len(puller.server.asked(GRAPH)) == 3


def test_an_interrupt_leaves_what_is_here_for_the_next_time(puller: Puller) -> None:
    puller.said = Said(interrupt_at=MIB)
    with pytest.raises(KeyboardInterrupt):
        puller.pull()
    puller.assert_not_here()
    here = (puller.partial / f"{GRAPH}.part").stat().st_size
    puller.said = Said()
    puller.pull()
    puller.assert_here()
    assert puller.server.asked(GRAPH) == [None, f"bytes={here}-"]


def test_a_file_that_changed_between_two_tries_is_not_mixed(puller: Puller) -> None:
    puller.entry = entry_of(puller.server.url, known=False)
    puller.server.files[GRAPH] = BODIES[GRAPH][::-1]
    puller.said = Said(interrupt_at=MIB)
    with pytest.raises(KeyboardInterrupt):
        puller.pull()
    puller.server.files[GRAPH] = BODIES[GRAPH]
    puller.said = Said()
    puller.pull()
    puller.assert_here()


def test_a_mixture_that_only_the_hash_can_tell_is_pulled_anew(puller: Puller) -> None:
    puller.server.tricks[GRAPH] = [sends(BODIES[GRAPH][::-1][:MIB], Content_Length=SIZE)]
    puller.pull()
    puller.assert_here()
    assert any("sha256" in line and "trying again" in line for line in puller.said.lines)


@pytest.mark.parametrize(
    ("trick", "why"),
    [
        pytest.param(sends(BODIES[GRAPH][::-1]), "has sha256 .* instead of .*; deleted", id="another hash"),
        pytest.param(sends(BODIES[GRAPH][:-1]), f"has {SIZE - 1} bytes of it instead of {SIZE}", id="shorter"),
        pytest.param(sends(b"<html>", Content_Length=6), f"has 6 bytes of it instead of {SIZE}", id="a page"),
        pytest.param(sends(b"x", Content_Length=10**15), "has 1000000000000000 bytes", id="endless"),
        pytest.param(sends(BODIES[GRAPH] + b"x", Content_Length=None), "sends more than 4.6 MB", id="longer"),
        pytest.param(sends(BODIES[GRAPH], Content_Encoding="gzip"), "sends it packed", id="packed"),
        pytest.param(answers(404), "HTTP 404", id="not there"),
        pytest.param(answers(403), "HTTP 403", id="forbidden"),
        pytest.param(answers(204), "HTTP 204", id="nothing"),
        pytest.param(answers(302, Location="/model_quant.onnx"), "redirects lead nowhere", id="redirects in a circle"),
        pytest.param(answers(302, Location="file:///etc/passwd"), "redirects lead nowhere", id="to a file"),
    ],
)
def test_a_server_that_has_it_wrong_is_left_for_the_next(
    puller: Puller, serve: Callable[[], ModelServer], trick: Trick, why: str
) -> None:
    puller.server.tricks[GRAPH] = [trick] * 20
    assert re.search(f"^{GRAPH}: server 1: .*{why}.*; pull again", puller.refused())
    assert not [path for path in puller.partial.rglob("*") if path.is_file()]
    second = serve()
    puller.entry = entry_of(puller.server.url, mirrors=(second.url,))
    puller.pull()
    puller.assert_here()
    assert [request.path for request in second.requests] == [GRAPH]


@pytest.mark.parametrize(
    ("trick", "why"),
    [
        pytest.param(sends(BODIES[GRAPH][: SIZE // 2]), "refused: .*model_quant.onnx", id="cut"),
        pytest.param(sends(b"<html>"), "refused: .*model_quant.onnx", id="a page"),
        pytest.param(sends(b"x", Content_Length=10**15), "needs 1000000000.0 MB", id="endless"),
        pytest.param(sends(b"x", Content_Length=None), "does not say how long it is", id="no length"),
    ],
)
def test_where_nothing_is_known_of_a_file_the_recording_decides(puller: Puller, trick: Trick, why: str) -> None:
    puller.entry = entry_of(puller.server.url, known=False)
    puller.server.tricks[GRAPH] = [trick]
    assert re.search(why, puller.refused())
    puller.pull()
    puller.assert_here()


def test_the_first_part_of_one_server_goes_on_at_the_next_where_the_hash_is_known(
    puller: Puller, serve: Callable[[], ModelServer]
) -> None:
    second = serve()
    puller.entry = entry_of(puller.server.url, mirrors=(second.url,))
    puller.server.tricks[GRAPH] = [breaks_after(MIB), answers(404)]
    puller.pull()
    puller.assert_here()
    assert second.asked(GRAPH) == [f"bytes={MIB}-"]


def test_where_no_hash_is_known_two_servers_are_not_mixed(puller: Puller, serve: Callable[[], ModelServer]) -> None:
    second = serve()
    puller.entry = entry_of(puller.server.url, known=False, mirrors=(second.url,))
    puller.server.tricks[GRAPH] = [breaks_after(MIB), answers(404)]
    puller.pull()
    puller.assert_here()
    assert second.asked(GRAPH) == [None]


def test_a_model_that_does_not_say_its_text_is_refused_with_both_texts(puller: Puller) -> None:
    right = puller.entry
    puller.entry = dataclasses.replace(right, goldens=(Golden(RECORDING, "关掉客厅灯"),))
    with pytest.raises(
        BundleError, match=r"samples/01\.wav gives '打开客厅灯' instead of '关掉客厅灯'; please report it"
    ):
        puller.pull()
    puller.assert_not_here()
    puller.entry = dataclasses.replace(right, goldens=(Golden(RECORDING, " 打开 客厅灯"),))
    puller.pull()
    puller.assert_here()
    assert puller.server.sent(GRAPH) == SIZE


def test_a_refused_model_loses_the_files_that_nobody_can_vouch_for(puller: Puller) -> None:
    files = tuple(ModelFile(file.path) if file.path == RECORDING else file for file in puller.entry.files)
    puller.entry = dataclasses.replace(puller.entry, files=files)
    puller.server.tricks[RECORDING] = [sends(b"<html>")]
    assert "deleted what may be wrong (samples/01.wav), pull again" in puller.refused()
    puller.pull()
    puller.assert_here()
    assert puller.server.sent(GRAPH) == SIZE


def test_an_engine_that_fails_costs_no_file(puller: Puller) -> None:
    def fail(folder: Path, recordings: object) -> list[str]:
        raise EngineError("onnxruntime is not installed")

    able, puller.store = puller.store, Store(puller.folder, fail)
    assert puller.refused() == "onnxruntime is not installed"
    puller.store = able
    puller.pull()
    puller.assert_here()
    assert [request.path for request in puller.server.requests] == list(PATHS)


def test_files_that_rotted_between_two_pulls_are_pulled_again(puller: Puller) -> None:
    puller.server.tricks[RECORDING] = [answers(404)]
    puller.refused()
    (puller.partial / TOKENS).write_bytes(b"rotten")
    (puller.partial / "model.onnx").write_bytes(b"would be preferred")
    puller.pull()
    puller.assert_here()
    assert puller.server.asked(GRAPH) == [None]


def test_a_file_that_was_whole_but_not_yet_checked_is_not_sent_again(puller: Puller) -> None:
    puller.partial.mkdir(parents=True)
    (puller.partial / f"{GRAPH}.part").write_bytes(BODIES[GRAPH])
    (puller.partial / f"{TOKENS}.part").write_bytes(BODIES[TOKENS] + b"more than there is")
    puller.pull()
    puller.assert_here()
    assert puller.server.asked(GRAPH) == []
    assert puller.server.asked(TOKENS) == [None]


def test_a_damaged_note_of_a_part_is_ignored(puller: Puller) -> None:
    puller.entry = entry_of(puller.server.url, known=False)
    puller.partial.mkdir(parents=True)
    (puller.partial / f"{GRAPH}.part").write_bytes(b"of another time")
    (puller.partial / f"{GRAPH}.part.json").write_text("[1")
    puller.pull()
    puller.assert_here()


def test_a_full_disk_is_said_before_anything_is_sent(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SPARE_BYTES", 1 << 62)
    assert puller.refused().startswith(f"{NAME}: needs 4.7 MB, and {puller.folder} has room for 0.0 kB; make room")
    assert puller.server.requests == []


def test_two_pulls_of_one_model_do_not_meet(puller: Puller) -> None:
    puller.folder.mkdir()
    with (puller.folder / f".{NAME}.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert puller.refused() == f"{NAME}: is being pulled or removed already; wait for that"
    puller.pull()
    puller.assert_here()


def test_a_pull_of_what_is_here_only_verifies_it(puller: Puller) -> None:
    puller.pull()
    puller.server.requests.clear()
    puller.pull()
    assert puller.server.requests == []
    (puller.model / TOKENS).write_bytes(b"rotten")
    with pytest.raises(BundleError, match=f"{TOKENS}: has 6 bytes instead of 771; run: edge-asr models remove {NAME}"):
        puller.pull()


def test_a_state_folder_that_cannot_be_written_to_is_one_line(puller: Puller) -> None:
    puller.folder.write_text("in the way")
    with pytest.raises(ConfigError, match=r"state_dir: cannot write to .*: File exists; set another one"):
        puller.pull()


@pytest.mark.parametrize(
    ("origin", "target", "safe"),
    [
        ("https://a/x", "https://b/y", True),
        ("http://a/x", "https://b/y", True),
        ("http://a/x", "http://b/y", True),
        ("https://a/x", "http://a/y", False),
        ("https://a/x", "HTTP://a/y", False),
        ("http://a/x", "ftp://a/y", False),
    ],
)
def test_redirects_never_leave_encryption(origin: str, target: str, safe: bool) -> None:
    handler, request = download._Redirects(), urllib.request.Request(origin)
    with (BUNDLE / TOKENS).open("rb") as body:
        if safe:
            redirected = handler.redirect_request(request, body, 302, "", HTTPMessage(), target)
            assert redirected is not None
            assert redirected.full_url == target
        else:
            with pytest.raises(UnavailableError, match="which is not safe"):
                handler.redirect_request(request, body, 302, "", HTTPMessage(), target)
