"""`edge-asr health`: ask the daemon of this machine whether it can recognise something, for containers."""

from __future__ import annotations

import http.client
import json
import ssl

from edge_asr.config_server import HttpConfig
from edge_asr.errors import ConfigError, EdgeAsrError

TIMEOUT_S = 5.0
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where the daemon listens on all addresses, this one is asked."""


def check(config: HttpConfig) -> str:
    """Return the state of the daemon that `config` describes, such as `ready`.

    Raises:
        ConfigError: It has no HTTP server, or one at any free port.
        EdgeAsrError: It does not answer, or cannot recognise anything yet.
    """
    if not config.enabled:
        raise ConfigError("http.enabled: false leaves nobody to ask; enable it, or run without a health check")
    if not config.port:
        raise ConfigError("http.port: 0 is any port; name one, or run without a health check")
    host = ANY_ADDRESS.get(config.host, config.host)
    status, state = _ask(host, config)
    if status != http.client.OK:
        raise EdgeAsrError(f"not ready: {state} (HTTP {status}); see the log, and `why` in its state")
    return state


def _ask(host: str, config: HttpConfig) -> tuple[int, str]:
    connection = _connection(host, config)
    try:
        connection.request("GET", "/readyz")
        with connection.getresponse() as answer:
            return answer.status, str(json.loads(answer.read(65_536))["state"])
    except (OSError, http.client.HTTPException) as error:
        raise EdgeAsrError(f"no answer from {host}:{config.port} ({error}); does edge-asr run?") from error
    except (ValueError, LookupError, TypeError) as error:
        raise EdgeAsrError(f"{host}:{config.port} is not edge-asr: another program has that port") from error
    finally:
        connection.close()


def _connection(host: str, config: HttpConfig) -> http.client.HTTPConnection:
    if config.tls.cert_file is None:
        return http.client.HTTPConnection(host, config.port, timeout=TIMEOUT_S)
    # It is ourselves that we ask, by an address that no certificate names.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, config.port, timeout=TIMEOUT_S, context=context)
