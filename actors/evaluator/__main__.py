"""`chord-eval`: scores a run's versions on held-out problems, or one model folder with --model."""

import asyncio
import logging
import re
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from common.command import (
    CheckOption,
    ConfigOption,
    OverridesArgument,
    new_command,
    resolve_or_check,
    start_logging,
)
from common.config.schema import Config
from common.model_folder import require_model_folder
from common.run_dir import RunDir

log = logging.getLogger(__name__)
app = new_command("The evaluator: scores versions of a run, or one model folder, on held-out problems.")


@app.command()
def evaluator(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
    name: Annotated[str, typer.Option("--name", help="Name towards the learner; host and process by default.")] = "",
    model: Annotated[Path | None, typer.Option("--model", help="Score this folder once, without a learner.")] = None,
) -> None:
    """Serve a learner's evaluations until its run is over, or score --model and stop."""
    resolved = resolve_or_check(config, overrides, check=check).config
    from actors.start import check_address, default_name
    from common.wire.messages import Role

    if model:
        resolved = resolved.model_copy(update={"model": resolved.model.model_copy(update={"path": str(model)})})
    require_model_folder(resolved.model.path)
    if not model:
        check_address(resolved)
    start_logging(name or "evaluator")
    with RunDir(Path(resolved.run.dir)).explains_bad_disk():
        asyncio.run(score_folder(resolved) if model else serve(resolved, name or default_name(Role.EVALUATOR)))


async def serve(config: Config, name: str) -> None:
    """Start the parts, serve the learner, and close them in the opposite order."""
    from actors.evaluator.metrics import EvaluatorMetrics
    from actors.evaluator.service import EvaluationService
    from actors.fitter import Fitter
    from actors.link import LearnerLink
    from actors.pulse import Pulse
    from actors.start import make_hello, make_parts, on_stop, serve_peer_metrics
    from common.wire.messages import Role

    pulse = Pulse(config, "evaluator")
    metrics = EvaluatorMetrics()
    parts = make_parts(config, config.eval.engine or config.actor.engine, metrics.registry)
    serve_peer_metrics(
        metrics.registry, host=config.learner.metrics_host, port=config.eval.metrics_port, key="eval.metrics_port"
    )
    link = LearnerLink(config.network, make_hello(config, name=name, role=Role.EVALUATOR, engine=parts.engine))
    fitter = Fitter(
        parts.engine,
        config.network,
        RunDir(Path(config.run.dir)).weights(name),
        in_flight=False,
        welcome=lambda: link.welcome,
    )
    service = EvaluationService(
        parts, link, fitter, sampling_of(config), task=task_of(config), num_problems=config.eval.num_problems,
        max_concurrency=config.eval.max_concurrency, drain_s=config.actor.drain_s, metrics=metrics, show=pulse.show,
    )  # fmt: skip
    on_stop(service.drain)
    beating = asyncio.create_task(pulse.keep(), name="pulse")
    try:
        log.info("leaving: %s", await service.run())
    finally:
        pulse.leave()
        await fitter.close()
        await link.close()
        await parts.engine.close()
        beating.cancel()


async def score_folder(config: Config) -> None:
    """Score config.model.path once and print the result."""
    from actors.evaluator.evaluate import evaluate
    from actors.evaluator.folder import snapshot_of_folder
    from actors.evaluator.metrics import EvaluatorMetrics
    from actors.start import make_parts

    parts = make_parts(config, config.eval.engine or config.actor.engine, EvaluatorMetrics().registry)
    await parts.guard.start()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            await parts.engine.load(snapshot_of_folder(Path(config.model.path), Path(scratch)))
            score = await evaluate(
                parts,
                sampling_of(config),
                num_problems=config.eval.num_problems,
                max_concurrency=config.eval.max_concurrency,
            )
    finally:
        await parts.engine.close()
    print(
        f"{config.model.path}: {task_of(config)}: {score.num_correct} of {score.num_problems} right, "
        f"accuracy {score.accuracy:.3f}, "
        f"mean score {score.mean_score:.3f}, {score.mean_answer_tokens:.1f} tokens per answer"
    )


def sampling_of(config: Config):
    from actors.engine import SamplingParameters

    return SamplingParameters(
        temperature=config.eval.temperature, max_tokens=config.sampling.max_tokens, seed=config.run.seed
    )


def task_of(config: Config) -> str:
    """What the evaluation is called: the family where the environment has one."""
    name = str(config.environment.options.get("family", config.environment.name))
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:64]


def main() -> None:
    from actors.start import run_peer

    run_peer("chord-eval", app)


if __name__ == "__main__":
    main()
