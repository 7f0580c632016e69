"""Read the unit behind a number: cm^2, square metres, 平方厘米, km/h, 千米/时, 元, 个苹果, (apples).

A unit is known when it measures (length, time, money, ...); then another one is another answer. What is counted, apples
or 个, tells nothing: the prompt decides that.
"""

import re

from common.rewards.notation import HAN

COUNTED = ""  # the unit of what is counted, and of a bare number

_NAMES = {
    name: names.split()[0]
    for names in (
        "nm nanometer nanometers nanometre nanometres 纳米", "mm millimeter millimeters millimetre millimetres 毫米",
        "cm centimeter centimeters centimetre centimetres 厘米 公分",
        "dm decimeter decimeters decimetre decimetres 分米",
        "m meter meters metre metres 米 公尺", "km kilometer kilometers kilometre kilometres kms 千米 公里",
        "inch inches in 英寸", "ft foot feet 英尺", "yd yard yards 码", "mile miles mi 英里", "里 华里",
        "mg milligram milligrams 毫克", "g gram grams 克", "kg kilogram kilograms kilo kilos kgs 千克 公斤",
        "t ton tons tonne tonnes 吨",
        "lb lbs pound pounds 磅", "oz ounce ounces 盎司", "jin 斤 市斤", "liang 两",
        "ms millisecond milliseconds 毫秒", "s second seconds sec secs 秒 秒钟", "min minute minutes mins 分钟",
        "h hour hours hr hrs 小时 时 个小时 钟头", "day days 天 日", "week weeks 周 星期 个星期",
        "month months 个月 月",
        "year years yr yrs 年", "dollar dollars bucks $ us$ usd 美元 美金 刀", "cent cents ¢ 美分",
        "euro euros € eur 欧元", "gbp £ 英镑",
        "yuan 元 块 块钱 圆 人民币 元人民币 rmb cny ¥", "jiao 角 毛", "fen 分钱", "yen 日元 jpy",
        "rupee rupees ₹ rs inr 卢比", "hkd hk$ 港元 港币", "won ₩ krw 韩元",
        "L l liter liters litre litres 升 公升", "mL ml milliliter milliliters millilitre millilitres 毫升",
        "gallon gallons gal 加仑",
        "quart quarts", "pint pints", "cup cups",
        "deg ^\\circ degree degrees 度 \\circ", "°C ^\\circc degrees-celsius celsius 摄氏度",
        "°F ^\\circf degrees-fahrenheit fahrenheit 华氏度",
        "rad radian radians 弧度", "K kelvin 开尔文", "N newton newtons 牛 牛顿", "J joule joules 焦 焦耳",
        "kJ kilojoules 千焦", "W watt watts 瓦 瓦特",
        "kW kilowatt kilowatts 千瓦", "V volt volts 伏 伏特", "A amp amps ampere amperes 安 安培",
        "ohm ohms ω \\omega 欧 欧姆", "Hz hertz 赫兹",
        "Pa pascal pascals 帕", "kPa kilopascals 千帕", "mol mole moles 摩尔", "cal calories", "kcal",
        "acre acres 英亩", "hectare hectares ha 公顷", "mu 亩",
        "mph", "byte bytes 字节", "MB", "GB", "%",
    )
    for name in names.split()
}  # fmt: skip
_FOLDED = {name.casefold(): unit for name, unit in reversed(_NAMES.items())}
_ATTACHED, _SPACED = "mgshL", "mgshLNJWVAK"  # letters that are units without LaTeX's \\text; others may be variables
_SPELLED: dict[str, str] = {
    "t": "tons", "l": "litres", "N": "newtons", "J": "joules", "W": "watts", "V": "volts", "A": "amperes",
    "K": "kelvin",     "C": "celsius", "F": "fahrenheit",
}  # fmt: skip
MONEY = {"dollar", "cent", "euro", "gbp", "yuan", "jiao", "fen", "yen", "rupee", "hkd", "won"}
CURRENCY = r"(?:US\$|HK\$|A\$|C\$|\$|€|£|¥|₹|₩|USD ?|RMB ?|CNY ?|EUR ?|人民币|Rs\.? ?)"
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "平方": 2, "cubic": 3, "cu": 3, "立方": 3}
_FACTOR = re.compile(
    r"(?:(?P<power>square|sq\.?|cubic|cu|平方|立方) ?)?(?P<name>[^\W\d_]+|\^?\\circ ?[CF]?|[$€£¥₹¢]|\\omega|US\$)\.?"
    r"(?: ?\^ ?\{?(?P<exponent>-?[1-4])\}?|(?P<digit>[23])(?!\d)| (?P<word>squared|cubed))?",
    re.IGNORECASE,
)
# Words behind a number that make another number of it, or leave it open.
_NO_UNIT = re.compile(
    r"\b(?:and|or|to|by|not|plus|minus|over|under|squared?d|cubed|half|dozen|hundred|thousand|million|billion"
    r"|trillion|pi|than|least|most"
    r"|about|if|when|where|is|are|was|but|except|mod|modulo|base|sin|cos|tan|log|ln|exp|sqrt|am|pm)\b"
    r"|\b[a-z]\b(?!/)"
)
_NO_UNIT_HAN = re.compile(
    "[或和与到至以多余几近约非无没错万亿千百十半点成折又加减乘除不再若当且]|左右|上下|分之|次方|次幂|根号|以上"
    "|以下|倍多|[零〇一二三四五六七八九]"
)

