"""Numbers in running text -> words, in eight languages.

num2words covers six of them; Hindi and Chinese are written out here. What a digit string means is
decided by its shape
alone: a clock time, a decimal, a percentage, an amount of money, a long or zero-led string read
    digit by digit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

LONGEST = 15  # digits; longer strings are read digit by digit
_NUM2WORDS = {"en": "en", "es": "es", "fr": "fr", "it": "it", "ja": "ja", "pt": "pt_BR"}
_POINT = {
    "en": "point",
    "es": "coma",
    "fr": "virgule",
    "hi": "दशमलव",
    "it": "virgola",
    "ja": "点",
    "pt": "vírgula",
    "zh": "点",
}
_MINUS = {
    "en": "minus",
    "es": "menos",
    "fr": "moins",
    "hi": "ऋण",
    "it": "meno",
    "ja": "マイナス",
    "pt": "menos",
    "zh": "负",
}
_SIGNS: dict[str, dict[str, str]] = {
    "en": {
        "%": "percent",
        "$": "dollars",
        "€": "euros",
        "£": "pounds",
        "¥": "yen",
        "₹": "rupees",
        "&": "and",
        "+": "plus",
        "=": "equals",
        "°": "degrees",
    },
    "es": {
        "%": "por ciento",
        "$": "dólares",
        "€": "euros",
        "£": "libras",
        "¥": "yenes",
        "₹": "rupias",
        "&": "y",
        "+": "más",
        "=": "igual a",
        "°": "grados",
    },
    "fr": {
        "%": "pour cent",
        "$": "dollars",
        "€": "euros",
        "£": "livres",
        "¥": "yens",
        "₹": "roupies",
        "&": "et",
        "+": "plus",
        "=": "égale",
        "°": "degrés",
    },
    "hi": {
        "%": "प्रतिशत",
        "$": "डॉलर",
        "€": "यूरो",
        "£": "पाउंड",
        "¥": "येन",
        "₹": "रुपये",
        "&": "और",
        "+": "धन",
        "=": "बराबर",
        "°": "डिग्री",
    },
    "it": {
        "%": "per cento",
        "$": "dollari",
        "€": "euro",
        "£": "sterline",
        "¥": "yen",
        "₹": "rupie",
        "&": "e",
        "+": "più",
        "=": "uguale",
        "°": "gradi",
    },
    "ja": {
        "%": "パーセント",
        "$": "ドル",
        "€": "ユーロ",
        "£": "ポンド",
        "¥": "円",
        "₹": "ルピー",
        "&": "アンド",
        "+": "プラス",
        "=": "イコール",
        "°": "度",
    },
    "pt": {
        "%": "por cento",
        "$": "dólares",
        "€": "euros",
        "£": "libras",
        "¥": "ienes",
        "₹": "rúpias",
        "&": "e",
        "+": "mais",
        "=": "igual a",
        "°": "graus",
    },
    "zh": {
        "%": "百分之",
        "$": "美元",
        "€": "欧元",
        "£": "英镑",
        "¥": "元",
        "₹": "卢比",
        "&": "和",
        "+": "加",
        "=": "等于",
        "°": "度",
    },
}
_MONEY = "$€£¥₹"
_HOURS = {"en": "", "es": "", "fr": "heures", "hi": "", "it": "", "ja": "時", "pt": "", "zh": "点"}
_MINUTES = {"ja": "分", "zh": "分"}
# Decimal comma and thousands point, or the other way round. A lone group of three digits after
# either mark is ambiguous and follows the language.
_COMMA_DECIMAL = frozenset(("es", "fr", "it", "pt"))

_HINDI_WORDS = (
    "शून्य एक दो तीन चार पाँच छह सात आठ नौ दस ग्यारह बारह तेरह चौदह पंद्रह सोलह सत्रह अठारह "
    "उन्नीस बीस इक्कीस बाईस तेईस "
    "चौबीस पच्चीस छब्बीस सत्ताईस अट्ठाईस उनतीस तीस इकतीस बत्तीस तैंतीस चौंतीस पैंतीस छत्तीस "
    "सैंतीस अड़तीस उनतालीस चालीस "
    "इकतालीस बयालीस तैंतालीस चौवालीस पैंतालीस छियालीस सैंतालीस अड़तालीस उनचास पचास इक्यावन बावन "
    "तिरेपन चौवन पचपन छप्पन "
    "सत्तावन अट्ठावन उनसठ साठ इकसठ बासठ तिरेसठ चौंसठ पैंसठ छियासठ सड़सठ अड़सठ उनहत्तर सत्तर "
    "इकहत्तर बहत्तर तिहत्तर चौहत्तर "
    "पचहत्तर छिहत्तर सतहत्तर अठहत्तर उन्यासी अस्सी इक्यासी बयासी तिरासी चौरासी पचासी छियासी "
    "सत्तासी अट्ठासी नवासी नब्बे "
    "इक्यानवे बानवे तिरानवे चौरानवे पचानवे छियानवे सत्तानवे अट्ठानवे निन्यानवे"
)
HINDI = _HINDI_WORDS.split()
_HINDI_STEPS = ((10**7, "करोड़"), (10**5, "लाख"), (10**3, "हज़ार"), (100, "सौ"))
_CHINESE = "零一二三四五六七八九"
_CHINESE_STEPS = ((10**8, "亿"), (10**4, "万"))

_NUMBER = re.compile(
    r"(?P<money>[$€£¥₹])?\s?(?P<minus>(?<![\w.])[-\u2212](?=[\d]))?"
    r"(?:(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?![\d:])|(?P<number>\d+(?:[.,\u00a0\u202f']\d{3})*(?:[.,]\d+)?|\d+))"
    r"(?P<ordinal>st|nd|rd|th)?(?P<sign>\s?[%$€£¥₹])?"
)


def spell_numbers(text: str, language: str) -> str:
    """Replace every number and sign by words of the language, with spaces around them where the
    language has spaces.
    """
    gap = "" if language in ("ja", "zh") else " "
    text = spell_money(spell_decades(text) if language == "en" else text, language)
    text = _NUMBER.sub(lambda m: gap + _spell(m, language) + gap, text)
    text = re.sub(
        r"\d", lambda m: gap + cardinal(int(m[0]), language) + gap, text
    )  # what is left, such as "3G"
    signs = _SIGNS[language]
    return re.sub(f"[{re.escape(''.join(signs))}]", lambda m: gap + signs[m[0]] + gap, text)


# What joins hundredths to the whole of an amount
_CENTS = {"en": "", "es": "con", "fr": "", "it": "e", "pt": "e"}
_COINS = re.compile(
    r"(R\$|[$€£])\s?(\d{1,9})([.,])(\d\d)(?!\d)|(\d{1,9})([.,])(\d\d)\s?([€£])(?!\w)"
)
_REAIS = {
    "en": "reais",
    "es": "reales",
    "fr": "réaux",
    "hi": "रियाल",
    "it": "real",
    "ja": "レアル",
    "pt": "reais",
    "zh": "雷亚尔",
}


def spell_money(text: str, language: str) -> str:
    """Amounts with hundredths as they are said ("four dollars fifty"), and the Brazilian real."""

    def coins(match: re.Match[str]) -> str:
        sign = match[1] or match[8]
        whole, cents = int(match[2] or match[5]), int(match[4] or match[7])
        name = _REAIS[language] if sign == "R$" else _SIGNS[language][sign]
        if not cents:
            return f" {cardinal(whole, language)} {name} "
        joint = _CENTS[language]
        words = (cardinal(whole, language), name, joint, cardinal(cents, language))
        return f" {' '.join(word for word in words if word)} "

    if language in _CENTS:
        text = _COINS.sub(coins, text)
    reais = _REAIS[language]
    gap = "" if language in ("ja", "zh") else " "
    return re.sub(r"R\$\s?(\d[\d.,]*\d|\d)", rf"\1{gap}{reais}", text)


# Halves, quarters and thirds in the order of `_FRACTION_SIGNS`, then what joins them to a whole.
_FRACTION_SIGNS = "½¼¾⅓⅔"
_FRACTIONS = {
    "en": ("a half", "a quarter", "three quarters", "a third", "two thirds", "and"),
    "es": ("medio", "un cuarto", "tres cuartos", "un tercio", "dos tercios", "y"),
    "fr": ("un demi", "un quart", "trois quarts", "un tiers", "deux tiers", "et"),
    "hi": ("आधा", "एक चौथाई", "तीन चौथाई", "एक तिहाई", "दो तिहाई", "और"),
    "it": ("mezzo", "un quarto", "tre quarti", "un terzo", "due terzi", "e"),
    "ja": ("二分の一", "四分の一", "四分の三", "三分の一", "三分の二", "と"),
    "pt": ("meio", "um quarto", "três quartos", "um terço", "dois terços", "e"),
    "zh": ("二分之一", "四分之一", "四分之三", "三分之一", "三分之二", "又"),
}
_TENS = [
    "tens",
    "twenties",
    "thirties",
    "forties",
    "fifties",
    "sixties",
    "seventies",
    "eighties",
    "nineties",
]
_DECADE = re.compile(r"\b(1[1-9]|20)([1-9])0'?s\b|(?<!\w)['’]?([2-9])0s\b")


def spell_fractions(text: str, language: str) -> str:
    """Fractions of one character in words: "½ cup" is half a cup, "2½" two and a half. To be done
    before compatible characters are unified, which makes 21⁄2 of the latter.
    """
    gap = "" if language in ("ja", "zh") else " "
    words = _FRACTIONS[language]

    def spoken(match: re.Match[str]) -> str:
        word = words[_FRACTION_SIGNS.index(match[2])]
        if match[1]:
            return f"{match[1]}{gap}{words[-1]}{gap}{word}{gap}"
        if language == "en" and match[2] == "½" and match[3]:
            return " half a "
        return f"{gap}{word}{gap}"

    return re.sub(rf"(\d*)\s?([{_FRACTION_SIGNS}])(\s(?=[a-z]))?", spoken, text)


def spell_decades(text: str) -> str:
    """English decades: "the 1990s" are the nineteen nineties."""

    def spoken(match: re.Match[str]) -> str:
        tens = _TENS[int(match[2] or match[3]) - 1]
        return f"{cardinal(int(match[1]), 'en')} {tens}" if match[1] else tens

    return _DECADE.sub(spoken, text)


def cardinal(number: int, language: str) -> str:
    """A whole number in words, 0 <= number < 10^15."""
    if language == "hi":
        return _hindi(number)
    return _chinese(number) if language == "zh" else _num2words(number, language)


def digits(text: str, language: str) -> str:
    """Digits one by one."""
    return ("" if language in ("ja", "zh") else " ").join(
        cardinal(int(c), language) for c in text if c.isdigit()
    )


def _spell(match: re.Match[str], language: str) -> str:
    gap = "" if language in ("ja", "zh") else " "
    sign = (match["money"] or match["sign"] or "").strip()
    signs = _SIGNS[language]
    if match["hour"]:
        words = _clock(int(match["hour"]), int(match["minute"]), language)
    elif (
        match["ordinal"]
        and language == "en"
        and match["number"].isdigit()
        and len(match["number"]) <= LONGEST
    ):
        words = _ordinal(int(match["number"]))
    else:
        words = _amount(match["number"], language, bool(sign) and sign in _MONEY) + (
            match["ordinal"] or ""
        )
    if match["minus"]:
        words = _MINUS[language] + gap + words
    if sign == "%" and language == "zh":
        return signs["%"] + words
    return words + gap + signs[sign] if sign else words


def _amount(text: str, language: str, money: bool) -> str:
    """A number with thousands marks and decimals as written in the language."""
    gap = "" if language in ("ja", "zh") else " "
    whole, fraction = split_decimal(text, language)
    if len(whole) > LONGEST or (len(whole) > 1 and whole[0] == "0"):
        words = digits(whole, language)
    else:
        words = cardinal(int(whole), language)
    if not fraction or (money and not fraction.strip("0")):
        return words
    return words + gap + _POINT[language] + gap + digits(fraction, language)


def split_decimal(text: str, language: str) -> tuple[str, str]:
    """Digits before and after the decimal mark; "1.234,5" and "1,234.5" are told apart by their
    marks.
    """
    stress_tones = [c for c in text if not c.isdigit()]
    tail = len(text) - 1 - max(text.rfind("."), text.rfind(","))
    decimal = "," if language in _COMMA_DECIMAL else "."
    is_decimal = (
        bool(stress_tones)
        and stress_tones[-1] in ".,"
        and stress_tones.count(stress_tones[-1]) == 1
        and (tail != 3 or len(set(stress_tones)) > 1 or (stress_tones[-1] == decimal))
    )
    if not is_decimal:
        return "".join(c for c in text if c.isdigit()), ""
    return "".join(c for c in text[:-tail] if c.isdigit()), text[-tail:]


def _clock(hour: int, minute: int, language: str) -> str:
    gap = "" if language in ("ja", "zh") else " "
    words = [cardinal(hour, language), _HOURS[language]]
    if language == "en" and 0 < minute < 10:
        words.append("o")
    if minute or language == "en":
        words += [cardinal(minute, language) if minute else "o'clock", _MINUTES.get(language, "")]
    elif not _HOURS[language]:
        words.append({"es": "en punto", "it": "in punto", "pt": "em ponto", "hi": "बजे"}[language])
    return gap.join(w for w in words if w)


def _hindi(number: int) -> str:
    words = []
    for size, name in _HINDI_STEPS:
        if number >= size:
            words += [_hindi(number // size), name]
            number %= size
    return " ".join([*words, HINDI[number]] if number or not words else words)


def _chinese(number: int) -> str:
    for size, name in _CHINESE_STEPS:
        if number >= size:
            rest = number % size
            gap = "零" if 0 < rest < size // 10 else ""
            return _chinese(number // size) + name + gap + (_chinese(rest) if rest else "")
    # zero: a place was left empty
    out = ""
    zero = False
    for place, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, number = divmod(number, place)
        if digit:
            count = "" if place == 10 and digit == 1 and not out else _CHINESE[digit]
            out += ("零" if zero else "") + count + name
        zero = not digit and (zero or (bool(out) and place > 1))
    return out or _CHINESE[0]


@cache
def _converter() -> Callable[..., str]:
    from num2words import num2words  # type: ignore[import-untyped]

    return num2words


def _num2words(number: int, language: str) -> str:
    return _converter()(number, lang=_NUM2WORDS[language]).replace("-", " ").replace(",", "")


def _ordinal(number: int) -> str:
    return _converter()(number, to="ordinal", lang="en").replace("-", " ").replace(",", "")
