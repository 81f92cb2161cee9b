"""TLS to the broker: what we trust and who we are, and its errors in words."""

from __future__ import annotations

import ssl
from pathlib import Path

from edge_asr.config_mqtt import MqttConfig, TlsConfig
from edge_asr.errors import ConfigError
from edge_asr.publish.reasons import Problem

NOT_YET_VALID, EXPIRED = 9, 10
WRONG_HOST = (62, 64)
"""OpenSSL's codes of what can be wrong with a certificate; most others mean that nobody we trust has signed it."""
OURS_REFUSED = (
    "CERTIFICATE_REQUIRED",
    "ALERT_BAD_CERTIFICATE",
    "ALERT_UNKNOWN_CA",
    "ALERT_CERTIFICATE",
    "ALERT_HANDSHAKE",
)
"""How a broker says that it wants another certificate of ours, or one at all."""

NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_EOF_WHILE_READING")


def make_context(config: TlsConfig) -> ssl.SSLContext:
    """Return what connects with TLS 1.2 or later, and to the right host only. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # ca_file may be the broker's own certificate
    if config.ca_file is None:
        context.load_default_certs()
    else:
        _trust(context, config.ca_file)
    if config.cert_file is not None:
        _identify(context, config, config.cert_file)
    return context


def _trust(context: ssl.SSLContext, file: Path) -> None:
    try:
        context.load_verify_locations(file)
    except ssl.SSLError as error:
        raise ConfigError(f"mqtt.tls.ca_file: {file} holds no certificate in PEM form; correct the path") from error
    except OSError as error:
        raise _unreadable("ca_file", file, error) from error


def _identify(context: ssl.SSLContext, config: TlsConfig, certificate: Path) -> None:
    """Load our certificate and its key."""
    asked = False

    def password() -> str:
        nonlocal asked
        asked = True
        return _read(config.key_password_file)

    key = config.key_file or certificate
    try:
        context.load_cert_chain(certificate, config.key_file, password)
    except ssl.SSLError as error:
        raise ConfigError(_why_not_loaded(error, config, certificate, key, asked)) from error
    except OSError as error:
        raise _unreadable("cert_file or key_file", f"{certificate} or {key}", error) from error


def _why_not_loaded(error: ssl.SSLError, config: TlsConfig, certificate: Path, key: Path, asked: bool) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"mqtt.tls: the key in {key} does not belong to {certificate}; correct key_file or cert_file"
    if asked and config.key_password_file is None:
        return f"mqtt.tls.key_password_file: the key in {key} is encrypted; name the file with its password"
    if asked:
        return f"mqtt.tls.key_password_file: its password does not open the key in {key}; correct it"
    return f"mqtt.tls.cert_file: {certificate} and {key} hold no certificate and key in PEM form; correct the paths"


def _read(file: Path | None) -> str:
    if file is None:
        return ""  # without an answer OpenSSL would ask on the terminal
    try:
        return file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable("key_password_file", file, error) from error


def _unreadable(key: str, what: Path | str, error: Exception) -> ConfigError:
    return ConfigError(f"mqtt.tls.{key}: cannot read {what}: {getattr(error, 'strerror', None) or error}")


def wrong_host(names: list[str], host: str) -> Problem:
    """Return what to say of a certificate that is valid for these hosts, and not for ours."""
    why = f"its certificate is valid for {', '.join(names) or 'no host'}, not for {host}"
    return Problem(why, "set mqtt.host to such a name, or give the broker another certificate", lasting=True)


def untrusted(error: ssl.SSLCertVerificationError) -> Problem:
    """Return what else is wrong with the broker's certificate."""
    if error.verify_code == EXPIRED:
        remedy = "renew it, or set this machine's clock if that is wrong"
        return Problem("its certificate has expired", remedy, lasting=True)
    if error.verify_code == NOT_YET_VALID:
        return Problem("its certificate is not valid yet", "set this machine's clock if that is wrong")
    why = f"its certificate is not trusted ({error.verify_message})"
    return Problem(why, "set mqtt.tls.ca_file to the certificate of whoever signed it", lasting=True)


def failed(error: ssl.SSLError, config: MqttConfig) -> Problem:
    """Return what an error of TLS means that is not about the broker's certificate."""
    reason = error.reason or ""
    if any(part in reason for part in OURS_REFUSED):
        return refused_us(config)
    if reason in NO_TLS or isinstance(error, ssl.SSLEOFError):
        return no_tls_there()
    if "PROTOCOL_VERSION" in reason or reason in ("UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW"):
        return Problem("it does not speak TLS 1.2 or later", "update the broker, or its settings", lasting=True)
    return Problem(f"TLS failed: {reason.replace('_', ' ').lower() or error}", "see the broker's log", lasting=True)


def refused_us(config: MqttConfig) -> Problem:
    """Return what to say where the broker does not accept our certificate, or the lack of one."""
    if config.tls.cert_file is None:
        remedy = "set mqtt.tls.cert_file and mqtt.tls.key_file"
        return Problem("it asks for a certificate of ours", remedy, lasting=True)
    remedy = "set mqtt.tls.cert_file to one that it trusts and that has not expired"
    return Problem("it does not accept our certificate", remedy, lasting=True)


def no_tls_there() -> Problem:
    """Return what to say where TLS finds no partner."""
    remedy = "set mqtt.port to its TLS port (as a rule 8883), or switch mqtt.tls off"
    return Problem("it does not speak TLS on this port", remedy, lasting=True)
