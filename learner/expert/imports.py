"""`chord-expert import`: adds expert rows to the store, from files, tables, families and the paper's datasets."""

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from common.command import CheckOption, ConfigOption, OverridesArgument, new_command, resolve_or_check, start_logging
from common.config.schema import Config
from common.errors import OperatorError
from common.hub import EXPECTED_SOURCE
from common.tables import read_table, refuse_split
from learner.expert import openr1, toolace
from learner.expert.importing import (
    USUAL_COLUMNS,
    BadRow,
    DemonstrationColumns,
    HeldOutRow,
    PromptForm,
    Response,
    Screen,
    read_jsonl,
    read_reasoning_gym,
    read_tables,
)
from learner.expert.selection import Asked, Funnel, Selection, shortfalls
from learner.expert.store import ExpertStore, NewRow, store_path

Row = TypeVar("Row")

PROGRESS_EVERY_S = 2.0
_OVERRIDE = re.compile(r"\w+\.[\w.]+=")
"""What tells an override from a file; a file of such a name is given as ./NAME."""

import_app = new_command("Add expert rows to the store; rows that it holds already are counted and left out.")

FilesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE... [SECTION.KEY=VALUE]...",
        help="JSON lines with messages, or with prompt and response; then values that go before the file's.",
    ),
]
SourcesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE... [SECTION.KEY=VALUE]...",
        help="A .jsonl or .parquet file, a folder of .parquet files, or a dataset id owner/name[:config]; then values.",
    ),
]
SourceArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SOURCE] [SECTION.KEY=VALUE]...",
        help="The published dataset, or a .jsonl or .parquet copy of it; then values that go before the file's.",
    ),
]
SplitOption = Annotated[str, typer.Option(help="Of the source.")]
PromptsOption = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE.jsonl", help="Replaced; else environment.options.source.")
]
NumHeldOutOption = Annotated[
    int, typer.Option(min=0, help="Problems that are written beside the prompts, for evaluation alone.")
]
ColumnOption = Annotated[str, typer.Option(help="Of the table; without it, the usual names.")]
SkipOption = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave bad rows out instead of stopping at them.")]


@import_app.callback()
def begin_import() -> None:
    """Datasets that are fetched are told of in the log."""
    start_logging("chord-expert")


@import_app.command("jsonl")
def import_jsonl(
    arguments: FilesArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
    skip_bad_rows: SkipOption = False,
    system_prompt: Annotated[str, typer.Option(help="Goes before each prompt; messages are left as they are.")] = "",
) -> None:
    """Import files of JSON lines."""
    files, overrides = _apart(arguments)
    resolved, paths = resolve_or_check(config, overrides, check=check), [Path(file) for file in files]
    if not paths:
        raise OperatorError("FILE: got none, expected at least one file of JSON lines")
    for path in paths:
        if not path.exists():
            raise OperatorError(f"{path}: got no such file, expected a file of JSON lines")
    _import(resolved.config, read_jsonl(paths, system_prompt=system_prompt), skip_bad_rows=skip_bad_rows)


@import_app.command("table")
def import_table(
    arguments: SourcesArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
    skip_bad_rows: SkipOption = False,
    split: Annotated[str, typer.Option(help="Of datasets.")] = "train",
    prompt_column: ColumnOption = "",
    response_column: ColumnOption = "",
    messages_column: ColumnOption = "",
    system_prompt: Annotated[str, typer.Option(help="Goes before each prompt; messages are left as they are.")] = "",
    prompt_template: Annotated[
        str | None,
        typer.Option(help="The prompt stands in place of {question}; with --leave-out-held-out, in messages too."),
    ] = None,
    leave_out_held_out: Annotated[
        bool, typer.Option("--leave-out-held-out", help="Leave out questions that environments hold out by their hash.")
    ] = False,
) -> None:
    """Import tables with messages, or with prompt and response: JSON lines, Parquet, or datasets of the hub."""
    sources, overrides = _apart(arguments)
    resolved = resolve_or_check(config, overrides, check=check)
    if not sources:
        raise OperatorError(f"SOURCE: got none, expected at least one: {EXPECTED_SOURCE}")
    for source in sources if split != "train" else ():
        refuse_split(source, split, name="--split")
    options = resolved.config.environment.options
    for key in ("held_out_source", "held_out_split") if leave_out_held_out else ():
        if options.get(key):
            got = f'--leave-out-held-out: got environment.options.{key} "{options[key]}"'
            raise OperatorError(f"{got}, expected questions that are held out by their hash")
    rows = read_tables(
        sources,
        split=split,
        columns=_columns(prompt_column, response_column, messages_column),
        form=PromptForm(system_prompt, prompt_template),
        leave_out_held_out=leave_out_held_out,
    )
    _import(resolved.config, rows, skip_bad_rows=skip_bad_rows, leave_out_held_out=leave_out_held_out)


