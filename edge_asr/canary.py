"""What a new model must hear before it answers anybody, where nothing was said yet that it could be tried on."""

from __future__ import annotations

from typing import Protocol

from edge_asr.audio.decode import read
from edge_asr.catalogue import CATALOGUE
from edge_asr.errors import AudioError, EngineError
from edge_asr.recognizer.bundle import Bundle
from edge_asr.recognizer.paraformer import noise
from edge_asr.recognizer.self_test import count_same
from edge_asr.types import Recognition, Samples


class Recognizer(Protocol):
    """A model that is loaded."""

    def recognize(self, samples: Samples) -> Recognition:
        """Recognise `[n]` float32 samples at 16 kHz. Raises EngineError."""


def try_canary(bundle: Bundle, recognizer: Recognizer) -> None:
    """Let a model hear its own recording, where it is one of the catalogue and has it, else noise, which must not fail.

    Raises EngineError, also where less than half of the published text is heard.
    """
    entry = CATALOGUE.get(bundle.name)
    for golden in () if entry is None else entry.goldens[:1]:
        path = bundle.folder / golden.recording
        if path.is_file():
            _listen(recognizer, path.name, _sound(bundle, golden.recording), golden.text)
            return
    recognizer.recognize(noise())


def _sound(bundle: Bundle, recording: str) -> Samples:
    try:
        return read(bundle.folder / recording)
    except AudioError as error:
        raise EngineError(f"{error}; copy the bundle again") from error


def _listen(recognizer: Recognizer, name: str, sound: Samples, expected: str) -> None:
    text = recognizer.recognize(sound).text
    found, wanted = ("".join(one.split()) for one in (text, expected))
    if 2 * count_same(found, wanted) < max(len(found), len(wanted)):
        raise EngineError(f"the new model hears {text!r} in its own recording {name}, not {expected!r}")