_COUNTER = re.compile(
    rf"(?:[个只本支名位条张把件辆头匹棵朵颗粒块片根份间座栋层套双组瓶杯盒袋箱枝幅架台艘盏人](?:[{HAN}]{{0,4}})|[次倍岁页号分种步])"
)
_BEHIND_A_UNIT = re.compile("[钱整长高宽深重远后前]")  # 5元钱, 3米长


def unit_of(text: str, spaced: bool = True) -> str | None:
    """The unit that `text`, all that follows a number, names: a known one, COUNTED, or None if it is no unit.

    `spaced`: whether a space or a LaTeX style sets it off from the number; without one a word is part of a formula.
    """
    inside = re.fullmatch(r"\((.*)\)", text.strip())
    text, spaced = (inside[1], True) if inside else (text.strip(), spaced)
    text = text.removesuffix(".").strip()
    if not text:
        return COUNTED
    if re.fullmatch("[a-zA-Z]", text):
        return _known(text) if text in (_SPACED if spaced else _ATTACHED) else None
    if (known := _known(text)) is not None:
        return known
    if re.fullmatch(rf"[{HAN}/() ]{{1,12}}(?:\([a-z ]+\))?", text) and re.search(f"[{HAN}]", text):
        if _NO_UNIT_HAN.search(text):
            return None
        return next(
            (_known(text[:end]) or COUNTED for end in (4, 3, 2, 1) if _BEHIND_A_UNIT.fullmatch(text[end:])), COUNTED
        )
    words = re.fullmatch(r"(?:[^\W\d_]{2}[^\d=<>+*/\\^_,;:]{0,40}|[a-z](?=/))(?:/ ?[a-z]+)?", text)
    if not spaced or words is None or _NO_UNIT.search(text.casefold()):
        return None
    first = text.split()[0]
    return _known(first) or COUNTED


def may_follow_a_numeral(text: str, unit: str) -> bool:
    """Whether `text` behind a numeral in characters counts: 三个苹果, 三米; 三角形 and 一次函数 are words."""
    return not text or unit != COUNTED or _COUNTER.fullmatch(text) is not None or not re.search(f"[{HAN}]", text)


def spelled(text: str) -> str:
    """A unit of one letter that LaTeX marks as text, in full."""
    return _SPELLED.get(text.strip(), text)


def conflict(gold: str, answer: str) -> bool:
    """Whether two units are different ones. Degrees may be of temperature, and money needs no `per`."""
    if not (gold and answer) or gold == answer:
        return False
    pair = {gold, answer}
    if pair in ({"deg", "°C"}, {"deg", "°F"}, {"gbp", "lb"}):
        return False
    first, second = gold.split("/")[0], answer.split("/")[0]
    return not (first == second and first in MONEY)


def _known(text: str) -> str | None:
    """The canonical name of a known unit, powers and quotients included; None for anything else."""
    text = re.sub(r"\bdegrees? (celsius|fahrenheit)\b", r"\1", text, flags=re.IGNORECASE)
    text = re.sub(r" per (?:an? )?| ?/ ?每? ?|每(?=.)", "/", text.strip())
    if text.startswith("/"):
        return None
    parts = []
    for part in text.split("/"):
        factors = []
        for piece in re.split(r" ?(?:\\cdot|\*) ?|(?<=[a-z]) (?=[a-z])(?<!square )(?<!cubic )(?<!sq )", part.strip()):
            found = _FACTOR.fullmatch(piece.strip())
            name = found and (
                _NAMES.get(found["name"].replace(" ", "")) or _FOLDED.get(found["name"].replace(" ", "").casefold())
            )
            if not found or not name:
                return None
            power = int(found["exponent"] or found["digit"] or {"squared": 2, "cubed": 3}.get(found["word"] or "", 1))
            power *= _POWERS.get((found["power"] or "").casefold(), 1)
            factors.append(name if power == 1 else f"{name}^{power}")
        parts.append("*".join(sorted(factors)))
    joined = "/".join(parts)
    return {"mph": "mile/h", "kmh": "km/h", "kph": "km/h"}.get(joined, joined)
