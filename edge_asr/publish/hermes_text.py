"""What was heard, in the words of Hermes: the payload of `textCaptured`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONTINUES = "@@"
"""Ends a piece of an English word that the next token goes on with."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asked for it, and is to recognise the answer."""

    session: str | None = None
    wakeword: str | None = None
    lang: str | None = None


NOBODY = Caller()


def text_captured(site: str, caller: Caller, heard: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the payload of what was heard: JSON objects of `said`, one after the other; none of them: an empty text.

    `seconds` is the wait after the last of them was spoken, `likelihood` that of the least likely. `asrTokens` has a
    list for each of them; ranges are offsets, in characters, into the whole text.
    """
    text, tokens = "", []
    for said in heard:
        text += (" " if text and (text[-1].isascii() or said["text"][:1].isascii()) else "") + said["text"]
        tokens.append(list(_words(said, len(text) - len(said["text"]))))
    return {
        "text": text,
        "likelihood": min((_number(said.get("confidence"), 1.0) for said in heard), default=0.0),
        "seconds": round(_number(heard[-1].get("latency_ms", {}).get("response"), 0.0) / 1e3, 5) if heard else 0.0,
        "siteId": site,
        "sessionId": caller.session,
        "wakewordId": caller.wakeword,
        "lang": caller.lang or (heard[-1].get("language") if heard else None),
        "asrTokens": tokens,
    }


def _words(said: Mapping[str, Any], offset: int) -> Iterator[dict[str, Any]]:
    """Yield a token for each Chinese character and each English word; what is not in the text has no place in it."""
    word: list[Mapping[str, Any]] = []
    begin = end = 0
    for token in said.get("tokens", ()):
        piece = token["text"].removesuffix(CONTINUES)
        at = said["text"].find(piece, end)
        if not piece or at < 0:
            continue
        if word and not (at == end and said["text"][at - 1 : at + 1].isascii()):
            yield _word(said["text"][begin:end], word, offset + begin)
            word = []
        if not word:
            begin = at
        word.append(token)
        end = at + len(piece)
    if word:
        yield _word(said["text"][begin:end], word, offset + begin)


def _word(value: str, pieces: Sequence[Mapping[str, Any]], begin: int) -> dict[str, Any]:
    start, end = pieces[0]["start_ms"], pieces[-1]["end_ms"]
    return {
        "value": value,
        "confidence": min(piece["confidence"] for piece in pieces),
        "rangeStart": begin,
        "rangeEnd": begin + len(value),
        "time": None if start is None or end is None else {"start": start / 1e3, "end": end / 1e3},
    }


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise
