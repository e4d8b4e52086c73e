"""What `chord-eval` says of its scores: a table for people, a document for machines."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config.schema import Config
from common.errors import OperatorError
from common.wire.messages import TaskScore

STANDARD_OUTPUT = Path("-")


def show_table(scores: Sequence[TaskScore], *, subject: str) -> None:
    """On standard output; accuracies by category below the tasks. As wide as it needs where nobody looks at it."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(_task_table(scores, subject))
    for score in scores:
        if score.categories:
            console.print(_category_table(score))


def describe(scores: Sequence[TaskScore], *, subject: str, config: Config, is_sampled: bool) -> dict[str, Any]:
    """The document; of answers that were sampled elsewhere it is not known how."""
    sampling = config.eval.model_dump(mode="json", include={"temperature", "top_p", "top_k"})
    sampling |= {"max_tokens": config.eval.max_tokens or config.sampling.max_tokens}
    return {
        "subject": subject,
        "seed": config.run.seed,
        "sampling": sampling if is_sampled else None,
        "tasks": [score.line() for score in scores],
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Into a file, or to standard output for "-"."""
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OperatorError(f"{path}: {error.strerror}, expected a file that can be written") from error


def check_writable(path: Path) -> None:
    """Before the work, so that it is not done in vain. Raises OperatorError."""
    if path != STANDARD_OUTPUT and (path.is_dir() or not path.absolute().parent.is_dir()):
        got = "a folder" if path.is_dir() else "a file in no folder"
        raise OperatorError(f"{path}: got {got}, expected a file that can be written")


def _task_table(scores: Sequence[TaskScore], subject: str) -> Table:
    table = Table(title=subject, title_justify="left")
    columns = ("task", "problems", "k", "avg@k", "95 %", "pass@k", "right", "unparsed", "truncated", "tokens")
    for column in columns:
        table.add_column(column, justify="left" if column in ("task", "pass@k") else "right")
    for score in scores:
        low, high = score.confidence_95
        passes = "  ".join(f"{k}: {value:.3f}" for k, value in score.pass_at_k.items())
        table.add_row(
            score.task, str(score.num_problems), str(score.samples_per_problem), f"{score.accuracy:.3f}",
            f"{low:.3f}-{high:.3f}", passes, f"{score.num_correct}/{score.num_samples}", str(score.num_unparsed),
            str(score.num_truncated), f"{score.mean_answer_tokens:.1f}",
        )  # fmt: skip
    return table


def _category_table(score: TaskScore) -> Table:
    table = Table(title=f"{score.task} by category", title_justify="left")
    table.add_column("category")
    table.add_column("avg@k", justify="right")
    for category, accuracy in score.categories.items():
        table.add_row(category, f"{accuracy:.3f}")
    return table
