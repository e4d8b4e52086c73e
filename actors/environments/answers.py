"""Final answers: where a text states one."""

import re

from actors.environments.spelling import as_latex

MAX_ANSWER_CHARS = 1000
"""A longer final answer is none."""
_MAX_BOXES = 20
"""Boxes looked at, from the last one on."""
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_STATED = re.compile(
    r"""(?: \banswer (?:\s+(?:to|of|for)(?:\s+[^\s.:=]{1,50}){1,4})? [\s*]{0,5}
            (?:\b(?:is|would\ be|must\ be)\b|[:=]) [\s:*]*+
        | (?: \#{4} | ^[ \t#*]{0,9}(?:the\ )?(?:final\ )?answer[ \t*]{0,9}$ ) [\s:*]*+
          (?! \d+(?:[.):]|[ ]?[-–—]) [ \t]+ [^\W\d_]{2} )  # "2. Check" is a heading
          (?= [^\w\s]{0,5}\d | [^\w\s]{0,5}[$\\√π] | [a-z][ ]?[=+*/^] )
        ) (?= ( \\\[.{1,1000}?\\\] | \$\$.{1,1000}?\$\$ | [^\n]+ ) )""",
    re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
# Not inside {…}, where it belongs to a command, nor glued to a number, where it is its unit or a product.
_WORD = re.compile(
    r"""(?<![\\\w]) (?! (?:or|and|to)\b \W*(?:[a-z]\s?=)?\W*\d )
        ( [^\W\d_](?:[.'’]?[^\W\d_])++ | a(?=\s+\w) | (?<=\d\s)[A-Z](?!\w) )
        (?! \s*[+^=] | [^{}]*\} )""",
    re.VERBOSE,
)
_VALUE = re.compile(r"\d|\\[a-zA-Z]|\$\S")
_DENIALS = ("not", "never", "neither")
_MARK = re.compile(r"\\?\$|\\[()\[\]]|[€£¥]")
_ASIDE = re.compile(r"[(\[{][^)\]}]*$")
_CHAIN = re.compile(r"^(?:(?!,|\b(?:or|and)\b).)*(?<![<>!])=(?!.*=)", re.DOTALL)
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,50})(?:\.\d{1,50})?(?!\d|\.\d|st\b|nd\b|rd\b|th\b)"
)


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{…} that is closed and not empty."""
    for start in list(_BOX.finditer(text))[: -_MAX_BOXES - 1 : -1]:
        content = _up_to_closing_brace(text, start.end()).strip()
        if content and len(content) <= MAX_ANSWER_CHARS:
            return content
    return None


def stated_answer(text: str) -> str | None:
    """What follows the last "answer is", "answer:" or the like, up to the end of its sentence, line or display.

    Mathematics alone may follow #### or a heading "Final Answer": other headings state nothing.
    """
    for match in reversed(list(_STATED.finditer(text))):
        phrase = _SENTENCE_END.split(match[1], maxsplit=1)[0].lstrip(" \t*`,;:").rstrip(" \t*`.,;:")
        if any(character.isalnum() for character in phrase) and len(phrase) <= MAX_ANSWER_CHARS:
            return phrase
    return None


def leading_expression(phrase: str) -> str | None:
    """The first mathematics of a phrase, up to a word and after its equals signs; None where there is none, or a "not".

    "12 because there are 3 rows" is 12, "3*4 = 12" too, and "5 or 6" is both.
    """
    parts = _WORD.split(as_latex(phrase))
    runs, words = parts[::2], parts[1::2]
    first = next((number for number, run in enumerate(runs) if _VALUE.search(run)), None)
    if first is None or any(word.casefold() in _DENIALS for word in words[:first]):
        return None
    run = _CHAIN.sub("", _ASIDE.sub("", _MARK.sub(" ", runs[first])))
    return run.lstrip(' \n*`",;:≈').rstrip(' \n*`".,;:–—-+=/') or None


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
