"""What may change while the appliance runs, what waits for a restart, and what becomes of the configuration."""

from __future__ import annotations

from typing import Any

import pytest
from bundled import BUNDLE

from edge_asr.config import Config
from edge_asr.config_changes import AT_RUN_TIME, SWITCHES, changes


def config(**sections: Any) -> Config:
    return Config.model_validate({"device_id": "hall", "model": BUNDLE, **sections})


def value(of: Any, key: str) -> Any:
    for name in key.split("."):
        of = getattr(of, name)
    return of


@pytest.mark.parametrize("key", [*AT_RUN_TIME, *SWITCHES])
def test_there_are_such_keys(key: str) -> None:
    assert value(config(), key) is not NotImplemented


def test_nothing_is_to_be_done_where_nothing_differs() -> None:
    done = changes(config(), config())
    assert (done.config, done.now, done.later) == (config(), (), ())


def test_what_may_change_does_and_the_rest_stays() -> None:
    wanted = config(
        gates={"min_confidence": 0.5},
        engine={"threads": 3},
        segment={"preset": "aggressive", "max_s": 10},
        mqtt={"host": "nas", "port": 1884},
        sources=[{"kind": "stdin"}],
        log={"level": "DEBUG"},
    )
    done = changes(config(), wanted)
    assert done.now == ("engine.threads", "segment.preset", "gates.min_confidence", "log.level")
    assert done.later == ("sources", "segment.max_s", "mqtt.host", "mqtt.port")
    assert done.config == config(
        gates={"min_confidence": 0.5}, engine={"threads": 3}, segment={"preset": "aggressive"}, log={"level": "DEBUG"}
    )
    assert changes(done.config, wanted).later == done.later, "it stays to be done"
    assert not changes(done.config, wanted).now


def test_a_certificate_may_be_another_but_encryption_begins_and_ends_with_a_restart(certificates: Any) -> None:
    plain = config(http={"enabled": True})
    one, other = (
        config(http={"enabled": True, "tls": {"cert_file": pair.file, "key_file": pair.key}})
        for pair in (certificates.server, certificates.client)
    )
    assert changes(one, other).now == ("http.tls.cert_file", "http.tls.key_file")
    assert changes(plain, one).later == ("http.tls.cert_file", "http.tls.key_file")
    assert changes(one, plain).later == ("http.tls.cert_file", "http.tls.key_file")
    assert not changes(plain, one).now
