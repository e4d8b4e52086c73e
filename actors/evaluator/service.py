"""The evaluator of a run: asks which version is owed a score, fits it, scores it, sends the result until it is
acknowledged.

Consumes the learner's evaluations; waits a second between questions; never holds up training: the version stays
pinned meanwhile. Beside that its engine is started and watched.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from actors.evaluator.evaluate import Evaluation, Plan
from actors.evaluator.metrics import EvaluatorMetrics
from actors.evaluator.progress import Reports
from actors.evaluator.samples import Sample, write_samples
from actors.fitter import Fitter
from actors.guard import SamplingFailed
from actors.link import LearnerLink
from actors.standing import Standing
from actors.start import Parts, cancel_all, raise_one_line, say_goodbye
from common.errors import ComponentFailure, WaitTimeout
from common.version import Version
from common.weights.client import FetchCancelled, VersionGone
from common.wire.messages import ActorState, EvaluationResult, Receipt, TaskScore, Work, WorkRequest

log = logging.getLogger(__name__)

QUESTION_S = 1.0
REPORT_S = 30.0
"""An evaluation that lasts says so this often."""


MAX_FAILED_EVALUATIONS = 3
"""In a row; then a new start of the evaluator is what helps, as a scorer that never returns holds up all others."""


class EvaluationFailed(Exception):
    """The engine or the environment gave no answer; it may be tried again."""


class EvaluationService:
    """Serves one learner until the run is over."""

    def __init__(
        self,
        parts: Parts,
        link: LearnerLink,
        fitter: Fitter,
        plan: Plan,
        *,
        drain_s: float,
        metrics: EvaluatorMetrics,
        samples_of: Callable[[int], Path] | None = None,
        show: Callable[[ActorState, str], None] = lambda *_: None,
    ) -> None:
        """`show` is called with the state and a detail before every question; `samples_of` gives the file that the
        answers of a step's version are kept in, None keeps none."""
        self._parts = parts
        self._link = link
        self._fitter = fitter
        self._plan = plan
        self._samples_of = samples_of
        self._drain_s = drain_s
        self._metrics = metrics
        self._show = show
        self._standing = Standing(parts.engine, parts.guard, link)
        self._evaluating: asyncio.Task[None] | None = None
        self._fitting: Version | None = None
        self._drain = asyncio.Event()
        self._num_failed = 0
        """Evaluations in a row."""

    def drain(self) -> None:
        """Begin no more evaluations, end the one in progress and leave. Called again: leave; it stays owed."""
        if self._drain.is_set() and self._evaluating:
            self._evaluating.cancel()
        self._drain.set()

    async def run(self) -> str:
        """Serve until the run is over or `drain`; returns why it ended. Raises OperatorError on the learner's final
        word, ComponentFailure where a part fails."""
        tasks = [
            asyncio.create_task(self._serve_run(), name="evaluations"),
            asyncio.create_task(self._tend_engine(), name="engine"),
            asyncio.create_task(self._drain_when_asked(), name="drain"),
        ]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_all([*tasks, *([self._evaluating] if self._evaluating else [])])
        failure = next((error for task in ended if (error := task.exception())), None)
        reason = str(failure or next(task.result() for task in ended))
        await say_goodbye(self._link, reason)
        if failure:
            raise_one_line(failure)
        return reason

    async def _tend_engine(self) -> None:
        await self._parts.guard.start()
        await self._parts.guard.watch()

    async def _drain_when_asked(self) -> str:
        """Wait for `drain`, then for the evaluation in progress, `drain_s` at most."""
        await self._drain.wait()
        if self._evaluating:
            _, unfinished = await asyncio.wait([self._evaluating], timeout=self._drain_s)
            if unfinished:
                log.warning("drained for %.0f s, actor.drain_s: the evaluation in progress stays owed", self._drain_s)
        return "asked to stop"

    async def _serve_run(self) -> str:
        """Ask every second, during an evaluation too, so that the learner knows the evaluator alive."""
        while True:
            work = await self._ask()
            self._standing.compare(work.newest)
            if self._evaluating and self._evaluating.done():
                await self._conclude(self._evaluating)
                self._evaluating = None
                continue
            if not self._evaluating:
                if work.evaluation and self._parts.guard.is_started and not self._drain.is_set():
                    self._evaluating = asyncio.create_task(self._evaluate(work.evaluation), name="evaluation")
                elif work.is_finished and not work.evaluation:
                    return "the run is over"
            if self._evaluating:
                await asyncio.wait([self._evaluating], timeout=QUESTION_S)
            else:
                await asyncio.sleep(QUESTION_S)

    async def _conclude(self, evaluating: "asyncio.Task[None]") -> None:
        """Raise what must end the evaluator; pause after what may be tried again."""
        try:
            await evaluating
            self._num_failed = 0
        except (VersionGone, FetchCancelled):
            log.warning("the version to evaluate is no longer kept: not evaluated")
            await asyncio.sleep(QUESTION_S)
        except EvaluationFailed as failure:
            self._num_failed += 1
            if self._num_failed == MAX_FAILED_EVALUATIONS:
                raise ComponentFailure(
                    f"{self._num_failed} evaluations in a row failed, the last: {failure}"
                ) from failure
            log.warning("an evaluation failed and is owed still: %s", failure)
            await asyncio.sleep(QUESTION_S)

    @property
    def state(self) -> ActorState:
        if self._drain.is_set():
            return ActorState.DRAINING
        if self._parts.guard.is_started and self._evaluating:
            return ActorState.FITTING if self._fitting else ActorState.SERVING
        return self._standing.state

    def why_not_ready(self) -> str:
        """A line where the evaluator could not begin an evaluation now; empty where it could, or does one."""
        if self._drain.is_set():
            return "the evaluator is draining"
        if not self._parts.guard.is_started:
            return "the evaluator's engine has not started yet"
        return "" if self._link.welcome else f"the evaluator has no connection to the learner at {self._link.address}"

    async def _evaluate(self, version: Version) -> None:
        self._fitting = version
        try:
            await self._fitter.fit(version)
        finally:
            self._fitting = None
        try:
            scores = await self._score(version)
        except (SamplingFailed, WaitTimeout) as failure:
            raise EvaluationFailed(str(failure)) from failure
        result = EvaluationResult(version=version, scores=scores)
        await self._link.ask(result, Receipt, phase=f"the receipt of the evaluation of {version}")
        self._metrics.observe(version, scores)
        for score in scores:
            log.info(
                "%s: %s: accuracy %.3f (%d of %d answers right)",
                version, score.task, score.accuracy, score.num_correct, score.num_samples,
            )  # fmt: skip

    async def _score(self, version: Version) -> tuple[TaskScore, ...]:
        """The samples appear under their name when all of them are there."""
        kept: list[Sample] = []
        show = Reports(str(version), every_s=REPORT_S).note
        scores = await Evaluation(self._plan, self._parts.rollout, show=show, keep=kept.extend).run()
        if self._samples_of:
            path = self._samples_of(version.step)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            write_samples(partial, kept, is_begin=True)
            partial.replace(path)
        return scores

    async def _ask(self) -> Work:
        version = self._parts.engine.version
        self._show(self.state, f"{version}" if version else "no version yet")
        return await self._link.ask(
            WorkRequest(state=self.state, capacity=0, serving=version), Work, phase="an evaluation"
        )
