"""What a stream has to say to its client, in order: all finals, and of partials only the latest. Bounded."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from edge_asr.types import Partial, Transcript

BEHIND = 64
"""Replies that a client may be behind."""
WORD = re.compile(r"\s*(?:[!-~]+|\S)")
"""A Latin word or one other character, with the space before it."""

Reply = Partial | Transcript
Item = TypeVar("Item")


class Deltas:
    """What is new of a text that grows, segment after segment, for those who append it. Pure.

    What was told cannot be taken back: where a final text is another one than was thought, what follows goes on after
    as many words as were told, a Chinese character being one.
    """

    def __init__(self) -> None:
        self.said = ""
        """All that is settled."""
        self._told = ""
        """What of the present segment was told before it was settled."""

    def grow(self, stable: str) -> str:
        """Return what is new in the beginning of a segment that will not change any more."""
        text = self._spaced(stable)
        delta = _after(self._told, text)
        self._told += delta
        return delta

    def settle(self, text: str) -> str:
        """Return what is new in the text of the segment, which is complete."""
        spaced = self._spaced(text)
        delta, self._told = _after(self._told, spaced), ""
        self.said += spaced
        return delta

    def replace(self, text: str) -> str:
        """Return the text of the segment for those who replace what they were told of it."""
        self._told = ""
        return self.settle(text)

    def _spaced(self, text: str) -> str:
        """Return a text with what parts it from what was said before: a space between Latin words."""
        apart = bool(self.said and text) and self.said[-1].isascii() and text[0].isascii()
        return f" {text}" if apart else text


def _after(told: str, text: str) -> str:
    """Return what of a text comes after what was told of it."""
    if text.startswith(told):
        return text[len(told) :]
    return "".join(WORD.findall(text)[len(WORD.findall(told)) :])


class Outgoing(Generic[Item]):
    """What is to be told a client, in order, and of each key only the latest. For one event loop's thread."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, Item] = OrderedDict()
        self._news = asyncio.Event()
        self._ended = False
        self.overrun = False
        """The client is too far behind."""

    def put(self, key: Hashable, item: Item) -> None:
        """Take what is to be told; it takes the place of what waits under the same key."""
        if key in self._waiting or len(self._waiting) < BEHIND:
            self._waiting[key] = item
        else:
            self.overrun = True
            self._waiting.clear()
        self._news.set()

    def drop(self, key: Hashable) -> None:
        """Forget what waits under a key, if anything does."""
        self._waiting.pop(key, None)

    def end(self) -> None:
        """Say that nothing more comes."""
        self._ended = True
        self._news.set()

    async def next(self) -> Item | None:
        """Return what is to be told next; None: nothing any more, for it has ended or `overrun`."""
        while not (self.overrun or self._waiting or self._ended):
            self._news.clear()
            await self._news.wait()
        if self.overrun or not self._waiting:
            return None
        return self._waiting.popitem(last=False)[1]


class Replies(Outgoing[Reply | None]):
    """Takes what a stream offers, until its client reads it; see TranscriptSink. After a mark `next` returns None."""

    def offer(self, transcript: Transcript) -> None:
        """Take a final; partials of its segment that nobody has read yet are forgotten."""
        self.drop(transcript.id)
        self.put(object(), transcript)

    def offer_partial(self, partial: Partial) -> None:
        """Take a partial; an earlier one of the same segment that nobody has read yet is forgotten."""
        self.put(partial.id, partial)

    def mark(self) -> None:
        """Let `next` return None once after what came before: an utterance has ended."""
        self.put(object(), None)
