"""`chord-actor`: samples leased prompts with the newest weights and streams the groups to the learner."""

import asyncio
import logging
from pathlib import Path

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
app = new_command("A rollout actor: samples leased prompts and streams the groups to the learner.")


@app.command()
def actor(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
    name: str = typer.Option("", "--name", help="Name towards the learner; host and process by default."),
) -> None:
    """Run an actor until the run is over; SIGTERM drains it."""
    resolved = resolve_or_check(config, overrides, check=check).config
    from actors.start import check_address, default_name
    from common.wire.messages import Role

    require_model_folder(resolved.model.path)
    name = name or default_name(Role.ACTOR, resolved.network.keys)
    check_address(resolved, name)
    start_logging(name)
    with RunDir(Path(resolved.run.dir)).explains_bad_disk():
        asyncio.run(run_actor(resolved, name))


async def run_actor(config: Config, name: str) -> None:
    """Start the parts, work, and close them in the opposite order."""
    from actors.fitter import Fitter
    from actors.link import LearnerLink
    from actors.metrics import ActorMetrics
    from actors.pulse import Pulse
    from actors.start import make_hello, make_parts, on_stop
    from actors.worker import Worker
    from common.side_port import SidePort
    from common.wire.messages import Role

    pulse = Pulse(config, "actor")
    metrics = ActorMetrics()
    parts = make_parts(config, config.actor.engine, metrics.registry)
    link = LearnerLink(config.network, make_hello(config, name=name, role=Role.ACTOR, engine=parts.engine))
    folder = RunDir(Path(config.run.dir)).weights(name)
    fitter = Fitter(
        parts.engine,
        config.network,
        folder,
        name=name,
        in_flight=config.actor.swap == "in_flight",
        welcome=lambda: link.welcome,
    )
    worker = Worker(parts, link, fitter, metrics, config.actor, show=pulse.show)
    fitter.on_loaded = worker.note_load
    on_stop(worker.drain)
    beating = asyncio.create_task(pulse.keep(), name="pulse")
    try:
        SidePort(
            metrics.registry, component="actor", engine=parts.engine.name, health=pulse.verdict,
            readiness=lambda: worker.why_not_ready(max_lag=config.algorithm.max_staleness + 1),
            host=config.learner.metrics_host, port=config.actor.metrics_port, key="actor.metrics_port",
        )  # fmt: skip
        log.info("leaving: %s", await worker.run())
    finally:
        pulse.leave()
        await fitter.close()
        await link.close()
        await parts.engine.close()
        beating.cancel()


def main() -> None:
    from actors.start import run_peer

    run_peer("chord-actor", app)


if __name__ == "__main__":
    main()
