"""Where a peer stands with its learner: whether its engine has started, and whether its weights are the learner's."""

from actors.engine import Engine
from actors.guard import EngineGuard
from actors.link import LearnerLink
from common.version import Version
from common.wire.messages import ActorState


class Standing:
    """Derived from engine and link whenever it is asked for; only `compare` leaves a trace."""

    def __init__(self, engine: Engine, guard: EngineGuard, link: LearnerLink) -> None:
        self._engine = engine
        self._guard = guard
        self._link = link
        self._same: tuple[int, str] | None = None
        """Incarnation and hash of the last version that the learner named and the engine had already."""
        self._newest: Version | None = None

    def compare(self, newest: Version | None) -> None:
        """Note what the learner publishes: after its restart that may be the very weights which are loaded."""
        self._newest = newest or self._newest
        if newest and (version := self._engine.version) and (newest.step, newest.hash) == (version.step, version.hash):
            self._same = newest.incarnation, newest.hash

    @property
    def serving(self) -> Version | None:
        """The loaded version, where it is one of the run that the learner leads now."""
        version, welcome = self._engine.version, self._link.welcome
        return version if version and welcome and version.run_id == welcome.run_id else None

    @property
    def lag(self) -> int:
        """Versions between the newest that the learner named and the one served; 0 before there are any."""
        newest, serving = self._newest, self.serving
        return max(newest.step - serving.step, 0) if newest and serving and newest.run_id == serving.run_id else 0

    @property
    def state(self) -> ActorState:
        """Stale until the learner's present incarnation is known to have published the loaded weights."""
        if not self._guard.is_started:
            return ActorState.STARTING
        if self._engine.version is None:
            return ActorState.FITTING
        version, welcome = self.serving, self._link.welcome
        if version is None or welcome is None:
            return ActorState.STALE
        is_its_own = version.incarnation == welcome.incarnation
        return (
            ActorState.SERVING if is_its_own or self._same == (welcome.incarnation, version.hash) else ActorState.STALE
        )
