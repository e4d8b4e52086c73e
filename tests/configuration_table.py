"""deploy/CONFIGURATION.md, every key of the configuration, from the schema: `python -m tests.configuration_table`."""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from common.config.load import to_toml
from common.config.presets import PRESETS
from common.config.schema import Config
from common.config.section import Section

PAGE = Path(__file__).parents[1] / "deploy" / "CONFIGURATION.md"
HEAD = """# All keys of the configuration

<!-- made by python -m tests.configuration_table -->

A configuration is a TOML file of these sections; `section.key=value` on a command line overrides it. Where the default
is "by preset", `algorithm.preset` sets it ([what each stands for](../README.md#choose-the-method)). `--check` prints
what a file and a command line come to, and where each value is from.
"""
WORDS = {
    bool: "`true`, `false`", int: "whole number", float: "number", str: "text",
    tuple: "list", list: "list", dict: "table",
}  # fmt: skip
OWNED = {("algorithm", key) for preset in PRESETS.values() for key in preset}


def values(annotation: Any) -> str:
    """What a key takes, in a few words; Literals and enumerations by their values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join("unset" if kind is NoneType else values(kind) for kind in arguments)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    return WORDS[origin or annotation]


def rows(section: str, keys: dict[str, FieldInfo]) -> Iterator[str]:
    for key, field in keys.items():
        default = field.get_default(call_default_factory=True)
        said = "by preset" if (section, key) in OWNED else "unset" if default is None else f"`{to_toml(default)}`"
        yield f"| `{key}` | {said} | {values(field.annotation)} | {field.description} |"


def page() -> str:
    """The whole page, in Markdown: a table for each section, in the order of the schema."""
    lines = [HEAD]
    for section, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section)
        lines += [f"## {section}\n", "| key | default | values | meaning |", "|---|---|---|---|"]
        lines += [*rows(section, field.annotation.model_fields), ""]
    return "\n".join(lines)


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
