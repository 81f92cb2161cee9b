"""`edge-asr token`: make a token for the HTTP server."""

from __future__ import annotations

import hashlib
import json
import secrets

RANDOM_BYTES = 32


def make(as_json: bool) -> None:
    """Print a new token and its hash. Nobody keeps the token but who reads it."""
    token = secrets.token_urlsafe(RANDOM_BYTES)
    kept = f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    if as_json:
        print(json.dumps({"token": token, "hash": kept}))
        return
    print(f"token  {token}")
    print(f"hash   {kept}")
    print("Give the token to the program that asks (Authorization: Bearer TOKEN); it is shown this once. Put the hash")
    print("into http.tokens of the configuration, or into a line of http.token_file, and restart edge-asr.")
