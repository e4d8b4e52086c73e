"""Final answers: where a text states one, and the cheap part of comparing two."""

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 1000
"""A longer final answer is none."""
_MAX_BOXES = 20
"""Boxes looked at, from the last one on."""
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_STATED = re.compile(r"(?:\banswer[\s*]{0,5}(?:is\b|:)|####)[\s:*]*([^\n]+)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_DISCARDED = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;:$]|\$|\\[()\[\]]")
_SPACED_SIGN = re.compile(r"\s*([^\w\s])\s*")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_INTEGER = re.compile(r"[+-]?\d{1,50}")
_DECIMAL = re.compile(r"[+-]?\d{0,50}\.\d{1,50}")
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,50})(?:\.\d{1,50})?(?!\d|\.\d|st\b|nd\b|rd\b|th\b)"
)
_FRACTION = re.compile(r"([+-]?)(?:\\frac\{(\d{1,50})\}\{(\d{1,50})\}|(\d{1,50})/(\d{1,50}))")


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{…} that is closed and not empty."""
    for start in list(_BOX.finditer(text))[: -_MAX_BOXES - 1 : -1]:
        content = _up_to_closing_brace(text, start.end()).strip()
        if content and len(content) <= MAX_ANSWER_CHARS:
            return content
    return None


def stated_answer(text: str) -> str | None:
    """What follows the last "answer is", "answer:" or ####, up to the end of its sentence or line."""
    for match in reversed(list(_STATED.finditer(text))):
        phrase = _SENTENCE_END.split(match[1], maxsplit=1)[0].strip(" \t*`.,;:")
        if any(character.isalnum() for character in phrase) and len(phrase) <= MAX_ANSWER_CHARS:
            return phrase
    return None


def last_number(text: str) -> str | None:
    """The last number in decimal digits, with a sign that touches it; "7-5" ends in 5, and "3/4" in 4."""
    numbers = _NUMBER.findall(text.replace("−", "-"))
    return numbers[-1].lstrip("+") if numbers else None


def gold_answer(text: str) -> str | None:
    r"""The final answer in a table: in \boxed{…}, or after ####, or a text of one line as it stands; else None."""
    answer = boxed_answer(text)
    if answer is None and "####" in text:
        answer = text.rpartition("####")[2].strip()
    if answer is None and "\n" not in text.strip():
        answer = text.strip()
    return answer if answer and len(answer) <= MAX_ANSWER_CHARS else None


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


def _up_to_closing_brace(text: str, start: int) -> str:
    """`text` from `start` to where its brace closes; empty where it never does."""
    depth = 1
    for position in range(start, min(len(text), start + 2 * MAX_ANSWER_CHARS)):
        if text[position - 1] == "\\" and text[position - 2] != "\\":
            continue  # \{ and \} are signs of their own
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return ""


def _plain(answer: str) -> str:
    """An answer without what changes its looks only."""
    answer = answer.replace("−", "-").replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    answer = _SPACED_SIGN.sub(r"\1", _DISCARDED.sub("", answer).strip().rstrip(" ."))
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def _number(plain: str) -> Fraction | None:
    if _INTEGER.fullmatch(plain) or _DECIMAL.fullmatch(plain):
        return Fraction(plain)
    fraction = _FRACTION.fullmatch(plain)
    if not fraction:
        return None
    sign, *parts = fraction.groups()
    top, bottom = (int(part) for part in parts if part is not None)
    return Fraction(-top if sign == "-" else top, bottom) if bottom else None
