"""What the bundled model must know: words with their readings, and a seeded generator of sentences.

A sentence is a sequence of words; its text is their characters, its reading tone-numbered pinyin. Readings are our own,
because espeak-ng's dictionary reads 调 as diao4 and 音乐 as yin1 le4.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

READINGS: dict[str, tuple[str, ...]] = {
    # actions
    "打开": ("da3 kai1",),
    "关闭": ("guan1 bi4",),
    "关掉": ("guan1 diao4",),
    "启动": ("qi3 dong4",),
    "停止": ("ting2 zhi3",),
    "急停": ("ji2 ting2",),
    # places
    "客厅": ("ke4 ting1",),
    "卧室": ("wo4 shi4",),
    "厨房": ("chu2 fang2",),
    "书房": ("shu1 fang2",),
    "阳台": ("yang2 tai2",),
    "浴室": ("yu4 shi4",),
    "车间": ("che1 jian1",),
    "仓库": ("cang1 ku4",),
    # things
    "灯": ("deng1",),
    "空调": ("kong1 tiao2",),
    "电视": ("dian4 shi4",),
    "窗帘": ("chuang1 lian2",),
    "风扇": ("feng1 shan4",),
    "热水器": ("re4 shui3 qi4",),
    "门": ("men2",),
    "机器": ("ji1 qi4", "ji1 qi5"),
    "电机": ("dian4 ji1",),
    "水泵": ("shui3 beng4",),
    "传送带": ("chuan2 song4 dai4",),
    # settings
    "把": ("ba3",),
    "调到": ("tiao2 dao4",),
    "调高": ("tiao2 gao1",),
    "调低": ("tiao2 di1",),
    "设置": ("she4 zhi4",),
    "设置为": ("she4 zhi4 wei2",),
    "设定": ("she4 ding4",),
    "度": ("du4",),
    "音量": ("yin1 liang4",),
    "亮度": ("liang4 du4",),
    "温度": ("wen1 du4",),
    "百分之": ("bai3 fen1 zhi1",),
    "分钟": ("fen1 zhong1",),
    "小时": ("xiao3 shi2",),
    "闹钟": ("nao4 zhong1",),
    # questions and controls
    "现在": ("xian4 zai4",),
    "几点": ("ji3 dian3",),
    "今天": ("jin1 tian1",),
    "天气": ("tian1 qi4",),
    "怎么样": ("zen3 me5 yang4",),
    "播放": ("bo1 fang4",),
    "音乐": ("yin1 yue4",),
    "下一首": ("xia4 yi4 shou3", "xia4 yi1 shou3"),
    "上一首": ("shang4 yi4 shou3", "shang4 yi1 shou3"),
    "暂停": ("zan4 ting2",),
    "继续": ("ji4 xu4",),
    "报告": ("bao4 gao4",),
    "状态": ("zhuang4 tai4",),
    "确认": ("que4 ren4",),
    "取消": ("qu3 xiao1",),
    "号": ("hao4",),
    "产线": ("chan3 xian4",),
    # digits; 幺 is how a one is read out in numbers, 两 how a two is counted
    "零": ("ling2",),
    "一": ("yi1",),
    "二": ("er4",),
    "三": ("san1",),
    "四": ("si4",),
    "五": ("wu3",),
    "六": ("liu4",),
    "七": ("qi1",),
    "八": ("ba1",),
    "九": ("jiu3",),
    "十": ("shi2",),
    "百": ("bai3",),
    "幺": ("yao1",),
    "两": ("liang3",),
}
PLACES = ("客厅", "卧室", "厨房", "书房", "阳台", "浴室", "车间", "仓库")
THINGS = ("灯", "空调", "电视", "窗帘", "风扇", "热水器", "门", "机器", "电机", "水泵", "传送带")
ACTIONS = ("打开", "关闭", "关掉", "启动", "停止", "急停")
DIGITS = "零一二三四五六七八九"
FIXED = (
    ("调高", "温度"), ("调低", "温度"), ("现在", "几点"), ("今天", "天气", "怎么样"), ("播放", "音乐"),
    ("停止", "播放"), ("下一首",), ("上一首",), ("暂停",), ("继续",), ("报告", "状态"), ("确认",), ("取消",), ("急停",),
)  # fmt: skip
TOKENS = ("<blank>", "<s>", "</s>", *sorted({c for word in READINGS for c in word}), "<unk>")
"""The vocabulary: FunASR's special tokens, our characters, `<unk>`."""

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words in order; the text is their characters."""

    words: Words
    kind: str

    @property
    def text(self) -> str:
        """The characters, without spaces."""
        return "".join(self.words)

    def reading(self, rng: random.Random) -> list[str]:
        """Tone-numbered pinyin, a string a word; where a word has several readings, one of them."""
        return [rng.choice(READINGS[word]) for word in self.words]

    @property
    def held_out(self) -> bool:
        """True for the tenth of all texts that is kept for evaluation (fixed phrases are always trained on)."""
        return self.words not in FIXED and zlib.crc32(self.text.encode()) % 10 == 0


def number(value: int) -> Words:
    """Return 0-999 as it is spoken: 25 is 二 十 五, 110 一 百 一 十, 105 一 百 零 五."""
    hundreds, rest = divmod(value, 100)
    tens, ones = divmod(rest, 10)
    words: list[str] = []
    if hundreds:
        words += [DIGITS[hundreds], "百"]
    if tens:
        words += [DIGITS[tens], "十"] if tens > 1 or hundreds else ["十"]
    elif hundreds and ones:
        words.append("零")
    if ones or value == 0:
        words.append(DIGITS[ones])
    return tuple(words)


def _switch(rng: random.Random) -> Words:
    place = (rng.choice(PLACES),) if rng.random() < 0.85 else ()
    return (rng.choice(ACTIONS), *place, rng.choice(THINGS))


def _air_conditioning(rng: random.Random) -> Words:
    place = (rng.choice(PLACES),) if rng.random() < 0.6 else ()
    what = (
        ("把", *place, rng.choice(("空调", "空调", "温度")))
        if rng.random() < 0.6
        else rng.choice(((), (), ("空调",), ("温度",)))
    )
    return (*what, rng.choice(("调到", "设置为", "设定", "设定")), *number(rng.randint(16, 35)), "度")


def _level(rng: random.Random) -> Words:
    what = rng.choice(("音量", "亮度", "温度"))
    if rng.random() < 0.3:
        return (what, rng.choice(("调高", "调低")))
    return (what, "调到", "百分之", *number(rng.randint(1, 99)))


def _timer(rng: random.Random) -> Words:
    value = rng.randint(1, 59)
    unit = rng.choice(("分钟", "小时"))
    words = ("两",) if value == 2 and rng.random() < 0.7 else number(value)
    return ("设置", *words, unit, *(("闹钟",) if rng.random() < 0.6 else ()))


def _numbered(rng: random.Random) -> Words:
    action = (rng.choice(ACTIONS),) if rng.random() < 0.5 else ()
    return (*action, *number(rng.randint(1, 12)), "号", rng.choice(("机器", "产线")))


def _number(rng: random.Random) -> Words:
    return number(rng.randint(0, 999))


def _digits(rng: random.Random) -> Words:
    length = 11 if rng.random() < 0.4 else rng.randint(1, 11)
    yao = rng.choice((0.0, 0.3, 1.0))
    digits = [rng.choice(DIGITS) for _ in range(length)]
    return tuple("幺" if digit == "一" and rng.random() < yao else digit for digit in digits)


def _fixed(rng: random.Random) -> Words:
    return rng.choice(FIXED)


def _random_words(rng: random.Random) -> Words:
    return tuple(rng.choice(tuple(READINGS)) for _ in range(rng.randint(1, 7)))


KINDS: dict[str, tuple[float, Callable[[random.Random], Words]]] = {
    "switch": (0.16, _switch),
    "air conditioning": (0.10, _air_conditioning),
    "level": (0.07, _level),
    "timer": (0.06, _timer),
    "numbered": (0.06, _numbered),
    "number": (0.05, _number),
    "digits": (0.18, _digits),
    "fixed": (0.07, _fixed),
    "random": (0.25, _random_words),
}
"""Share and generator of each kind of sentence."""


def sentence(rng: random.Random, kinds: Sequence[str] = tuple(KINDS), held_out: bool = False) -> Sentence:
    """Draw a sentence of the given kinds from the training (or the held-out) texts."""
    weights = [KINDS[kind][0] for kind in kinds]
    while True:
        kind = rng.choices(kinds, weights)[0]
        candidate = Sentence(KINDS[kind][1](rng), kind)
        if candidate.held_out == held_out:
            return candidate