@import_app.command("reasoning_gym")
def import_reasoning_gym(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
    num_rows: Annotated[int, typer.Option(min=1, help="Distinct training questions to take.")] = 1000,
    response: Annotated[Response, typer.Option(help="The family's answer or its worked solution.")] = Response.ANSWER,
    skip_bad_rows: SkipOption = False,
) -> None:
    """Import solved training problems of the run's environment; it shares no question with held-out ones."""
    resolved = resolve_or_check(config, overrides, check=check)
    rows = read_reasoning_gym(resolved.config, num_rows=num_rows, response=response)
    _import(resolved.config, rows, skip_bad_rows=skip_bad_rows, num_asked=num_rows)


@import_app.command("openr1-math")
def import_openr1_math(
    arguments: SourceArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
    split: SplitOption = "train",
    num_rows: Annotated[int, typer.Option(min=0, help="Expert rows to take.")] = 5000,
    num_prompts: Annotated[int, typer.Option(min=0, help="Prompts to take.")] = 20000,
    num_held_out: NumHeldOutOption = 512,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an expert's answer, by the model's tokenizer.")] = 8196,
    prompts: PromptsOption = None,
) -> None:
    """Import the selection of CHORD's maths run: DeepSeek-R1's answers as expert rows, other problems as prompts."""
    source, overrides = _source_of(arguments, openr1.SOURCE)
    resolved = resolve_or_check(config, overrides, check=check).config
    file, asked = _prompts_file(resolved, prompts, source), Asked(num_rows, num_prompts, num_held_out)
    rows = partial(read_table, source, split=split)
    selection, funnel = openr1.choose(resolved, lambda: _with_progress(rows()), asked=asked, max_tokens=max_tokens)
    _report(selection, funnel, asked, file)
    _import(resolved, openr1.expert_rows(resolved, rows, selection), skip_bad_rows=False)


@import_app.command("toolace")
def import_toolace(
    arguments: SourceArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
    split: SplitOption = "train",
    num_rows: Annotated[int, typer.Option(min=0, help="Expert rows to take.")] = 500,
    num_prompts: Annotated[int, typer.Option(min=0, help="Prompts to take.")] = 5000,
    num_held_out: NumHeldOutOption = 512,
    prompts: PromptsOption = None,
) -> None:
    """Import the selection of CHORD's tools run: ToolACE's own answers as expert rows, other questions as prompts."""
    source, overrides = _source_of(arguments, toolace.SOURCE)
    resolved = resolve_or_check(config, overrides, check=check).config
    file, asked = _prompts_file(resolved, prompts, source), Asked(num_rows, num_prompts, num_held_out)
    selection, funnel = toolace.choose(resolved, _with_progress(read_table(source, split=split)), asked=asked)
    _report(selection, funnel, asked, file)
    _import(resolved, toolace.expert_rows(selection), skip_bad_rows=False)


def _source_of(arguments: list[str] | None, published: str) -> tuple[str, list[str]]:
    """The one source, or else the published dataset; and the overrides."""
    sources, overrides = _apart(arguments)
    if len(sources) > 1:
        raise OperatorError(f"SOURCE: got {', '.join(sources)}, expected one (without any: {published})")
    return (sources or [published])[0], overrides


