"""The structure of spoken commands to homes and machines, Mandarin and English: is one whole, or only begun? Pure.

A text is read as a row of words, each a letter for what it does in a command. What no list has may still belong to the
name of a thing: 打开小明房间的灯 is whole without anybody having listed it, 打开客厅 and 把空调 are not.
"""

from __future__ import annotations

import enum
import re


class Shape(enum.Enum):
    """What the structure of a text says; what is no command has none."""

    WHOLE = "whole"
    GROWING = "growing"
    """Whole, but its last number may grow, an object may follow, or it is easily misheard."""
    BEGUN = "begun"
    """Something that a command must have is missing."""


WORDS = {
    # wants an object, before or behind it
    "V": "打开 关闭 关掉 关上 开启 启动 重启 拉开 拉上 升起 放下 锁上 解锁 报告 汇报 查询 查看 检查 调低 "
    "调大 调小 调亮 调暗 升高 降低 提高 加大 减小 turn_on turn_off switch_on switch_off open close start "
    "restart lock unlock increase decrease raise lower dim mute report check",
    # the same; behind its object it is one consonant away from 调到
    "I": "调高",
    # may stand alone, though an object often follows
    "W": "停止 急停 紧急停止 播放 stop emergency_stop play",
    # needs nothing else
    "K": "暂停 继续 取消 确认 静音 返回 退出 上一首 下一首 上一个 下一个 上一页 下一页 pause resume continue "
    "cancel confirm next_song previous_song",
    # wants a value
    "S": "调到 调至 调成 调为 设置为 设置成 设置到 设定为 设为 设成 改成 改为 换成 切换到 升到 升高到 降到 "
    "降低到 to",
    # wants a value, or an object and a value
    "T": "设置 设定 set",
    # makes an object of what follows
    "B": "把 将",
    # makes a request of what follows
    "A": "请 请帮我 帮我 麻烦 给我 我要 我想 please",
    # places
    "P": "客厅 卧室 主卧 次卧 儿童房 厨房 书房 阳台 浴室 卫生间 洗手间 餐厅 走廊 玄关 车库 院子 花园 楼上 楼下 "
    "门口 办公室 会议室 教室 机房 车间 仓库 厂房 现场 living_room bedroom kitchen study balcony bathroom "
    "dining_room hall garage garden office workshop warehouse",
    # things, and quantities of them
    "D": "灯 台灯 吊灯 灯带 灯光 空调 电视 电视机 窗帘 窗户 风扇 风机 排风扇 热水器 加湿器 净化器 油烟机 冰箱 "
    "洗衣机 扫地机 音箱 音响 投影 投影仪 插座 电源 开关 门 大门 门锁 卷帘门 机器 设备 电机 马达 水泵 泵 "
    "阀门 传送带 输送带 产线 生产线 锅炉 压缩机 机床 机械臂 警报 收音机 音量 亮度 温度 湿度 风速 风量 "
    "色温 速度 转速 压力 频率 功率 电压 流量 液位 light lights lamp lamps tv television curtain curtains "
    "blinds window fan heater door machine motor pump valve conveyor line radio volume brightness "
    "temperature humidity speed pressure",
    # objects that nobody names first
    "O": "音乐 歌曲 新闻 广播 状态 进度 产量 闹钟 定时器 倒计时 提醒 music alarm timer status",
    # values without a number
    "M": "最大 最小 最高 最低 最亮 最暗 自动 制冷 制热 除湿 maximum minimum",
    # measures, and those of time, which make 设置二十分钟 want nothing or 闹钟
    "U": "度 摄氏度 % ° °_c 度半 档 挡 级 转 赫兹 伏 安 瓦 米 厘米 毫米 公斤 帕 degrees percent",
    "H": "分钟 小时 个小时 秒 秒钟 minutes minute hours hour seconds",
    "C": "百分之",
    # makes a name of a number
    "N": "号 楼 层 number",
    # stands before an object, or between its parts
    "X": "的 的那个 所有 全部 the a an my all of in",
    "Z": "今天 明天 现在",
    "G": "turn switch",
    "R": "on off",
    "E": "几点 几点了 几点钟 怎么样 怎么样了 多少度 吗 呢 what_time_is_it",
}  # fmt: skip
"""By letter, what commands are made of; `_` joins the words of one entry."""
_NUMERAL = re.compile(
    r"[〇零一二三四五六七八九十百千万亿两幺]|\d+|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|hundred"
)
_FULL_NUMBER = re.compile(r"[一二三四五六七八九]?十[一二三四五六七八九]|一?百|\d{2,}")
"""A percentage that cannot grow: 三十 and 三 can."""


def _lexicon() -> dict[tuple[str, ...], str]:
    entries = ((letter, entry) for letter, row in WORDS.items() for entry in row.split())
    return {tuple(entry.split("_") if entry.isascii() else entry.replace("_", "")): letter for letter, entry in entries}


_LEXICON = _lexicon()
_LONGEST = max(map(len, _LEXICON))

_NUMBER = "[nf]"
_WHERE = rf"(?:[PX]|{_NUMBER}N)*"
"""What may stand before a thing, all of it known."""
_THING = rf"(?:[PX?]|{_NUMBER}N){{0,8}}[DO]+(?:X[DO]+)*(?:N{_NUMBER})?"
_VALUE = rf"(?:{_NUMBER}U|M|Cf)"
_TARGET = rf"A*(?:B?{_THING}|T{_THING})?"
_SHAPES = (
    (
        Shape.WHOLE,
        rf"A*(?:[VIWK]{_THING}|B?{_THING}[VW]|G{_THING}R|WW|K)|{_TARGET}[ST]{_VALUE}|A*T{_NUMBER}HX*[DO]+|.*E",
    ),
    (Shape.GROWING, rf"{_TARGET}[ST]Cn|A*B?{_THING}I|A*W"),
    (
        Shape.BEGUN,
        rf"A*[VIG]{_WHERE}|A*[WK](?:[PX]|{_NUMBER}N)+|A*B{_WHERE}(?:{_THING})?|A*[PX]*[PD]|A*[GT]{_WHERE}[DO]+"
        rf"|{_TARGET}[ST]|[^?]*[PN]|Z",
    ),
)
_PATTERNS = tuple((shape, re.compile(pattern)) for shape, pattern in _SHAPES)


def shape_of(normal: str) -> Shape | None:
    """Judge a normalised text: words, Chinese ones by character, with one space between."""
    row = row_of(normal)
    return next((shape for shape, pattern in _PATTERNS if pattern.fullmatch(row)), None)


def row_of(normal: str) -> str:
    """Return the letters of a text's words, the longest that fit; a number is `n`, a full one `f`, the unknown `?`."""
    units = tuple(normal.split())
    row, at = "", 0
    while at < len(units):
        letter, length = _word(units, at)
        row += letter
        at += length
    return row


def _word(units: tuple[str, ...], at: int) -> tuple[str, int]:
    for length in range(min(_LONGEST, len(units) - at), 0, -1):
        if letter := _LEXICON.get(units[at : at + length]):
            return letter, length
    end = at
    while end < len(units) and (_NUMERAL.fullmatch(units[end]) or (units[end] == "点" and at < end < len(units) - 1)):
        end += 1
    if end == at:
        return "?", 1
    return "f" if _FULL_NUMBER.fullmatch("".join(units[at:end])) else "n", end - at
