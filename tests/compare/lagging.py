"""An actor that serves old weights on purpose: the version LAG optimizer steps behind the newest.

How stale groups are is decided by how far actors run ahead, which differs from machine to machine: where the learner is
the faster side, staleness stays near 1 whatever the limit is. Held back like this, with algorithm.max_staleness = LAG,
the ledger's arithmetic (an actor that serves version v may lease the groups of steps up to v + max_staleness) leaves
exactly one schedule: learner and actor take turns, and from LAG steps after the supervised ones on every token is
exactly LAG steps old when it is trained on. All lags then take the same turns, and differ in nothing but the age of
the weights. It is a plain chord-actor but for that: newer versions are fetched at once and laid by until their time
has come. Versions of before the first step that samples are not served later, whoever fetched them.
"""

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import actors.fitter
from actors.__main__ import run_actor
from actors.engine import Engine
from actors.start import check_address, run_peer
from common.command import ConfigOption, OverridesArgument, new_command, resolve_or_check, start_logging
from common.version import Version
from common.weights.snapshot import Snapshot

app = new_command("A chord-actor that serves the version LAG optimizer steps behind the newest.")


class LaggingEngine:
    """What the fitter loads into: it hands on old versions only."""

    def __init__(self, engine: Engine, lag: int, *, first: int = 0) -> None:
        """`first` is the oldest version that is served once a newer one is there."""
        self._engine = engine
        self._lag = lag
        self._first = first
        self._held: dict[int, Snapshot] = {}
        """By step, those that are served or will be."""
        self.version: Version | None = None
        """The newest that was fetched."""

    async def load(self, snapshot: Snapshot, *, in_flight: bool = True) -> None:
        """Lay the newest by, and load the oldest that is at most LAG steps behind it."""
        newest = snapshot.version.step
        self._held[newest] = replace(snapshot, path=self._keep(snapshot))
        oldest = max(newest - self._lag, min(self._first, newest))
        due = min(step for step in self._held if step >= oldest)
        serving = self._engine.version
        if serving is None or serving.step != due:
            await self._engine.load(self._held[due], in_flight=in_flight)
        self.version = snapshot.version
        for step in [step for step in self._held if step < due]:
            self._held.pop(step).path.unlink()

    def _keep(self, snapshot: Snapshot) -> Path:
        """A second name of its file, out of the fitter's sight, who deletes all but the newest."""
        path = snapshot.path.parent / "held" / snapshot.path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(snapshot.path, path)
        return path


class LaggingFitter(actors.fitter.Fitter):
    """The actor's fitter, in front of an engine that lags: it fetches every version that it hears of, one after the
    other, as one that was skipped could not be served later."""

    lag = 0
    first = 0

    def __init__(self, engine: Engine, *arguments: Any, **options: Any) -> None:
        self._heard: list[Version] = []
        """Those that are still to be fetched, oldest first."""
        super().__init__(LaggingEngine(engine, self.lag, first=self.first), *arguments, **options)

    def want(self, version: Version | None) -> None:
        newest = self._heard[-1] if self._heard else self._engine.version
        if version and (newest is None or (version.incarnation, version.step) > (newest.incarnation, newest.step)):
            self._heard.append(version)
            super().want(self._heard[0])

    async def fit(self, version: Version) -> None:
        try:
            await super().fit(version)
        finally:
            self._heard = [other for other in self._heard if other != version]
            super().want(self._heard[0] if self._heard else None)


@app.command()
def lagging_actor(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    lag: Annotated[int, typer.Option("--lag", min=0, help="Optimizer steps behind the newest version.")] = 0,
    name: Annotated[str, typer.Option("--name", help="Name towards the learner.")] = "actor-0",
) -> None:
    """Run it until the run is over."""
    resolved = resolve_or_check(config, overrides, check=False).config
    check_address(resolved, name)
    start_logging(name)
    LaggingFitter.lag, LaggingFitter.first = lag, resolved.sft_steps
    actors.fitter.Fitter = LaggingFitter  # run_actor asks for it by this name; all else is the actor's own
    asyncio.run(run_actor(resolved, name))


if __name__ == "__main__":
    run_peer("lagging-actor", app)
