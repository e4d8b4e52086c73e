"""What every command shares: `--config`, dotted overrides, `--check`, and errors as one line with exit code 2."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from common.config.load import ResolvedConfig, resolve_config
from common.errors import COMPONENT_FAILURE, OPERATOR_ERROR, ComponentFailure, OperatorError
from common.log_lines import LogFormat, last_line, log_format, log_what_python_says, make_formatter

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="Configuration file (TOML).")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that go before the file's.")
]
CheckOption = Annotated[
    bool, typer.Option("--check", help="Validate, print the resolved configuration with each value's origin, and stop.")
]


def new_command(help: str) -> typer.Typer:
    """A typer application with the house's settings."""
    return typer.Typer(help=help, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def resolve_or_check(path: Path | None, overrides: list[str] | None, *, check: bool) -> ResolvedConfig:
    """The resolved configuration; with `check`, prints it and ends the command."""
    resolved = resolve_config(path, overrides or ())
    if check:
        print("\n".join(resolved.describe()))
        raise typer.Exit(0)
    return resolved


def run_command(name: str, command: Callable[[], object]) -> NoReturn:
    """Run a typer application; an error becomes one line per mistake on stderr, and the exit code of its kind."""
    try:
        command()
    except (OperatorError, ComponentFailure) as error:
        code = OPERATOR_ERROR if isinstance(error, OperatorError) else COMPONENT_FAILURE
        try:
            print("\n".join(last_line(name, line) for line in str(error).splitlines()), file=sys.stderr, flush=True)
        except OSError:
            os._exit(code)  # the log's disk is full too; the interpreter would end with a code of its own
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def start_logging(name: str) -> None:
    """Lines on stderr, of the shape that CHORD_LOG_FORMAT asks for. CHORD_LOG_LEVEL sets what is worth one (info)."""
    level = os.environ.get("CHORD_LOG_LEVEL", "info").upper()
    if level not in logging.getLevelNamesMapping():
        raise OperatorError(f"CHORD_LOG_LEVEL: got {level.lower()!r}, expected debug, info, warning or error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(name))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if log_format() is LogFormat.JSON:
        log_what_python_says()
    for package in ("httpx", "httpx2", "huggingface_hub", "datasets"):  # they tell of every request
        logging.getLogger(package).setLevel(logging.WARNING)
    for package in ("actors", "common", "learner"):  # other people's debug lines are theirs
        logging.getLogger(package).setLevel(level)
