"""Rank 0's house: ledger, inbox, publisher, recorder and source, opened together and closed together."""

import logging
import threading
import time
from pathlib import Path
from typing import Any

import zmq

from common.chat import Chat
from common.config.schema import Config
from common.errors import OperatorError
from common.keys.allowed import ServerKeys
from common.metrics import serve_metrics
from common.run_dir import RunDir
from common.weights.server import WeightServer
from common.wire.connections import MAX_NEWCOMERS, Bounds
from common.wire.listener import Listener
from common.wire.sockets import SocketLimits, reserve_descriptors
from learner.expert.store import ExpertStore, store_path
from learner.inbox import Door, Inbox, LeaseTerms
from learner.ledger.ledger import Ledger
from learner.metrics import GuardCollector
from learner.publisher import Publisher
from learner.recorder import Recorder
from learner.source import Source, Stopped
from learner.status import StatusBoard

log = logging.getLogger(__name__)

NUM_LISTENERS = 3
FAREWELL_S = 15.0
"""Longest wait at the end for peers to leave."""


class Host:
    """Everything that only rank 0 has. Ports are bound before a model is loaded, so that a busy one is told at once."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.run_dir = RunDir(Path(config.run.dir))
        self.run_dir.create()
        self._lock = self.run_dir.lock()
        self.is_stopping = threading.Event()
        self.phase = "starting"
        self.step = 0
        chat = Chat(Path(config.model.path))
        experts = self._open_experts(chat)
        self.ledger = Ledger(
            self.run_dir.ledger,
            groups_per_step=config.learner.groups_per_step,
            max_staleness=config.algorithm.max_staleness,
        )
        self._check_agreement(experts)
        self.recorder = Recorder(self.run_dir.path, self.ledger)
        self._open_network(chat)
        self.source = Source(
            config, self.ledger, experts, chat, describe_peers=self.inbox.peers.describe, check=self.check_for_end
        )
        self._board = StatusBoard(self.run_dir.status, self._status)
        self.run_dir.save_config(config)
        self.inbox.start()

    def _open_experts(self, chat: Chat) -> ExpertStore | None:
        """The store, every row of it seen to fit the model's chat template, so that no step fails on one."""
        if not self._config.algorithm.trains_on_experts:
            return None
        path = store_path(self._config)
        store = ExpertStore(path)
        if not store.row_ids():
            raise OperatorError(f"expert.path: {path} holds no rows, expected at least one (see chord-expert import)")
        for row in store.rows():
            try:
                chat.demonstration(row.messages)
            except Exception as error:  # a template says no in whatever way it likes
                raise OperatorError(
                    f"expert.path: {path}: row {row.row_id}: the chat template refuses it ({error})"
                ) from error
        return store

    def _check_agreement(self, experts: ExpertStore | None) -> None:
        """A resumed run must go on with what it began with."""
        started = {"learner.groups_per_step": str(self._config.learner.groups_per_step)}
        hashes = started | {
            "configuration": self._config.agreement_hash,
            "expert store": experts.fingerprint() if experts else "none",
        }
        for name, found in hashes.items():
            if (begun := self.ledger.fact(name, found)) != found:
                raise OperatorError(
                    f"{self.run_dir.path}: {name}: got {found}, expected {begun} as at its begin, or a new run.dir"
                )

    def _open_network(self, chat: Chat) -> None:
        config, network = self._config, self._config.network
        limits = SocketLimits(network.heartbeat_s, network.silence_s, network.max_message_bytes)
        context = zmq.Context.instance()
        reserve_descriptors(NUM_LISTENERS * 2 * (network.max_connections + MAX_NEWCOMERS))
        self._keys = ServerKeys(context, network.keys) if network.keys else None
        listener = Listener(
            context,
            zmq.ROUTER,
            host=network.host,
            port=network.port,
            purpose="actors",
            limits=limits,
            bounds=Bounds(network.max_connections, network.max_unacknowledged_bytes),
            keys=self._keys,
        )
        self.port = listener.port
        self.server = WeightServer(
            context,
            host=network.host,
            port=network.weights_port,
            limits=limits,
            announcements_port=network.announcements_port,
            max_connections=network.max_connections,
            keys=self._keys,
        )
        self.publisher = Publisher(
            self.run_dir.weights("learner"),
            self.server,
            self.ledger,
            self.recorder,
            every_steps=config.eval.every_steps,
            last_step=config.learner.num_steps,
            chunk_bytes=network.chunk_bytes,
        )
        door = Door(
            config.agreement_hash,
            self.server.port,
            self.server.announcements_port,
            max_message_bytes=network.max_message_bytes,
            max_round_bytes=network.max_unacknowledged_bytes,
            silence_s=network.silence_s,
        )
        terms = LeaseTerms(
            config.algorithm.group_size,
            config.sampling.temperature,
            config.sampling.max_tokens,
            config.run.seed,
            network.lease_s,
        )
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
        )
        registry = self.recorder.prometheus.registry
        registry.register(GuardCollector([listener, self.server.requests, self.server.announcements]))
        learner = config.learner
        port = serve_metrics(registry, host=learner.metrics_host, port=learner.metrics_port, key="learner.metrics_port")
        log.info(
            "actors: tcp://%s:%d, metrics: http://%s:%d/metrics", network.host, self.port, learner.metrics_host, port
        )

    def open_for_work(self) -> None:
        """Grant leases; called when every committed batch has been replayed."""
        self.inbox.grants_leases = True

    def check_for_end(self) -> None:
        """Raises what must end a wait: a failed ledger, or the wish to stop."""
        if self.inbox.failure:
            raise self.inbox.failure
        if self.is_stopping.is_set():
            raise Stopped

    def wait_for_evaluations(self) -> None:
        """Wait until no evaluation is owed, within the configured limit."""
        self.open_for_work()
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

    def say_farewell(self) -> None:
        """Tell every peer that the run is over, and wait for them to leave."""
        self.inbox.is_run_finished = True
        deadline = time.monotonic() + FAREWELL_S
        while self.inbox.peers.all() and time.monotonic() < deadline:
            time.sleep(0.1)

    def close(self) -> None:
        self._board.close()
        self.inbox.close()
        self.server.close()
        if self._keys:
            self._keys.close()
        self.ledger.close()

    def _status(self) -> dict[str, Any]:
        counts = self.ledger.counts() if self.phase != "ended" else None
        return {
            "phase": self.phase,
            "step": self.step,
            "num_steps": self._config.learner.num_steps,
            "waiting_for": self.source.waiting_for,
            "port": self.port,
            "groups": vars(counts) if counts else {},
            "evaluations_owed": self.publisher.owed_steps,
            "peers": [
                {
                    "peer_id": peer.peer_id,
                    "role": peer.role,
                    "engine": peer.engine,
                    "state": peer.state,
                    "serving_step": peer.serving_step,
                    "sampled_tokens": peer.sampled_tokens,
                    "silence_s": peer.silence_s,
                }
                for peer in self.inbox.peers.all()
            ],
        }
