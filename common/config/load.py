"""Merges preset < file < override into one validated Config and remembers where each value came from."""

import difflib
import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError

from common.config.presets import PRESETS
from common.config.schema import Config
from common.errors import ConfigError, OperatorError

Key = tuple[str, str]
PRESET_KEY: Key = ("algorithm", "preset")


@dataclass(frozen=True)
class ResolvedConfig:
    """A validated configuration and the origin of every value in it."""

    config: Config
    origins: dict[Key, str]
    """(section, key) -> `preset NAME`, a file's path, `override`; a key not in it has its default."""

    def describe(self) -> list[str]:
        """One line per value: `section.key = value  # origin`."""
        return [
            f"{f'{section}.{key} = ' + ('unset' if value is None else to_toml(value)):<48} # "
            f"{self.origins.get((section, key), 'default')}"
            for section, keys in self.config.model_dump(mode="json").items()
            for key, value in keys.items()
        ]


def resolve_config(path: Path | None, overrides: Iterable[str] = ()) -> ResolvedConfig:
    """Read `path`, apply dotted `overrides`, validate. Raises ConfigError with one line per mistake."""
    merged: dict[Key, tuple[Any, str]] = {}
    from_file = _file_values(path) if path else {}
    from_overrides = _override_values(overrides)
    preset, preset_is_overridden = _chosen_preset(from_file, from_overrides)
    owned = {("algorithm", key): value for key, value in PRESETS.get(str(preset), {}).items()}
    merged |= {key: (value, f"preset {preset}") for key, value in owned.items()}
    for key, value in from_file.items():
        if not (preset_is_overridden and key in owned):
            merged[key] = (value, str(path))
    for key, value in from_overrides.items():
        before = merged.get(key, ({}, ""))[0]
        is_table = isinstance(value, dict) and isinstance(before, dict)
        merged[key] = ({**before, **value} if is_table else value, "override")  # pyright: ignore
    return ResolvedConfig(_validate(merged), {key: origin for key, (_, origin) in merged.items()})


def to_toml(value: Any) -> str:
    """A TOML literal of a plain value; None becomes an empty string, which TOML lacks a word for."""
    if isinstance(value, dict):
        entries = cast("dict[str, Any]", value).items()
        return "{ " + ", ".join(f"{to_toml(key)} = {to_toml(item)}" for key, item in entries) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(to_toml(item) for item in cast("list[Any]", value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps("" if value is None else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # JSON takes it as it stands, TOML does not


def to_toml_document(config: Config) -> str:
    """The whole configuration as a TOML file that `resolve_config` reads back to the same values."""
    lines: list[str] = []
    for section, keys in config.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {to_toml(value)}" for key, value in keys.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def _chosen_preset(from_file: dict[Key, Any], from_overrides: dict[Key, Any]) -> tuple[Any, bool]:
    """The preset in force, and whether an override named another one than the file did."""
    default: str = Config.model_fields["algorithm"].annotation.model_fields["preset"].default  # pyright: ignore
    in_file = from_file.get(PRESET_KEY, default)
    preset = from_overrides.get(PRESET_KEY, in_file)
    return preset, preset != in_file


def _file_values(path: Path) -> dict[Key, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OperatorError(f"{path}: cannot be read ({error.strerror}), expected a configuration file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not a TOML file: {error}"]) from error
    values: dict[Key, Any] = {}
    for section, keys in document.items():
        if not isinstance(keys, dict):
            raise ConfigError([f"{path}: {section}: got {keys!r} outside a section, expected [section] key = value"])
        values |= {(section, key): value for key, value in cast("dict[str, Any]", keys).items()}
    return values


def _override_values(overrides: Iterable[str]) -> dict[Key, Any]:
    values: dict[Key, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            raise ConfigError([f"override: got {override!r}, expected section.key=value"])
        option, nested, leaf = key.partition(".")
        value = _parse_override(section, key, text.strip())
        if nested and (section, option) == ("environment", "options"):
            before = values.get((section, option))
            values[section, option] = {**(before if isinstance(before, dict) else {}), leaf: value}
        else:
            values[section, key] = value
    return values


def _parse_override(section: str, key: str, text: str) -> Any:
    """A TOML literal, a number as Python writes it (.5), `unset`, or the bare text; text keys take it as it stands."""
    field = _section_fields(section).get(key)
    if field is not None and field.annotation is str:
        return text
    if field is not None and text == "unset" and type(None) in get_args(field.annotation):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _section_fields(section: str) -> dict[str, Any]:
    field = Config.model_fields.get(section)
    return cast("type[BaseModel]", field.annotation).model_fields if field else {}


def _validate(merged: dict[Key, tuple[Any, str]]) -> Config:
    document: dict[str, dict[str, Any]] = {}
    for (section, key), (value, origin) in merged.items():
        document.setdefault(section, {})[key] = value
        try:
            json.dumps(value)
        except TypeError:
            line = f"{origin}: {section}.{key}: got {value!s}, expected text, numbers, booleans and lists"
            raise ConfigError([line]) from None
    try:
        return Config.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        origins = {key: origin for key, (_, origin) in merged.items()}
        raise ConfigError([_error_line(cast("dict[str, Any]", one), origins) for one in error.errors()]) from None


def _error_line(error: dict[str, Any], origins: dict[Key, str]) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location[:2])
    if error["type"] == "value_error":
        return _rule_line(str(error["ctx"]["error"]), origins)
    origin = origins.get((location[0], location[1]), "") if len(location) > 1 else ""
    if not origin and location:
        origin = next((where for (section, _), where in origins.items() if section == location[0]), "")
    where = f"{origin}: " if origin else ""
    if error["type"] == "extra_forbidden":
        return f"{where}{name}: unknown key, expected {_suggestion(location)}"
    expected = (
        error["msg"].removeprefix("Input should be ").removeprefix("a valid ").removeprefix("String should have ")
    )
    return f"{where}{name}: got {json.dumps(error['input'])}, expected {expected}"


def _rule_line(text: str, origins: dict[Key, str]) -> str:
    """A rule between several keys names the one to change first: its origin goes before it."""
    section, _, key = text.partition(":")[0].partition(".")
    origin = origins.get((section, key))
    return f"{origin}: {text}" if origin else text


def _suggestion(location: list[str]) -> str:
    known = list(_section_fields(location[0])) if len(location) > 1 else list(Config.model_fields)
    close = difflib.get_close_matches(location[-1], known, n=1)
    return f"{'.'.join([*location[:-1], close[0]])}" if close else f"one of {', '.join(known)}"
