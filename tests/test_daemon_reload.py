"""Configuration and model change while the daemon runs: asked for, or because their files have; or nothing changes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml
from bundled import BUNDLE, recording
from certificates import Certificates
from daemons import SENTENCES, Start, is_ready
from mosquitto import PATIENCE_S, Mosquitto, Subscriber, wait_for
from speech_server import Serving, serving
from test_access import TOKEN
from test_reload import NAME, OTHER, TEXT, cut_graph, lose_tokens, put_model
from test_rest import ask

from edge_asr import keeper, reload
from edge_asr.bench.proc import read_process
from edge_asr.config import Config
from edge_asr.config_changes import _replaced
from edge_asr.errors import ConfigError
from edge_asr.keeper import EngineKeeper
from edge_asr.loader import engine_folder
from edge_asr.recognizer.bundle import read_bundle
from edge_asr.serve.access import hash_of

WAV = recording(NAME).read_bytes()
UNSEEN = 3_600.0
GROWTH_MB = 25
"""The engine itself takes more: one that is not released shows."""


def text_of(server: Serving) -> str:
    answer, found = ask(server, "POST", "/recognize", WAV, {"content-type": "audio/wav"})
    assert answer.status == 200, found
    return str(found["text"])


def admin(server: Serving, command: str) -> tuple[int, Any]:
    answer, found = ask(server, "POST", f"/admin/{command}")
    return answer.status, found


@pytest.fixture
def engine(state_folder: Path) -> dict[str, Any]:
    return {"threads": 1, "dir": engine_folder(read_bundle(BUNDLE), state_folder)}


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "POLL_S", UNSEEN)


@pytest.mark.usefixtures("unwatched")
def test_the_model_before_is_a_step_away(tmp_path: Path, engine: dict[str, Any]) -> None:
    link = tmp_path / "current"
    link.symlink_to(put_model(tmp_path / "v1"))
    with serving(state_dir=tmp_path / "state", model=link, engine=engine) as server:
        wait_for(lambda: server.service.ready, "the model")
        status, refused = admin(server, "rollback")
        assert status == 409
        assert "no other model to go back to" in refused["error"]["message"]
        link.unlink()
        link.symlink_to(put_model(tmp_path / "v2", 灯="登"))
        assert admin(server, "reload") == (200, {"model": "v2", "engine": "onnx-fp32"})
        assert (text_of(server), server.daemon.describe()["why"]) == (OTHER, "")
        assert admin(server, "rollback") == (200, {"model": "v1", "engine": "onnx-fp32"})
        assert text_of(server) == TEXT
        assert server.daemon.describe()["why"] == f"rolled back to {tmp_path / 'v1'}; a reload takes {link}"
        assert admin(server, "rollback") == (200, {"model": "v2", "engine": "onnx-fp32"}), "and forth"
        assert (text_of(server), server.daemon.describe()["why"]) == (OTHER, "")
        assert admin(server, "rollback")[0] == 200
        lose_tokens(tmp_path / "v2")
        status, refused = admin(server, "reload")
        assert (status, text_of(server)) == (409, TEXT)
        assert "no token list" in refused["error"]["message"]
        assert "rolled back" in server.daemon.describe()["why"]


def test_what_is_put_into_the_folders_is_taken_once_it_is_left_alone(
    tmp_path: Path, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reload, "POLL_S", 0.01)
    monkeypatch.setattr(reload, "QUIET_S", UNSEEN)
    caplog.set_level(logging.INFO)
    model = put_model(tmp_path / "model")
    shutil.copytree(engine["dir"], tmp_path / "engine")
    keys = {**engine, "dir": tmp_path / "engine"}
    with serving(state_dir=tmp_path / "state", model=model, engine=keys) as server:
        wait_for(lambda: server.service.ready, "the model")
        put_model(model, 灯="登")
        assert text_of(server) == TEXT, "it may be in the middle of being copied"
        monkeypatch.setattr(reload, "QUIET_S", 0.05)
        wait_for(lambda: text_of(server) == OTHER, "the other model")
        lose_tokens(model)
        wait_for(lambda: "no token list" in server.daemon.describe()["why"], "the state to say why")
        failures = caplog.text.count("goes on")
        looked_at = server.daemon._reloader._seen
        wait_for(lambda: server.daemon._reloader._seen is looked_at, "another look")
        shutil.rmtree(model)
        assert text_of(server) == OTHER
        assert caplog.text.count("goes on") == failures, "it is tried once, not again and again, nor where it is gone"
        put_model(model)
        wait_for(lambda: text_of(server) == TEXT and not server.daemon.describe()["why"], "the first model")
        reloads = caplog.text.count("answers from now on")
        manifest = tmp_path / "engine" / "manifest.json"
        manifest.write_bytes(manifest.read_bytes())  # as another build would
        wait_for(lambda: caplog.text.count("answers from now on") == reloads + 1, "the engine")
        manifest.touch()


@pytest.mark.usefixtures("unwatched")
def test_the_configuration_changes_in_what_may_and_names_the_rest(
    tmp_path: Path, engine: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    wanted: list[Config] = []

    def want(**keys: Any) -> None:
        config = wanted[-1] if wanted else server.daemon._config
        for key, value in keys.items():
            config = _replaced(config, key.split("__"), value)
        wanted.append(config)

    model = put_model(tmp_path / "model")
    keys = {"state_dir": tmp_path / "state", "engine": engine, "model": model, "http": {"tokens": [hash_of(TOKEN)]}}
    with serving(taken=frozenset(), reread=lambda: wanted[-1], **keys) as server:
        wait_for(lambda: server.service.ready, "the model")
        mine = {"Authorization": f"Bearer {TOKEN}"}
        other = {"Authorization": f"Bearer {TOKEN.upper()}"}

        def asked(headers: dict[str, str], method: str = "GET", path: str = "/admin/state") -> tuple[int, Any]:
            answer, found = ask(server, method, path, b"", headers)
            return answer.status, found

        def contents() -> list[bool]:
            return [server.daemon._pauses["default"].content is not None]

        want(segment__preset="relaxed", http__tokens=(hash_of(TOKEN.upper()),), mqtt__host="nas", drain_s=1.0)
        status, answer = asked(mine, "POST", "/admin/reload")
        assert (status, answer["changed"]) == (200, ["segment.preset", "http.tokens", "drain_s"])
        assert answer["restart_needed"] == ["mqtt.host"]
        wait_for(lambda: asked(mine)[0] == 401, "the old token to be of no use")
        status, state = asked(other)
        assert (status, state["preset"], state["state"]) == (200, "relaxed", "ready")
        assert state["why"] == "restart edge-asr for mqtt.host"
        assert (server.daemon._config.drain_s, server.daemon._config.mqtt.host) == (1.0, "127.0.0.1")
        assert contents() == [True]

        want(mqtt__host="127.0.0.1", segment__content_endpointing=False)
        assert asked(other, "POST", "/admin/reload")[0] == 200
        assert asked(other)[1]["why"] == ""
        assert contents() == [False]
        want(http__token_file=tmp_path / "missing", segment__preset="aggressive")
        status, answer = asked(other, "POST", "/admin/reload")
        assert (status, answer["error"]["code"]) == (409, "refused")
        assert f"cannot read {tmp_path / 'missing'}" in answer["error"]["message"]
        assert asked(other)[1]["preset"] == "relaxed"
        assert "the configuration stays as it is: http.token_file" in caplog.text
        want(http__token_file=None, model=tmp_path / "elsewhere")
        assert asked(other, "POST", "/admin/reload")[0] == 409
        assert asked(other)[1]["preset"] == "relaxed", "all of it, or nothing"


def test_a_broken_configuration_is_told_once_whatever_changes_beside_it(
    tmp_path: Path, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reload, "POLL_S", 0.01)
    monkeypatch.setattr(reload, "QUIET_S", 0.05)
    model = put_model(tmp_path / "model")
    reads: list[Config] = []
    looks: list[Path] = []
    traces = EngineKeeper.traces

    def look(kept: EngineKeeper, folder: Path) -> Any:
        looks.append(folder)
        return traces(kept, folder)

    monkeypatch.setattr(EngineKeeper, "traces", look)

    def reread() -> Config:
        reads.append(server.daemon._config)
        if len(reads) == 1:
            raise ConfigError("nonsense: is no key")
        return reads[-1]

    with serving(reread=reread, state_dir=tmp_path / "state", model=model, engine=engine) as server:
        wait_for(lambda: server.service.ready, "the model")
        put_model(model, 灯="登")
        wait_for(lambda: "nonsense" in server.daemon.describe()["why"], "the state to say why")
        count = len(looks)
        wait_for(lambda: len(looks) > count + 20, "more looks than it takes to be left alone")
        assert len(reads) == 1
        assert caplog.text.count("the configuration stays as it is: nonsense") == 1
        put_model(model, 灯="登")
        wait_for(lambda: text_of(server) == OTHER, "the other model")


@pytest.mark.usefixtures("unwatched")
def test_a_renewed_certificate_is_shown_to_who_comes_next(
    tmp_path: Path, engine: dict[str, Any], certificates: Certificates
) -> None:
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"

    def put(name: str) -> str:
        made = certificates.authority.issue(name, ["localhost", "127.0.0.1"])
        shutil.copy(made.file, chain)
        shutil.copy(made.key, key)
        return made.file.read_text().strip()

    first = put("first")
    tls = {"cert_file": chain, "key_file": key}
    with serving(state_dir=tmp_path / "state", engine=engine, http={"tls": tls}) as server:
        wait_for(lambda: server.service.ready, "the model")

        def shown() -> str:
            return ssl.get_server_certificate(("127.0.0.1", server.port)).strip()

        assert shown() == first
        second = put("second")
        server.loop.call_soon_threadsafe(server.daemon.reload_soon)  # what SIGHUP does
        wait_for(lambda: shown() == second, "the new certificate")
        chain.write_text("nothing")
        server.loop.call_soon_threadsafe(server.daemon.reload_soon)
        wait_for(lambda: "no certificate and key" in server.daemon.describe()["why"], "the state to say why")
        assert shown() == second


def test_a_hangup_reads_the_file_anew(start: Start, broker: Mosquitto, tmp_path: Path, state_folder: Path) -> None:
    file = tmp_path / "config.yaml"
    settings = {
        "state_dir": str(tmp_path / "state"),
        "model": str(put_model(tmp_path / "model")),
        "engine": {"dir": str(engine_folder(read_bundle(BUNDLE), state_folder)), "threads": 1},
        "segment": {"preset": "default"},
        "log": {"level": "INFO"},
    }
    file.write_text(yaml.safe_dump(settings))
    program = ("-c", "import os; os.setsid(); from edge_asr import cli; cli.main()")
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--config", str(file), "--source", "stdin", program=program)
        subscriber.wait_for(is_ready, "ready")
        settings["segment"] = {"preset": "aggressive", "max_s": 20}
        settings["log"] = {"level": "DEBUG"}
        file.write_text(yaml.safe_dump(settings))
        daemon.process.send_signal(signal.SIGHUP)
        subscriber.wait_for(lambda s: s.on("state")[-1].json["preset"] == "aggressive", "the other preset")
        assert subscriber.on("state")[-1].json["why"] == "restart edge-asr for segment.max_s"
        daemon.hears(SENTENCES[0])  # which only the level DEBUG shows
        file.write_text("segment: {preset: hasty}\nnonsense: 1\n")
        daemon.process.send_signal(signal.SIGHUP)
        subscriber.wait_for(lambda s: "last reload failed" in s.on("state")[-1].json["why"], "the state to say why")
        why = subscriber.on("state")[-1].json["why"]
        assert "nonsense" in why
        assert "\n" not in why
        daemon.hears(SENTENCES[0])
        assert daemon.stop() == 0


class Load:
    """Clients that ask again and again until the `with` block ends, and what they were told."""

    def __init__(self, server: Serving, clients: int = 3) -> None:
        self.found: list[tuple[int, str]] = []
        self._server = server
        self._clients = clients
        self._ended = False

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self._clients)
        self._asking = [self._pool.submit(self._ask) for _ in range(self._clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for asking in self._asking:
            asking.result(PATIENCE_S)
        self._pool.shutdown()

    def _ask(self) -> None:
        while not self._ended:
            answer, found = ask(self._server, "POST", "/recognize", WAV, {"content-type": "audio/wav"})
            self.found.append((answer.status, found.get("text", "")))


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize(
    ("reloads", "broken"), [(4, 4), pytest.param(50, 20, marks=pytest.mark.slow)], ids=["a few", "many"]
)
def test_under_load_no_request_fails_whatever_is_loaded(
    reloads: int, broken: int, tmp_path: Path, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = put_model(tmp_path / "v1"), put_model(tmp_path / "v2", 灯="登")
    bad = put_model(tmp_path / "cut"), put_model(tmp_path / "lost")
    cut_graph(bad[0])
    lose_tokens(bad[1])
    link = tmp_path / "current"
    link.symlink_to(folders[0])

    def point(folder: Path) -> None:
        (tmp_path / "new").symlink_to(folder)
        (tmp_path / "new").rename(link)

    limits = {"requests_per_minute": 1_000_000}
    with serving(state_dir=tmp_path / "state", model=link, engine=engine, http={"limits": limits}) as server:
        wait_for(lambda: server.service.ready, "the model")
        with Load(server) as load:
            sizes_mb = []
            for number in range(1, reloads + 1):
                point(folders[number % 2])
                before = len(load.found)
                assert admin(server, "reload")[0] == 200
                wait_for(lambda: len(load.found) > before + 2, "answers in between")  # noqa: B023
                sizes_mb.append(read_process(os.getpid()).rss_bytes / 1e6)
            if reloads >= 50:  # at first each thread takes its share
                assert median(sizes_mb[-10:]) - median(sizes_mb[15:25]) < GROWTH_MB, sizes_mb
            assert {status for status, _ in load.found} == {200}
            assert {text for _, text in load.found} == {TEXT, OTHER}
            serves = server.daemon.describe()["model"]
            for number in range(broken):
                point(bad[number % 2])
                status, refused = admin(server, "reload")
                assert (status, refused["error"]["code"]) == (409, "refused")
                assert server.daemon.describe()["model"] == serves
                assert server.daemon.describe()["state"] == "ready"
            point(folders[0])
            monkeypatch.setattr(keeper, "available_bytes", lambda: 20_000_000)
            status, refused = admin(server, "reload")
            assert status == 409
            assert "there is no room for it beside onnx-fp32: it needs about" in refused["error"]["message"]
            assert "20 MB are free; restart edge-asr to use it" in refused["error"]["message"]
        assert {status for status, _ in load.found} == {200}
