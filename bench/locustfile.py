"""Clients of the REST interface, for a fleet's load tests with Locust; each knows what its recordings say.

    pip install -e .[bench,serve]
    locust -f bench/locustfile.py --host http://127.0.0.1:8080 --users 50 --spawn-rate 10 --run-time 5m --headless

The bundled model should be the one that answers; with another, set TEXTS=any. Where a token is needed: TOKEN=... .
Streams, and what the microphone makes of it, are `python -m bench.load`.
"""

from __future__ import annotations

import os
import random
from typing import ClassVar

from locust import FastHttpUser, between, task
from locust.contrib.fasthttp import ResponseContextManager

from bench.load import Sentence, bundled_sentences

BUSY = (429, 503)
"""Told to come back later, which is no failure of the server's."""
CHECKED = os.environ.get("TEXTS", "bundled") == "bundled"
TOKEN = os.environ.get("TOKEN")


class Client(FastHttpUser):
    """Asks for one recording after another, as people do."""

    wait_time = between(2, 6)
    recordings: ClassVar[list[tuple[Sentence, bytes]]] = [(sentence, sentence.wav) for sentence in bundled_sentences()]

    def on_start(self) -> None:
        """Say who asks."""
        self.headers = {"Authorization": f"Bearer {TOKEN}"} if TOKEN else {}

    @task(3)
    def recognize(self) -> None:
        """Send a file as the body of the request."""
        sentence, wav = random.choice(self.recordings)
        headers = {**self.headers, "Content-Type": "audio/wav"}
        with self.client.post("/recognize", data=wav, headers=headers, catch_response=True) as answer:
            self._check(answer, sentence)

    @task(1)
    def transcriptions(self) -> None:
        """Send a form as OpenAI's clients do."""
        sentence, wav = random.choice(self.recordings)
        form = {"files": {"file": ("a.wav", wav)}, "data": {"model": "whisper-1"}}
        with self.client.post("/v1/audio/transcriptions", headers=self.headers, catch_response=True, **form) as answer:
            self._check(answer, sentence)

    def _check(self, answer: ResponseContextManager, sentence: Sentence) -> None:
        if answer.status_code in BUSY:
            answer.success()
        elif answer.status_code != 200:
            answer.failure(f"{answer.status_code}: {answer.text}")
        elif CHECKED and answer.json()["text"] != sentence.text:
            answer.failure(f"{answer.json()['text']}, not {sentence.text}")
