"""What a stream has to say to its client: finals in order, and of partials only the latest. Bounded."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

from edge_asr.types import Partial, Transcript

FINALS = 64
"""Transcripts that a client may be behind."""

Reply = Partial | Transcript


class Deltas:
    """What is new of a text that grows, segment after segment, for those who append it. Pure.

    What was told cannot be taken back: where a final text is another one than was thought, what follows goes on from
    as many characters as were told.
    """

    def __init__(self) -> None:
        self.said = ""
        """All that is settled."""
        self._told = 0
        """Characters of the present segment that were told before it was settled."""

    def grow(self, stable: str) -> str:
        """Return what is new in the beginning of a segment that will not change any more."""
        text = self._spaced(stable)
        delta = text[self._told :]
        self._told = max(self._told, len(text))
        return delta

    def settle(self, text: str) -> str:
        """Return what is new in the text of the segment, which is complete."""
        spaced = self._spaced(text)
        delta, self._told = spaced[self._told :], 0
        self.said += spaced
        return delta

    def replace(self, text: str) -> str:
        """Return the text of the segment for those who replace what they were told of it."""
        self._told = 0
        return self.settle(text)

    def _spaced(self, text: str) -> str:
        """Return a text with what parts it from what was said before: a space between Latin words."""
        apart = bool(self.said and text) and self.said[-1].isascii() and text[0].isascii()
        return f" {text}" if apart else text


class Replies:
    """Takes what a stream offers, until its client reads it; see TranscriptSink. For one event loop's thread."""

    def __init__(self) -> None:
        self._finals: deque[Transcript | None] = deque()
        self._partials: OrderedDict[str, Partial] = OrderedDict()
        self._news = asyncio.Event()
        self._ended = False
        self.overrun = False
        """The client is too far behind."""

    def offer(self, transcript: Transcript) -> None:
        """Take a final."""
        self._partials.pop(transcript.id, None)
        if len(self._finals) >= FINALS:
            self.overrun = True
        else:
            self._finals.append(transcript)
        self._news.set()

    def offer_partial(self, partial: Partial) -> None:
        """Take a partial; an earlier one of the same segment that nobody has read yet is forgotten."""
        self._partials[partial.id] = partial
        self._partials.move_to_end(partial.id)
        self._news.set()

    def end(self) -> None:
        """Say that nothing more comes."""
        self._ended = True
        self._news.set()

    def mark(self) -> None:
        """Let `next` return None once after what came before: an utterance has ended."""
        self._partials.clear()
        self._finals.append(None)
        self._news.set()

    async def next(self) -> Reply | None:
        """Return what is to be said next; None: nothing any more, for it has ended or `overrun`, or a mark."""
        while True:
            if self.overrun:
                return None
            if self._finals:
                return self._finals.popleft()
            if self._partials:
                return self._partials.popitem(last=False)[1]
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
