"""Whether a transcript begins with a wake phrase, however the recogniser spelled it: by sound, without tones.

Syllables are the same that fold to the same letters: zh is z, ch c, sh s; n and r are l; h is f; a final ng is n. A
character with several readings is any of them. Besides, in a phrase of four syllables or more one may be off: another
one with the same initial or the same final, one missing, or one too many between the others. What has neither in
common is no slip of the recogniser: 大爱同学 and 小学同学 are not 小爱同学.
"""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from types import ModuleType

from edge_asr.speech.completeness import normalize

MAY_BE_OFF = 4
"""Syllables or words of a phrase from which on one of them may be off."""
LONG_WORD = 5
"""Letters from which on an English word may have one wrong, missing or added."""
FILLERS = (
    *(tuple(filler) for filler in ("嗯", "啊", "呃", "额", "哎", "诶", "欸", "哦", "喂", "嘿", "那个")),
    *((filler,) for filler in ("hey", "uh", "um", "er", "hmm")),
)
MOST_FILLERS = 2
"""Fillers that are passed over before the phrase."""

_CONTINUES = "@@"
"""Ends an English piece that the next token goes on with."""
_FIRST, _LAST = 0x4E00, 0x9FFF
"""The characters whose readings are known, besides 〇: the basic block of Unicode."""
_INITIALS = ("zh", "ch", "sh", *"bpmfdtnlgkhjqxrzcsyw")
_SAME_INITIAL = {"zh": "z", "ch": "c", "sh": "s", "n": "l", "r": "l", "h": "f"}

Sounds = frozenset[tuple[str, str]]
"""Initial and final of each reading, folded."""


@dataclass(frozen=True, slots=True)
class _Unit:
    """A character or a word of a text."""

    text: str
    sounds: Sounds
    """None for a word of letters."""
    first: int
    """Token that it begins in."""
    last: int
    """Token that it ends in."""


@dataclass(frozen=True, slots=True, order=True)
class _State:
    """How far a phrase has been followed; of two ends the greater one is the better."""

    heard: int = 0
    """Units of the phrase that were there as they should be."""
    spare: int = 0
    """1: none has been off yet, and one may be."""
    at: int = 0
    """Unit of the phrase that is next."""


class WakePhrase:
    """Finds wake phrases at the beginning of transcripts. Immutable; for any thread."""

    def __init__(self, phrases: Sequence[str]) -> None:
        """`phrases` as people write them, Chinese, English or both; what has neither is no phrase."""
        self._phrases = tuple(units for phrase in phrases if (units := _units([phrase])))
        # What is looked at of a text, however long it is: fillers, the phrase, one too many, and what follows.
        self._reach = 2 * MOST_FILLERS + max(map(len, self._phrases), default=0) + 2

    def after(self, tokens: Sequence[str]) -> int | None:
        """Return how many tokens at the beginning are fillers and wake phrase; None: they do not begin with one."""
        units = _units(tokens, self._reach)
        ends = (
            (end, -skipped, skipped + length)
            for skipped in _beginnings(units)
            for phrase in self._phrases
            for end, length in _ends(units[skipped:], phrase)
        )
        *_, length = max(ends, default=(None,))
        if length is None:
            return None
        # Punctuation behind the phrase goes with it.
        return max(units[length - 1].last + 1, units[length].first) if length < len(units) else len(tokens)

    def may_follow(self, tokens: Sequence[str]) -> bool:
        """Tell whether a text that still grows at its end begins with a wake phrase, or may yet do so."""
        units = _units(tokens, self._reach)
        return self.after(tokens) is not None or any(
            _is_begun(units[skipped:], phrase) for skipped in _beginnings(units) for phrase in self._phrases
        )


def _beginnings(units: Sequence[_Unit]) -> Iterator[int]:
    """Yield where the phrase may begin: at once, and behind each filler."""
    texts = tuple(unit.text for unit in units)
    at = 0
    yield at
    for _ in range(MOST_FILLERS):
        filler = next((filler for filler in FILLERS if texts[at : at + len(filler)] == filler), None)
        if filler is None:
            return
        at += len(filler)
        yield at


def _follow(phrase: Sequence[_Unit], states: set[_State], unit: _Unit) -> set[_State]:
    """Return where a phrase can be after one more unit of the text."""
    found = set()
    for state in states:
        heard, spare, at = state.heard, state.spare, state.at
        if at == len(phrase):
            continue
        if _same(unit, phrase[at]):
            found.add(_State(heard + 1, spare, at + 1))
        if not spare:
            continue
        if _alike(unit, phrase[at]):
            found.add(_State(heard, 0, at + 1))
        if at + 1 < len(phrase) and _same(unit, phrase[at + 1]):
            found.add(_State(heard + 1, 0, at + 2))
        if at:
            found.add(_State(heard, 0, at))
    return found


