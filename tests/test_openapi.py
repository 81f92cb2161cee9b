"""What the OpenAPI document promises, held against the server: requests that it allows, and ones that it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from mosquitto import wait_for
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from speech_server import serving

LIMITS = {"requests_per_minute": 1_000_000, "header_s": 2.0, "body_s": 2.0}
UPLOADS = (("POST", "/recognize"), ("POST", "/v1/audio/transcriptions"))
CONTROLS = (("POST", "/admin/mute"), ("POST", "/admin/preset"), ("POST", "/admin/listen"))
CHANGES = (("POST", "/admin/reload"), ("POST", "/admin/rollback"))
OPERATIONS = (
    *UPLOADS,
    *CONTROLS,
    *CHANGES,
    ("GET", "/admin/state"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory, state_folder: Path) -> Iterator[Any]:
    own = tmp_path_factory.mktemp("state")  # mute and preset outlive a restart
    (own / "engines").symlink_to(state_folder / "engines")
    with serving(state_dir=own, http={"limits": LIMITS}) as server:
        wait_for(lambda: server.service.ready, "the model")
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def hold(document: Any, method: str, path: str, mode: GenerationMode, count: int) -> None:
    """Send so many made-up requests, and have what comes back checked against the document.

    But not that all of it is accepted: that a file is no audio, or that fields do not go together, it cannot say.
    """

    @given(document[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def send(case: Any) -> None:
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    send()


def test_all_is_documented(document: Any) -> None:
    found = {(method.upper(), path) for path, methods in document.raw_schema["paths"].items() for method in methods}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_is_allowed_is_answered_as_documented(document: Any, method: str, path: str) -> None:
    hold(document, method, path, GenerationMode("positive"), 20)


@pytest.mark.parametrize(("method", "path"), [*UPLOADS, *CONTROLS])
def test_what_is_not_allowed_is_refused_as_documented(document: Any, method: str, path: str) -> None:
    hold(document, method, path, GenerationMode("negative"), 20)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), UPLOADS)
@pytest.mark.parametrize("mode", GenerationMode)
def test_every_answer_is_as_documented_many_times(document: Any, method: str, path: str, mode: GenerationMode) -> None:
    hold(document, method, path, mode, 500)
