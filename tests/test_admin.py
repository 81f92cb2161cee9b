"""/admin: what the MQTT commands do, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled import write_wav
from mosquitto import wait_for
from speech_server import Serving, serving
from test_access import TOKEN
from test_rest import ask

from edge_asr.serve.access import hash_of
from edge_asr.types import SAMPLE_RATE


@pytest.fixture
def own(tmp_path: Path, state_folder: Path) -> Path:
    """Return a state folder of one's own, for mute and preset outlive a restart, with the engines that there are."""
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "engines").symlink_to(state_folder / "engines")
    return folder


@pytest.fixture
def server(tmp_path: Path, own: Path) -> Iterator[Serving]:
    """Serve with a source that says nothing, in push-to-talk mode."""
    silent = {"kind": "file", "path": write_wav(tmp_path / "silence.wav", np.zeros(600 * SAMPLE_RATE, np.float32))}
    with serving(state_dir=own, sources=[silent], listen={"mode": "push_to_talk"}) as one:
        wait_for(lambda: one.daemon.describe()["state"] == "ready", "the model")
        yield one


def post(server: Serving, command: str, content: Any = None, **headers: str) -> tuple[int, Any]:
    """Return the status and the answer."""
    body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
    answer, found = ask(server, "POST", f"/admin/{command}", body, headers)
    return answer.status, found


def test_the_controls_are_changed_and_told(server: Serving) -> None:
    def state() -> Any:
        return ask(server, "GET", "/admin/state")[1]

    assert (state()["mute"], state()["preset"], state()["device_id"]) == (False, "default", "hall")
    assert post(server, "preset", {"preset": "aggressive"}) == (200, {"preset": "aggressive"})
    assert post(server, "mute", {"mute": True}) == (200, {"mute": True})
    assert (state()["mute"], state()["preset"]) == (True, "aggressive")
    status, refused = post(server, "listen", {"seconds": 3})
    assert (status, refused["error"]["code"]) == (409, "refused")
    assert refused["error"]["message"].startswith("muted")
    assert post(server, "mute", {"mute": False}) == (200, {"mute": False})
    assert post(server, "listen", {"seconds": 3}) == (200, {"listen": "push_to_talk", "seconds": 3.0})
    assert post(server, "listen", b"") == (200, {"listen": "push_to_talk", "seconds": 8.0})
    assert post(server, "listen", {"seconds": 0}) == (200, {"listen": "push_to_talk", "seconds": 0.0})
    status, reloaded = post(server, "reload")
    assert (status, reloaded["model"]) == (200, "paraformer-tiny")


@pytest.mark.parametrize(
    ("command", "content", "status", "why"),
    [
        ("mute", b"", 400, "mute: Field required"),
        ("mute", {"mute": "yes"}, 400, "mute: Input should be a valid boolean"),
        ("mute", {"mute": True, "by": "me"}, 400, "by: Extra inputs are not permitted"),
        ("mute", b"{", 400, "Invalid JSON"),
        ("mute", b"[" * 4000, 400, "Invalid JSON"),
        ("mute", b" " * 5000, 413, "more than 4096 bytes"),
        ("preset", {"preset": "hasty"}, 409, "unknown preset hasty; known here: aggressive, default, relaxed"),
        ("listen", {"seconds": 1000}, 400, "seconds: Input should be less than or equal to 120"),
        ("listen", b'{"seconds": NaN}', 400, "seconds"),
        ("reload", {"model": "/etc"}, 400, "model: Extra inputs are not permitted"),
        ("explode", {}, 404, "no such address"),
    ],
)
def test_nonsense_is_refused_in_one_line(command: str, content: Any, status: int, why: str, server: Serving) -> None:
    answered, refused = post(server, command, content)
    assert answered == status
    assert why in refused["error"]["message"]
    assert not server.daemon.describe()["mute"]


def test_only_who_may_changes_anything(own: Path) -> None:
    mine = {"Authorization": f"Bearer {TOKEN}"}
    with serving(state_dir=own, http={"tokens": [hash_of(TOKEN)]}) as server:
        for headers in ({}, {"Authorization": "Bearer x"}):
            assert post(server, "mute", {"mute": True}, **headers)[0] == 401
            assert ask(server, "GET", "/admin/state", headers=headers)[0].status == 401
            assert ask(server, "GET", "/page/page.js", headers=headers)[0].status == 401
        assert post(server, "mute", {"mute": True}, Origin="http://evil.example", **mine)[0] == 403
        assert not server.daemon.describe()["mute"]
        assert post(server, "mute", {"mute": True}, **mine) == (200, {"mute": True})
        assert server.daemon.describe()["mute"]
        at_the_page, _ = ask(server, "GET", "/")
        assert (at_the_page.status, at_the_page.headers["location"]) == (303, "/login")


def test_a_page_of_another_site_changes_nothing(server: Serving) -> None:
    status, refused = post(server, "mute", {"mute": True}, Origin="http://evil.example")
    assert (status, refused["error"]["code"]) == (403, "bad_origin")
    assert not server.daemon.describe()["mute"]
