"""Function calls as a policy writes them, `[name(key=value), …]`: read without running any, and compared by meaning.

This is ToolACE's notation. A function's name is any text before its parenthesis ("Market Trends API"), an argument's
any before its "=" ("from" too), a value is a Python literal; JSON's true, false and null are taken as well.
"""

import ast
import json
import math
import warnings
from collections.abc import Iterator

Value = bool | int | float | str | None | list["Value"] | dict[str, "Value"]

MAX_CHARS = 20_000
"""Of one text that is read; longer ones are no calls."""
MAX_DEPTH = 16
"""Of brackets within brackets."""
_OPENING = {"(": ")", "[": "]", "{": "}"}
_QUOTES = "\"'"
_JSON_NAMES = {"true": True, "false": False, "null": None}


def read_calls(text: str) -> tuple[str, ...] | None:
    """The calls that `text` is a list of, each in its one spelling, sorted; None where it is no such list.

    Calls are equal where these spellings are. The order of calls and of arguments says nothing, how often a call stands
    there does. 1 and 1.0 are the same value, a tuple is the list of its items; 1, "1" and true are three.
    """
    text = text.strip()
    if len(text) > MAX_CHARS or not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        calls = sorted(_spell(call) for call in _split(text[1:-1]))
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # all that Python's parser raises on hostile text
        return None
    return tuple(calls) or None


def _spell(call: str) -> str:
    """One call as JSON: the name and the arguments by key."""
    name, parenthesis, rest = call.strip().partition("(")
    if not (name.strip() and parenthesis and rest.endswith(")")) or set(name) & {*_QUOTES, *"[]{}),="}:
        raise ValueError("not a call")
    arguments: dict[str, Value] = {}
    for argument in _split(rest[:-1]):
        key, equals, value = argument.partition("=")
        if not (equals and key.strip()) or key.strip() in arguments or set(key) & {*_QUOTES, *"()[]{}"}:
            raise ValueError("not an argument by name, or one given twice")
        arguments[key.strip()] = _read_value(value)
    return json.dumps([name.strip(), arguments], ensure_ascii=False, sort_keys=True)


def _split(text: str) -> Iterator[str]:
    """What stands between the commas that are outside of quotes and brackets; a comma may end the list."""
    start, closing, quote, is_escaped = 0, list[str](), "", False
    for place, character in enumerate(text):
        if quote:
            if is_escaped or character == "\\":
                is_escaped = not is_escaped
            elif character == quote:
                quote = ""
        elif character in _QUOTES:
            quote = character
        elif character in _OPENING:
            closing.append(_OPENING[character])
            if len(closing) > MAX_DEPTH:
                raise ValueError("too deep")
        elif character in _OPENING.values():
            if not closing or closing.pop() != character:
                raise ValueError("brackets do not match")
        elif character == "," and not closing:
            yield text[start:place]
            start = place + 1
    if quote or closing:
        raise ValueError("not closed")
    if text[start:].strip():
        yield text[start:]


def _read_value(text: str) -> Value:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that Python does not know, and reads as they stand
        return _plain(ast.parse(text.strip(), mode="eval").body)


def _plain(node: ast.expr) -> Value:
    """The value that a literal stands for. Raises ValueError where it is none."""
    match node:
        case ast.Constant(value=bool() | str() | None as value):
            return value
        case ast.Constant(value=int() | float() as number):
            return _number(number)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return _number(-number)  # of True too, which Python takes for 1: nobody writes that
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_plain(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _plain(value) for key, value in zip(keys, values, strict=True)}
        case _:
            raise ValueError("not a literal")


def _number(number: int | float) -> int | float:
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError("not a number that JSON knows")
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _key(node: ast.expr | None) -> str:
    """JSON knows keys of text only: {1: 2} is {"1": 2}."""
    value = _plain(node) if node else None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("not a key")
    return str(value)
