"""`chord-eval`: scores a run's versions, one model folder with --model, or saved answers with --answers."""

import asyncio
import json
import logging
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
from common.errors import OperatorError
from common.model_folder import require_model_folder
from common.run_dir import RunDir

log = logging.getLogger(__name__)
app = new_command("The evaluator: scores versions of a run, one model folder, or saved answers.")


@app.command()
def evaluator(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
    name: Annotated[str, typer.Option("--name", help="Name towards the learner; host and process by default.")] = "",
    model: Annotated[Path | None, typer.Option("--model", help="Score this folder once, without a learner.")] = None,
    answers: Annotated[
        Path | None, typer.Option("--answers", help="Score these answers (task, problem, sample, text per line).")
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option("--benchmark", help="NAME, NAME=SOURCE or reasoning_gym/FAMILY, instead of what is configured."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores here as JSON; - is standard output.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Write every answer with its score here, a JSON line each.")
    ] = None,
) -> None:
    """Serve a learner's evaluations until its run is over; or score --model or --answers, and stop."""
    is_once = bool(model or answers)
    if model and answers:
        raise OperatorError("--answers: got --model too, expected one of them")
    if not is_once and (given := _first_given({"--benchmark": benchmark, "--json": json_file, "--samples": samples})):
        raise OperatorError(f"{given}: got neither --model nor --answers, expected one (a run's evaluations: [eval])")
    resolved = resolve_or_check(config, [*(overrides or []), *benchmark_overrides(benchmark)], check=check).config
    if model:
        resolved = resolved.model_copy(update={"model": resolved.model.model_copy(update={"path": str(model)})})
    if not answers:
        require_model_folder(resolved.model.path)
    if not is_once:
        serve_run(resolved, name)
        return
    start_logging("evaluator")
    from actors.evaluator.once import Outputs, score_answers, score_folder

    outputs = Outputs(json_file, samples)
    asyncio.run(score_answers(resolved, answers, outputs) if answers else score_folder(resolved, outputs))


def _first_given(options: dict[str, object]) -> str:
    return next((name for name, value in options.items() if value), "")


def benchmark_overrides(benchmarks: list[str] | None) -> list[str]:
    """--benchmark in the words of the configuration, which checks it."""
    return [f"eval.benchmarks={json.dumps(benchmarks)}", "eval.held_out=false"] if benchmarks else []


def serve_run(config: Config, name: str) -> None:
    """Serve a learner. Raises OperatorError where it is not known where, or under which name."""
    from actors.start import check_address, default_name
    from common.wire.messages import Role

    name = name or default_name(Role.EVALUATOR, config.network.keys)
    check_address(config, name)
    start_logging(name)
    with RunDir(Path(config.run.dir)).explains_bad_disk():
        asyncio.run(serve(config, name))


async def serve(config: Config, name: str) -> None:
    """Start the parts, serve the learner, and close them in the opposite order."""
    from actors.evaluator.evaluate import plan_of
    from actors.evaluator.metrics import EvaluatorMetrics
    from actors.evaluator.service import EvaluationService
    from actors.evaluator.tasks import make_tasks
    from actors.fitter import Fitter
    from actors.link import LearnerLink
    from actors.pulse import Pulse
    from actors.start import make_hello, make_parts, on_stop
    from common.side_port import SidePort
    from common.wire.messages import Role

    pulse = Pulse(config, "evaluator")
    metrics = EvaluatorMetrics()
    plan = plan_of(config, make_tasks(config))
    engine = config.eval.engine or config.actor.engine
    parts = make_parts(config, engine, metrics.registry, plan.tasks[0].environment)
    run_dir = RunDir(Path(config.run.dir))
    link = LearnerLink(config.network, make_hello(config, name=name, role=Role.EVALUATOR, engine=parts.engine))
    fitter = Fitter(
        parts.engine,
        config.network,
        run_dir.weights(name),
        name=name,
        in_flight=False,
        welcome=lambda: link.welcome,
    )
    service = EvaluationService(
        parts, link, fitter, plan, drain_s=config.actor.drain_s, metrics=metrics, show=pulse.show,
        samples_of=run_dir.samples if config.eval.save_samples else None,
    )  # fmt: skip
    on_stop(service.drain)
    beating = asyncio.create_task(pulse.keep(), name="pulse")
    try:
        SidePort(
            metrics.registry, component="evaluator", engine=parts.engine.name, health=pulse.verdict,
            readiness=service.why_not_ready,
            host=config.learner.metrics_host, port=config.eval.metrics_port, key="eval.metrics_port",
        )  # fmt: skip
        log.info("leaving: %s", await service.run())
    finally:
        pulse.leave()
        await fitter.close()
        await link.close()
        await parts.engine.close()
        beating.cancel()


def main() -> None:
    from actors.start import run_peer

    run_peer("chord-eval", app)


if __name__ == "__main__":
    main()
