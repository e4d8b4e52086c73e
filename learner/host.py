"""Rank 0's house: ledger, inbox, publisher, recorder and source, opened together and closed together."""

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from common.chat import Chat
from common.config.schema import LASTING, Config
from common.errors import OperatorError
from common.keys.allowed import ServerKeys
from common.run_dir import RunDir
from common.side_port import SidePort
from common.trajectory import TrajectoryGroup
from common.watchdog import Watchdog
from common.weights.server import WeightServer
from common.weights.snapshot import Snapshot
from common.wire.connections import MAX_NEWCOMERS, Bounds
from common.wire.listener import Listener
from common.wire.sockets import SocketLimits, reserve_descriptors
from learner.checkpoints import Checkpoints
from learner.context import Context
from learner.courier.process import Courier
from learner.excerpts.excerpts import Excerpts
from learner.excerpts.folder import ExcerptFolder
from learner.expert.store import ExpertStore
from learner.handover import Handover
from learner.inbox import Inbox, LeaseTerms
from learner.ledger.leases import DropReason
from learner.ledger.ledger import Ledger
from learner.publisher import Publisher
from learner.readings import readings_of
from learner.reception import Door
from learner.recorder import Recorder
from learner.shaping import Shaping
from learner.sinks.feed import open_feeds
from learner.source import Source, Stopped
from learner.status import StatusBoard
from learner.step_rows import StepReader, open_experts

log = logging.getLogger(__name__)

NUM_LISTENERS = 3
FAREWELL_S = 15.0
"""Longest wait at the end for peers to leave."""


