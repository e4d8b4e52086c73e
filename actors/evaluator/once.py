"""One evaluation without a learner: of a model folder, or of answers in a file."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from actors.evaluator.evaluate import Evaluation, plan_of
from actors.evaluator.folder import snapshot_of_folder
from actors.evaluator.metrics import EvaluatorMetrics
from actors.evaluator.progress import Progress, ProgressBars, Reports
from actors.evaluator.report import STANDARD_OUTPUT, check_writable, describe, show_table, write_json
from actors.evaluator.samples import Sample, write_samples
from actors.evaluator.saved import SavedAnswers
from actors.evaluator.tasks import make_tasks
from actors.start import make_parts
from common.config.schema import Config
from common.wire.messages import TaskScore

REPORT_S = 5.0
"""Where there is no terminal, a line this often."""


@dataclass
class Outputs:
    """What is written beside the table."""

    json: Path | None = None
    """The document for machines; "-" is standard output, which then has no table."""
    samples: Path | None = None

    is_begun: bool = field(default=False, init=False)
    """Whether `samples` holds answers of this evaluation; until it does, what it held stays."""

    def check(self) -> None:
        """Raises OperatorError where a file cannot be written, before the work is done."""
        for path in (self.json, self.samples):
            if path:
                check_writable(path)
        if self.samples:
            write_samples(self.samples, [], is_begin=False)

    def keep(self, samples: Sequence[Sample]) -> None:
        if self.samples:
            write_samples(self.samples, samples, is_begin=not self.is_begun)
            self.is_begun = True

    def tell(self, scores: Sequence[TaskScore], *, subject: str, config: Config, is_sampled: bool) -> None:
        if self.json != STANDARD_OUTPUT:
            show_table(scores, subject=subject)
        if self.json:
            document = describe(scores, subject=subject, config=config, is_sampled=is_sampled)
            write_json(self.json, document)


async def score_answers(config: Config, path: Path, outputs: Outputs) -> None:
    """Score the answers in `path`."""
    outputs.check()
    answers = SavedAnswers(path, make_tasks(config))
    scores = await answers.score(seed=config.run.seed, limit_s=config.actor.score_timeout_s, keep=outputs.keep)
    outputs.tell(scores, subject=str(path), config=config, is_sampled=False)


async def score_folder(config: Config, outputs: Outputs) -> None:
    """Sample answers of the model in config.model.path, and score them."""
    outputs.check()
    tasks = make_tasks(config)
    parts = make_parts(
        config, config.eval.engine or config.actor.engine, EvaluatorMetrics().registry, tasks[0].environment
    )
    await parts.guard.start()
    try:
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as shown:
            await parts.engine.load(snapshot_of_folder(Path(config.model.path), Path(scratch)))
            show = _progress(config.model.path, shown)
            scores = await Evaluation(plan_of(config, tasks), parts.rollout, show=show, keep=outputs.keep).run()
    finally:
        await parts.engine.close()
    outputs.tell(scores, subject=config.model.path, config=config, is_sampled=True)


def _progress(subject: str, shown: ExitStack) -> Callable[[Progress], None]:
    console = Console(stderr=True)
    if console.is_terminal:
        return shown.enter_context(ProgressBars(console)).note
    return Reports(subject, every_s=REPORT_S).note