def _prompts_file(config: Config, asked_for: Path | None, source: str) -> Path:
    """Where prompts are written: to what the environment reads, unless asked for elsewhere; never over the source."""
    path = asked_for or Path(str(config.environment.options.get("source", "")))
    if path.suffix != ".jsonl" or path.absolute() == Path(source).absolute():
        expected = "a FILE.jsonl other than the source (environment.options.source may name it)"
        raise OperatorError(f"--prompts: got {str(path)!r}, expected {expected}")
    return path


def _report(selection: Selection, funnel: Funnel, asked: Asked, file: Path) -> None:
    """Say what came how far, and write the prompts file."""
    for line in funnel.lines():
        print(line)
    for line in shortfalls(selection, asked):
        print(line)
    with suppress(OSError):  # told when the file is written
        file.parent.mkdir(parents=True, exist_ok=True)
    write_lines(file, (json.dumps(record, ensure_ascii=False) for record in selection.records))
    print(f"wrote {len(selection.prompts):,} prompts and {len(selection.held_out):,} held-out problems to {file}")


def _apart(arguments: list[str] | None) -> tuple[list[str], list[str]]:
    """What is to be read, and overrides."""
    overrides = [argument for argument in arguments or () if _OVERRIDE.match(argument)]
    return [argument for argument in arguments or () if argument not in overrides], overrides


def _columns(prompt: str, response: str, messages: str) -> DemonstrationColumns:
    """The columns that options name, else the usual ones; who names one form does not get the other."""
    if messages and (prompt or response):
        raise OperatorError("--messages-column: got a prompt or response column too, expected one form or the other")
    if messages:
        return DemonstrationColumns((), (), (messages,), ())
    usual = USUAL_COLUMNS
    return DemonstrationColumns(
        (prompt,) if prompt else usual.prompt,
        (response,) if response else usual.response,
        () if prompt or response else usual.messages,
        usual.source,
    )


def _import(
    config: Config,
    rows: Iterable[NewRow | BadRow | HeldOutRow],
    *,
    skip_bad_rows: bool,
    num_asked: int | None = None,
    leave_out_held_out: bool = False,
) -> None:
    """Add `rows` to the run's store and say what became of them, and whether they are fewer than `num_asked`."""
    screen, rows = Screen(skip_bad_rows=skip_bad_rows), iter(rows)
    begun = chain(list(islice(rows, 1)), rows)  # a source that cannot be read makes no store
    path = store_path(config)
    is_new = not path.exists()
    try:
        with closing(ExpertStore(path, create=True)) as store:
            counts = store.add(screen.good(_with_progress(begun)))
    except OperatorError:
        if is_new:
            with suppress(OSError):  # where it could not even be made
                path.unlink()  # a run would take it for a store
        raise
    for line in screen.listed:
        print(f"skipped {line}", file=sys.stderr)
    num_found = counts.num_added + counts.num_duplicates + screen.num_bad
    if num_asked is not None and num_found < num_asked:
        print(f"asked for {num_asked:,} rows, found only {num_found:,} distinct training questions")
    if leave_out_held_out:
        print(f"{screen.num_held_out:,} held-out questions left out")
    ending = f"({counts.num_duplicates:,} duplicates, {screen.num_bad:,} bad rows skipped)"
    print(f"imported {counts.num_added:,} rows into {path} {ending}")


def _with_progress(rows: Iterable[Row]) -> Iterator[Row]:
    """Says on stderr how far a long import has come."""
    said_at = time.monotonic()
    for num_read, row in enumerate(rows, start=1):
        if time.monotonic() - said_at >= PROGRESS_EVERY_S:
            said_at = time.monotonic()
            print(f"{num_read:,} rows read", file=sys.stderr, flush=True)
        yield row


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write a file whole or not at all; the number of lines. Raises OperatorError where it cannot be written."""
    partial = path.parent / f".{path.name}.partial"
    num_lines = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for num_lines, line in enumerate(lines, start=1):  # noqa: B007
                file.write(line + "\n")
        partial.replace(path)
    except OSError as error:
        raise OperatorError(f"{path}: cannot be written ({error.strerror}), expected room for the rows") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return num_lines