class Host:
    """Everything that only rank 0 has. Ports are bound before a model is loaded, so that a busy one is told at once."""

    def __init__(self, config: Config, *, on_wait: Callable[[], None]) -> None:
        """`on_wait` is called all through a wait for groups."""
        self._config = config
        self._on_wait = on_wait
        self.run_dir = RunDir(Path(config.run.dir))
        self.run_dir.create()
        self._lock = self.run_dir.lock()
        self.watchdog = Watchdog()
        self._watch = self.watchdog.watch("the learner's train loop", limit_s=config.learner.step_timeout_s)
        self.is_stopping = threading.Event()
        self.step = 0
        self.phase = "starting"
        self._shaping = Shaping.of(config)
        chat = Chat(Path(config.model.path))
        Context.of(Path(config.model.path)).check_answers(config)
        experts = open_experts(config, chat)
        self.ledger = Ledger(
            self.run_dir.ledger,
            groups_per_step=config.learner.groups_per_step,
            max_staleness=config.algorithm.max_staleness,
            num_steps=config.learner.num_steps,
            first_step=config.first_group_step,
        )
        self.ledger.check_rewind()
        self._check_length()
        self._check_agreement(experts)
        self.recorder = Recorder(self.run_dir.path, self.ledger, open_feeds(config, self.run_dir, self.ledger))
        self.excerpts = Excerpts(
            ExcerptFolder(self.run_dir.excerpts),
            groups_per_step=config.run.excerpt_groups_per_step,
            seed=config.run.seed,
        )
        self._open_network(chat)
        reader = StepReader(config, self.ledger.history, experts, chat)
        self.source = Source(
            config, self.ledger, experts, reader, describe_peers=self.inbox.peers.describe, check=self._check_wait
        )
        self.checkpoints = Checkpoints(self.run_dir.checkpoints, keep=1)  # only looked at
        self._board = StatusBoard(self.run_dir.status, self._status)
        self.recorder.restore()
        self._side_port = self._open_side_port()
        self.inbox.start()

    def _check_length(self) -> None:
        """A run cannot end before a step that it has begun: it would end without a last one, or with another's."""
        num_steps, num_begun = self._config.learner.num_steps, self.ledger.history.num_batches()
        if num_steps < num_begun:
            raise OperatorError(
                f"learner.num_steps: got {num_steps}, expected at least the {num_begun} steps that "
                f"{self.run_dir.path} has begun, or to go back before them with chord-learner --rewind"
            )

    def _check_agreement(self, experts: ExpertStore | None) -> None:
        """A resumed run must go on with what it began with."""
        started = {
            "algorithm.sft_steps": str(self._config.sft_steps),
            **{f"learner.{key}": str(getattr(self._config.learner, key)) for key in LASTING},
        }
        hashes = started | {
            "configuration": self._config.agreement_hash,
            "expert store": experts.fingerprint() if experts else "none",
        }
        for name, found in hashes.items():
            if (begun := self.ledger.fact(name, found)) != found:
                raise OperatorError(
                    f"{self.run_dir.path}: {name}: got {found}, expected {begun} as at its begin, or a new run.dir"
                )

    def check_history(self, step: int) -> None:
        """Note the configuration that the run goes on with. Raises OperatorError where it cannot go on from `step` as
        it would have; then the one on record stays."""
        num_batches = self.ledger.history.num_batches()
        if num_batches < step:
            raise OperatorError(
                f"{self.run_dir.path}: got a checkpoint of step {step}, expected at most {num_batches}, where the "
                "ledger ends: they are not of one run; restore both, or use a new run.dir"
            )
        recipe = self._config.recipe
        begun = json.loads(self.ledger.fact("recipe", json.dumps(recipe)))
        for name, found in recipe.items():
            if begun.get(name) != found and num_batches > step:
                raise OperatorError(
                    f"{name}: got {found}, expected {begun.get(name)} until the {num_batches - step} steps after the "
                    "last checkpoint are taken again: start once with the earlier value, then change it"
                )
        self.ledger.set_fact("recipe", json.dumps(recipe))
        self.run_dir.save_config(self._config)

    def _open_network(self, chat: Chat) -> None:
        config, network = self._config, self._config.network
        limits = SocketLimits(network.heartbeat_s, network.silence_s, network.max_message_bytes)
        context = zmq.Context.instance()
        reserve_descriptors(NUM_LISTENERS * 2 * (network.max_connections + MAX_NEWCOMERS))
        self._keys = ServerKeys(context, network.keys, allowed=network.allowed_keys) if network.keys else None
        listener = Listener(
            context,
            zmq.ROUTER,
            host=network.host,
            port=network.port,
            purpose="actors",
            limits=limits,
            bounds=Bounds(network.max_connections, network.max_unacknowledged_bytes),
            keys=self._keys,
            watch=self.watchdog.watch("the guard of actors", limit_s=config.run.watchdog_s),
        )
        self.port = listener.port
        self.server = WeightServer(
            context,
            host=network.host,
            port=network.weights_port,
            limits=limits,
            announcements_port=network.announcements_port,
            max_connections=network.max_connections,
            relay_width=config.weights.relay,
            keys=self._keys,
            watch=self.watchdog.watch("the learner's weight server", limit_s=config.run.watchdog_s),
            guard_watch=lambda purpose: self.watchdog.watch(f"the guard of {purpose}", limit_s=config.run.watchdog_s),
        )
        self._courier = Courier(config) if config.weights.is_direct else None
        self.handover = Handover(config, self.ledger)
        self.publisher = Publisher(
            self.run_dir.weights("learner"),
            self.server,
            self.ledger,
            self.recorder,
            every_steps=config.eval.every_steps,
            last_steps={config.sft_steps, config.learner.num_steps},
            chunk_bytes=network.chunk_bytes,
            timeout_s=config.learner.step_timeout_s,
            keep=self.handover.keep,
            courier=self._courier,
        )
        door = Door(
            config.agreement_hash,
            self.server.port,
            self.server.announcements_port,
            max_message_bytes=network.max_message_bytes,
            max_round_bytes=network.max_unacknowledged_bytes,
            silence_s=network.silence_s,
            courier_port=self._courier.port if self._courier else 0,
        )
        terms = LeaseTerms(
            config.algorithm.group_size, config.sampling.temperature, config.sampling.max_tokens, config.run.seed,
            network.lease_s,
        )  # fmt: skip
        self.inbox = Inbox(
            listener,
            self.ledger,
            door=door,
            terms=terms,
            vocab_size=chat.vocab_size,
            newest=lambda: self.publisher.newest,
            is_published=self.publisher.has_published,
            evaluation=self.publisher.evaluation,
            on_evaluation=self.publisher.finish_evaluation,
            judge=self._why_drop if config.algorithm.zero_variance == "drop" else None,
            watch=self.watchdog.watch("the learner's inbox", limit_s=config.run.watchdog_s),
            observe_commit=self.recorder.prometheus.commit_s.observe,
        )
        self.listeners = (listener, self.server.requests, self.server.announcements)
        log.info("actors: tcp://%s:%d", network.host, self.port)

    def _open_side_port(self) -> SidePort:
        registry, learner = self.recorder.prometheus.registry, self._config.learner
        for reading in readings_of(self, self._config):
            registry.register(reading)
        return SidePort(
            registry, component="learner", health=self.watchdog.verdict, readiness=self.why_not_ready,
            host=learner.metrics_host, port=learner.metrics_port, key="learner.metrics_port",
        )  # fmt: skip

    def why_not_ready(self) -> str:
        """A line where the learner takes no groups and grants no leases; empty where it does."""
        if self.inbox.failure:
            return f"the learner's inbox has ended: {self.inbox.failure!r}"
        return "" if self.inbox.grants_leases else f"the learner grants no leases: {self.phase} after step {self.step}"

    def _why_drop(self, group: TrajectoryGroup) -> DropReason | None:
        return None if self._shaping.has_signal(group) else DropReason.ZERO_VARIANCE

    @property
    def phase(self) -> str:
        """What the train loop does; a new phase is a beat for the watchdog."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self._phase = phase
        self._watch.enter(f"{phase} after step {self.step}", limit_s=self._config.learner.step_timeout_s)

    def open_for_work(self) -> None:
        """Grant leases; called when every committed batch has been replayed."""
        self.inbox.grants_leases = True
        self.watchdog.ready()

    def stop(self) -> None:
        """End the run after the step in progress."""
        self.is_stopping.set()
        self.watchdog.stopping()

    def check_for_end(self) -> None:
        """Raises what must end a wait: a failed ledger or publication, or the wish to stop. Called all through a
        wait."""
        self._watch.beat()
        if self.inbox.failure:
            raise self.inbox.failure
        self.publisher.check()
        if self.is_stopping.is_set():
            raise Stopped

    def _check_wait(self) -> None:
        self.check_for_end()
        self._on_wait()

    def wait_for_evaluations(self) -> None:
        """Wait until no evaluation is owed, within the configured limit."""
        started = time.monotonic()
        if owed := self.publisher.owed_steps:
            log.info("waiting for evaluations of versions %s", owed)
        while owed := self.publisher.owed_steps:
            self.source.waiting_for = f"evaluations of versions {owed}"
            self.check_for_end()
            if time.monotonic() - started > self._config.learner.eval_timeout_s:
                log.error(
                    "waited %.0f s for evaluations of versions %s from evaluators (%s): gave up",
                    time.monotonic() - started,
                    owed,
                    self.inbox.peers.describe(),
                )
                break
            with self.ledger.changed:
                self.ledger.changed.wait(timeout=0.2)
        self.source.waiting_for = ""

    def choose_policy(self, last: Snapshot) -> int:
        """Which policy goes on after supervised fine-tuning, once all evaluations are in."""
        if self._config.algorithm.sft_ends_with == "best":
            self.phase = "evaluating"
            self.wait_for_evaluations()
        return self.handover.choose(last)

    def say_farewell(self) -> None:
        """Tell every peer that the run is over, and wait for them to leave."""
        self.inbox.is_run_finished = True
        deadline = time.monotonic() + FAREWELL_S
        while self.inbox.peers.all() and time.monotonic() < deadline:
            time.sleep(0.1)

    def close(self) -> None:
        self.watchdog.stopping()
        self._side_port.close()
        self._board.close()
        self.source.close()
        self.inbox.close()
        self.publisher.close()
        self.recorder.sinks.close()
        self.server.close()
        if self._courier:
            self._courier.close()
        if self._keys:
            self._keys.close()
        self.ledger.close()

    def _status(self) -> dict[str, Any]:
        counts = self.ledger.tallies.counts() if self.phase != "ended" else None
        return {
            "phase": self.phase,
            "step": self.step,
            "num_steps": self._config.learner.num_steps,
            "waiting_for": self.source.waiting_for,
            "port": self.port,
            "groups": vars(counts) if counts else {},
            "dropped": self.ledger.tallies.dropped() if counts else {},
            "evaluations_owed": self.publisher.owed_steps,
            "sinks_failed": self.recorder.sinks.failures,
            "peers": [
                {
                    "peer_id": peer.peer_id,
                    "role": peer.role,
                    "engine": peer.engine,
                    "state": peer.state,
                    "serving_step": peer.serving_step,
                    "sampled_tokens": peer.labour.sampled_tokens,
                    "silence_s": peer.silence_s,
                }
                for peer in self.inbox.peers.all()
            ],
        }
