"""The evaluator of a run: asks which version is owed a score, fits it, scores it, sends the result until it is
acknowledged.

Consumes the learner's evaluations; waits a second between questions; never holds up training: the version stays
pinned meanwhile.
"""

import asyncio
import logging
from contextlib import suppress

from actors.engine import SamplingParameters
from actors.evaluator.evaluate import evaluate
from actors.evaluator.metrics import EvaluatorMetrics
from actors.fitter import Fitter
from actors.link import LearnerLink
from actors.start import Parts
from common.errors import ComponentFailure, OperatorError
from common.version import Version
from common.weights.client import FetchCancelled, VersionGone
from common.wire.messages import ActorState, EvaluationResult, Goodbye, Receipt, Work, WorkRequest

log = logging.getLogger(__name__)

QUESTION_S = 1.0


class EvaluationService:
    """Serves one learner until the run is over."""

    def __init__(
        self,
        parts: Parts,
        link: LearnerLink,
        fitter: Fitter,
        sampling: SamplingParameters,
        *,
        task: str,
        num_problems: int,
        max_concurrency: int,
        metrics: EvaluatorMetrics,
    ) -> None:
        self._parts = parts
        self._link = link
        self._fitter = fitter
        self._sampling = sampling
        self._task = task
        self._num_problems = num_problems
        self._max_concurrency = max_concurrency
        self._metrics = metrics
        self._serving: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """End now; an evaluation in progress stays owed."""
        if self._serving:
            self._serving.cancel()

    async def run(self) -> None:
        """Serve until the run is over, or `stop`."""
        self._serving = asyncio.create_task(self._serve_run(), name="evaluations")
        await asyncio.wait([self._serving])
        if not self._serving.cancelled():
            self._serving.result()
        with suppress(TimeoutError, OperatorError, ComponentFailure):
            async with asyncio.timeout(2.0):
                await self._link.ask(Goodbye(reason="done"), Receipt, phase="a goodbye")

    async def _serve_run(self) -> None:
        while True:
            work = await self._ask(ActorState.SERVING if self._parts.engine.version else ActorState.FITTING)
            if work.evaluation:
                await self._serve(work.evaluation)
                continue
            if work.is_finished:
                return
            await asyncio.sleep(QUESTION_S)

    async def _serve(self, version: Version) -> None:
        """Evaluate `version`, reporting every second meanwhile, so that the learner knows the evaluator alive."""
        evaluating = asyncio.create_task(self._evaluate(version))
        try:
            while not evaluating.done():
                await asyncio.wait([evaluating], timeout=QUESTION_S)
                await self._ask(ActorState.SERVING)
            evaluating.result()
        except (VersionGone, FetchCancelled):
            log.warning("%s is no longer kept: not evaluated", version)
        finally:
            evaluating.cancel()

    async def _evaluate(self, version: Version) -> None:
        await self._fitter.fit(version)
        score = await evaluate(
            self._parts, self._sampling, num_problems=self._num_problems, max_concurrency=self._max_concurrency
        )
        result = EvaluationResult(
            version=version,
            task=self._task,
            num_problems=score.num_problems,
            num_correct=score.num_correct,
            mean_score=score.mean_score,
            mean_answer_tokens=score.mean_answer_tokens,
            wall_s=score.wall_s,
        )
        await self._link.ask(result, Receipt, phase=f"the receipt of the evaluation of {version}")
        self._metrics.observe(version, score)
        log.info("%s: accuracy %.3f (%d of %d)", version, score.accuracy, score.num_correct, score.num_problems)

    async def _ask(self, state: ActorState) -> Work:
        request = WorkRequest(state=state, capacity=0, serving=self._parts.engine.version)
        return await self._link.ask(request, Work, phase="an evaluation")