def _start(phrase: Sequence[_Unit]) -> set[_State]:
    return {_State(spare=int(len(phrase) >= MAY_BE_OFF))}


def _ends(units: Sequence[_Unit], phrase: Sequence[_Unit]) -> Iterator[tuple[_State, int]]:
    """Yield each way in which the text begins with the phrase, and how many units of the text it takes."""
    states = _start(phrase)
    for length, unit in enumerate(units, 1):
        states = _follow(phrase, states, unit)
        for state in states:
            if state.at == len(phrase):
                yield state, length
            elif state.spare and state.at == len(phrase) - 1:  # the last one is missing
                yield _State(state.heard, 0, len(phrase)), length


def _is_begun(units: Sequence[_Unit], phrase: Sequence[_Unit]) -> bool:
    """Tell whether what follows the units may make them fillers and a phrase."""
    texts = tuple(unit.text for unit in units)
    if any(filler[: len(texts)] == texts for filler in FILLERS):
        return True
    states = _start(phrase)
    for unit in units[:-1]:
        states = _follow(phrase, states, unit)
    last = units[-1]
    # The last word may be half of the one that is being said.
    return any(state.at < len(phrase) for state in _follow(phrase, states, last)) or any(
        not last.sounds and state.at < len(phrase) and phrase[state.at].text.startswith(last.text) for state in states
    )


def _same(unit: _Unit, wanted: _Unit) -> bool:
    if unit.text == wanted.text or not unit.sounds.isdisjoint(wanted.sounds):
        return True
    return not (unit.sounds or wanted.sounds) and len(wanted.text) >= LONG_WORD and _one_edit(unit.text, wanted.text)


def _alike(unit: _Unit, wanted: _Unit) -> bool:
    """Tell whether two characters have an initial or a final in common."""
    return any(
        (initial and initial == other) or final == rest
        for initial, final in unit.sounds
        for other, rest in wanted.sounds
    )


def _one_edit(word: str, wanted: str) -> bool:
    """Tell whether one letter changed, added or left out makes two different words the same."""
    shorter, longer = sorted((word, wanted), key=len)
    same = next((k for k, letter in enumerate(shorter) if letter != longer[k]), len(shorter))
    return longer[same + 1 :] == shorter[same + len(shorter) + 1 - len(longer) :]


def _units(tokens: Sequence[str], most: int | None = None) -> list[_Unit]:
    """Return the characters and words of a text, pieces of words joined; at least `most` of them where it has them."""
    units: list[_Unit] = []
    number = 0
    while number < len(tokens) and (most is None or len(units) < most):
        first, text = number, tokens[number]
        while text.endswith(_CONTINUES) and number + 1 < len(tokens) and tokens[number + 1][:1].isascii():
            number += 1
            text = text.removesuffix(_CONTINUES) + tokens[number]
        words = normalize(text.removesuffix(_CONTINUES)).split()
        units += [_Unit(word, _sounds(word), first, number) for word in words]
        number += 1
    return units


def _sounds(word: str) -> Sounds:
    numbers, sounds = _readings()
    code = ord("零" if word == "〇" else word[0])
    return sounds[numbers[code - _FIRST]] if len(word) == 1 and _FIRST <= code <= _LAST else sounds[0]


@functools.cache
def _readings() -> tuple[array[int], tuple[Sounds, ...]]:
    """Return the number of each character's sounds, from 0x4E00 on, and the sounds by number; 0 is none.

    Two bytes a character: the table that it comes from takes a hundred times as much.
    """
    folded = functools.cache(_fold)
    numbers = array("H", bytes(2 * (_LAST + 1 - _FIRST)))
    known: dict[Sounds, int] = {frozenset(): 0}
    for code, readings in _pinyin().items():
        if _FIRST <= code <= _LAST:
            sounds = frozenset(folded(reading) for reading in readings.split(","))
            numbers[code - _FIRST] = known.setdefault(sounds, len(known))
    return numbers, tuple(known)


def _fold(reading: str) -> tuple[str, str]:
    """Return initial and final of a syllable with its tone mark: zhuāng is ("z", "uan")."""
    # The marks of the tones go, the dots of ü stay.
    plain = "".join(c for c in unicodedata.normalize("NFD", reading) if c == "\u0308" or not unicodedata.combining(c))
    initial = next((initial for initial in _INITIALS if plain.startswith(initial)), "")
    final = plain.removeprefix(initial)
    return _SAME_INITIAL.get(initial, initial), final[:-1] if final.endswith(("ang", "eng", "ing")) else final


def _pinyin() -> Mapping[int, str]:
    """Return the readings of each character, with commas between.

    Of the package pypinyin this one module is run, and not kept: the package itself loads 50 MB of phrases as well.
    """
    package = importlib.util.find_spec("pypinyin")
    assert package is not None  # one of our dependencies
    spec = PathFinder.find_spec("pinyin_dict", package.submodule_search_locations)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table: Mapping[int, str] = module.pinyin_dict
    return table
