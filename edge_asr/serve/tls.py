"""Encryption of what the servers send: certificates are tried when the daemon starts, not with the first client."""

from __future__ import annotations

import ssl

from edge_asr.config_server import ServerTlsConfig
from edge_asr.errors import ConfigError


def server_context(section: str, tls: ServerTlsConfig) -> ssl.SSLContext | None:
    """Return what encrypts for a section of the configuration; None: nothing does. Raises ConfigError."""
    if tls.cert_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, section, tls)
    return context


def load_certificate(context: ssl.SSLContext, section: str, tls: ServerTlsConfig) -> None:
    """Have what encrypts use a certificate, which there must be, from the next connection on. Raises ConfigError."""
    assert tls.cert_file is not None
    key = tls.key_file or tls.cert_file
    asked = False

    def no_password() -> str:  # without an answer OpenSSL would ask on the terminal
        nonlocal asked
        asked = True
        return ""

    try:
        context.load_cert_chain(tls.cert_file, tls.key_file, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = f"the key in {key} does not belong to {tls.cert_file}; correct key_file or cert_file"
        elif asked:
            why = f"the key in {key} is encrypted; write it without a password, for its owner's eyes alone"
        else:
            why = f"{tls.cert_file} and {key} hold no certificate and key in PEM form; correct the paths"
        raise ConfigError(f"{section}.tls: {why}") from error
    except OSError as error:
        raise ConfigError(f"{section}.tls: {tls.cert_file} or {key} cannot be read: {error.strerror}") from error
