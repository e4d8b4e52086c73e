"""Spellings of an answer: what is the same in all but looks, told without an algebra system."""

import re
import unicodedata
from fractions import Fraction

_SIGNS = str.maketrans(
    {"−": "-", "~": " ", "°": r"^\circ ", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty "}
)
_PI = re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])")
_MIXED = re.compile(r"(?<![\d.])(\d+) (\d+)/(\d+)(?![\d/])")
_ROOT = re.compile(r"(?:√|(?<![\\a-zA-Z])sqrt)\s?(?:\(([^()]+)\)|(\d+|[a-z]))")
_ONE_SIGN_FRACTION = re.compile("[¼-¾⅐-⅞]")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁻]+")
_DRESS = re.compile(r"\\(?:underline|(?:text)?color\s?\{[^{}]*\})\s?(?:\{([^{}]*)\})?")
_FONT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s?\{([^{}]*)\}")
_DISCARDED = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;:$]|\$|\\[()\[\]]")
_SPACED_SIGN = re.compile(r"\s*([^\w\s])\s*")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_INTEGER = re.compile(r"[+-]?\d{1,50}")
_DECIMAL = re.compile(r"[+-]?\d{0,50}\.\d{1,50}")
_FRACTION = re.compile(r"([+-]?)(?:\\frac\{(\d{1,50})\}\{(\d{1,50})\}|(\d{1,50})/(\d{1,50}))")


def is_same(gold: str, answer: str) -> bool | None:
    """Whether two answers are the same text or number; None where that takes more than a look."""
    gold, answer = _plain(gold), _plain(answer)
    if gold == answer:
        return True
    numbers = _number(gold), _number(answer)
    if None in numbers:
        return None
    if numbers[0] == numbers[1]:
        return True
    return False if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer) else None


def as_latex(answer: str) -> str:
    """An answer with the signs and colours of other spellings put into LaTeX's own."""
    answer = _ONE_SIGN_FRACTION.sub(lambda sign: r"\frac{{{}}}{{{}}}".format(*_compatible(sign[0]).split("⁄")), answer)
    answer = _SUPERSCRIPT.sub(lambda signs: f"^{{{_compatible(signs[0])}}}", answer)
    answer = _MIXED.sub(r"\1\\frac{\2}{\3}", answer)
    answer = _ROOT.sub(lambda root: f"\\sqrt{{{root[1] or root[2]}}}", answer)
    return _PI.sub(r"\\pi ", _DRESS.sub(r"\1", answer).translate(_SIGNS)).strip()


def _compatible(signs: str) -> str:
    return unicodedata.normalize("NFKC", signs)


def _plain(answer: str) -> str:
    """An answer without what changes its looks only."""
    answer = as_latex(answer).replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    answer = _DISCARDED.sub("", _FONT.sub(r"\1", answer)).strip().rstrip(" .")
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else _SPACED_SIGN.sub(r"\1", answer)


def _number(plain: str) -> Fraction | None:
    if _INTEGER.fullmatch(plain) or _DECIMAL.fullmatch(plain):
        return Fraction(plain)
    fraction = _FRACTION.fullmatch(plain)
    if not fraction:
        return None
    sign, *parts = fraction.groups()
    top, bottom = (int(part) for part in parts if part is not None)
    return Fraction(-top if sign == "-" else top, bottom) if bottom else None
