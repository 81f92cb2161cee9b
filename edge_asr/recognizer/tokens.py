"""Token ids -> readable text."""

from __future__ import annotations

from collections.abc import Sequence

SPECIAL_IDS = 3
"""`<blank>`, `<s>` and `</s>` are ids 0, 1 and 2 of every Paraformer; they are never text."""
CONTINUES = "@@"
"""Ends an English piece that the next token goes on with."""


def join(tokens: Sequence[str]) -> str:
    """Join tokens: Chinese characters without spaces, English words with one, pieces ending in `@@` to words."""
    text, glued = "", True
    for token in tokens:
        piece = token.removesuffix(CONTINUES)
        if not piece:
            continue
        latin = piece[0].isascii()
        if text and (not latin or not glued) and (latin or text[-1].isascii()):
            text += " "
        text += piece
        glued = token.endswith(CONTINUES)
    return text
