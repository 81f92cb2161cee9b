"""Whether what was said before a pause is complete, judged by its text, and how long that pause may last: pure."""

from __future__ import annotations

import enum
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from edge_asr.speech.grammar import Shape, shape_of

COMPLETE_ENDPOINT = 8
"""Chunks after the last speech that end a complete phrase, where the preset is not shorter: 256 ms."""
GROWING_ENDPOINT = 14
"""Chunks after the last speech that are waited where more may come: 448 ms, as long as people pause inside."""
SURE = 0.6
"""What is thought complete is not believed where the least certain of its tokens has less confidence."""
OPEN_ENDPOINT = 31
"""Chunks after the last speech that are waited for the rest of what ends open: 992 ms."""

_HAN = "\u3007\u3400-\u9fff\uf900-\ufaff"
_UNIT = re.compile(rf"[{_HAN}%°]|[^\W_{_HAN}]+(?:'[^\W_{_HAN}]+)*")
"""A Chinese character, a sign that is a measure, or a word of letters and figures."""
_NUMERAL = re.compile(
    r"[〇零一二三四五六七八九十百千万亿两幺]|\d+"
    r"|(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand)"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
)


class Completeness(enum.Enum):
    """What a text says about whether its speaker goes on."""

    COMPLETE = "complete"
    GROWING = "growing"
    """Whole as it stands, and the beginning of something longer: 百分之三十 (五)."""
    OPEN = "open"
    UNKNOWN = "unknown"


def normalize(text: str) -> str:
    """Return the words of a text, Chinese ones by character, with one space between: no punctuation, no capitals."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("’", "'")
    return " ".join(_UNIT.findall(plain))


def _table(*endings: str) -> tuple[str, ...]:
    return tuple(f" {normalize(ending)}" for ending in endings)


OPEN_ENDINGS = _table(
    # what wants an object or a value
    "把", "将", "给", "从", "让", "请", "帮我", "第", "百分之", "调到", "调至", "调成", "调高到", "调低到",
    "设置", "设置为", "设置成", "设置到", "设定", "设定为", "设为", "设成", "改成", "改为", "换成", "切换到",
    "set", "turn", "increase", "decrease", "adjust", "the", "a", "an", "my", "to", "for", "from", "at",
    "of", "with", "please",
    # connectives
    "和", "跟", "与", "并", "并且", "而且", "或", "或者", "还有", "以及", "然后", "但是", "因为", "所以", "如果",
    "and", "or", "but", "then", "if", "because",
)  # fmt: skip
"""What a text that goes on may end with. Not here: what also ends an answer, such as 的 (好的) and 对."""
OPEN_ALONE = _table("打开", "关闭", "关掉", "启动", "turn on", "turn off", "switch on", "switch off", "open", "close")
"""Verbs that want an object where nothing stands before them: 打开 does, 把灯打开 does not."""
MEASURED_AHEAD = _table("百分之", "星期", "礼拜", "周")
"""What makes a number whole without a measure behind it."""


def completeness(text: str, phrases: Iterable[str] = ()) -> Completeness:
    """Judge a text. `phrases` are normalised: what is known to be complete as it stands.

    * COMPLETE: one of the phrases, or a whole command by its structure (打开客厅灯, 把空调调到二十六度; `grammar.py`).
    * GROWING: a phrase that another one begins with (打开客厅灯, 打开客厅灯带), or a command to which more may belong
      (停止, 音量调到百分之三十).
    * OPEN: the beginning of a phrase that is no phrase itself; else a text with an open ending (调到, `set the`), a
      verb alone that wants an object, a command that lacks something (把卧室空调, 打开客厅), or a number without a
      measure (二十 may become 二十六).
    * UNKNOWN: everything else, and no text at all.
    """
    normal = normalize(text)
    if not normal:
        return Completeness.UNKNOWN
    begun = [phrase for phrase in phrases if phrase.startswith(normal)]
    if normal in begun:
        return Completeness.COMPLETE if set(begun) == {normal} else Completeness.GROWING
    if begun:
        return Completeness.OPEN
    if (shape := shape_of(normal)) in _BY_SHAPE:
        return _BY_SHAPE[shape]
    if f" {normal}".endswith(OPEN_ENDINGS) or f" {normal}" in OPEN_ALONE or _ends_in_number(normal):
        return Completeness.OPEN
    return Completeness.UNKNOWN


_BY_SHAPE = {
    Shape.WHOLE: Completeness.COMPLETE,
    Shape.GROWING: Completeness.GROWING,
    Shape.BEGUN: Completeness.OPEN,
}


def _ends_in_number(normal: str) -> bool:
    """Tell whether a text ends in a number that has no measure, neither behind nor ahead."""
    words = normal.split(" ")
    number = len(words)
    while number and _NUMERAL.fullmatch(words[number - 1]):
        number -= 1
    return number < len(words) and not " ".join(["", *words[:number]]).endswith(MEASURED_AHEAD)


@dataclass(frozen=True, slots=True)
class ContentEndpoint:
    """How many chunks a pause may last, by the text before it."""

    preset: int
    """Chunks where the text tells nothing."""
    phrases: frozenset[str] = frozenset()
    """Normalised."""

    def chunks(self, text: str, confidence: float = 1.0) -> int:
        """Return the chunks after the last speech that end the segment: only what may go on waits past the preset.

        `confidence`: of the least certain token. A word misheard makes a whole of what is none (二十六 of 二十度).
        """
        match completeness(text, self.phrases):
            case Completeness.COMPLETE if confidence >= SURE:
                return min(self.preset, COMPLETE_ENDPOINT)
            case Completeness.COMPLETE | Completeness.GROWING:
                return max(self.preset, GROWING_ENDPOINT)
            case Completeness.OPEN:
                return max(self.preset, OPEN_ENDPOINT)
            case Completeness.UNKNOWN:
                return self.preset
