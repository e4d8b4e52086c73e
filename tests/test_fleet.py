"""An actor's life: what it tells its learner, how it leaves, and what becomes of it when its engine fails."""

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq
from prometheus_client import CollectorRegistry

from actors.concurrency import FIRST_GROUPS
from actors.engine import Answer, EngineDead, Pressure, SamplingParameters
from actors.engines.simulated import SimulatedEngine
from actors.environment import SingleTurnEpisode, Turn
from actors.evaluator.evaluate import Plan
from actors.evaluator.metrics import EvaluatorMetrics
from actors.evaluator.service import EvaluationService
from actors.evaluator.tasks import EvaluationTask
from actors.fitter import Fitter
from actors.guard import EngineGuard
from actors.link import LearnerLink
from actors.metrics import ActorMetrics
from actors.rollout import Rollout
from actors.start import Parts
from actors.worker import Worker
from common.chat import Chat, ChatMessage
from common.config.schema import Actor, Network
from common.errors import ComponentFailure, OperatorError
from common.version import Version
from common.weights.server import WeightServer
from common.weights.snapshot import Manifest, Snapshot, hash_chunk, hash_of_chunks
from common.wire.codec import decode, encode
from common.wire.messages import (
    ActorState,
    EvaluationResult,
    Goodbye,
    GroupHeader,
    Hello,
    Lease,
    LeaseFailure,
    Message,
    Outcome,
    Receipt,
    Refusal,
    Role,
    Welcome,
    Work,
    WorkRequest,
)
from common.wire.sockets import SocketLimits, bind, open_socket
from tests.runs import write_config

LIMITS = SocketLimits(0.5, 2.0, 1 << 20)


class HandLearner:
    """A learner written out by hand: it welcomes, leases without end, acknowledges, and notes what it was told."""

    def __init__(self, folder: Path) -> None:
        data = b"weights" * 100
        path = folder / "weights"
        path.write_bytes(data)
        hashes = (hash_chunk(data),)
        self.incarnation = 1
        self.snapshot = Snapshot(
            path,
            Manifest(
                Version(run_id="run", incarnation=1, step=0, hash=hash_of_chunks(hashes)), len(data), 1 << 20, hashes
            ),
        )
        self.newest: Version | None = self.snapshot.version
        self.refuses = ""
        self.num_leases = 1_000_000
        self.evaluation: Version | None = None
        self.heard: list[Message] = []
        self._context: zmq.Context[Any] = zmq.Context()
        self._weights = WeightServer(self._context, host="127.0.0.1", port=0, limits=LIMITS)
        self._weights.publish(self.snapshot, pin=True)
        self._socket = open_socket(self._context, zmq.ROUTER, LIMITS)
        self.port = bind(self._socket, "127.0.0.1", 0, "actors")
        self._num_granted = 0
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_closing.set()
        self._thread.join(timeout=5)
        self._weights.close()
        self._context.destroy(linger=0)

    def _serve(self) -> None:
        while not self._is_closing.is_set():
            if self._socket.poll(50):
                peer, *frames = self._socket.recv_multipart()
                message = decode(frames, max_bytes=1 << 20).message
                self.heard.append(message)
                context = {"run_id": "run", "incarnation": self.incarnation, "request_id": message.request_id}
                self._socket.send_multipart([peer, *encode(self._answer(message).model_copy(update=context))])

    def _answer(self, message: Message) -> Message:
        if isinstance(message, Hello):
            if self.refuses:
                return Refusal(reason=self.refuses, is_final=True)
            ports = {"weights_port": self._weights.port, "announcements_port": self._weights.announcements_port}
            return Welcome(newest=self.newest, **ports)
        if message.incarnation != self.incarnation:
            return Refusal(reason="say hello first", is_final=False, wants_hello=True)
        if isinstance(message, WorkRequest):
            room = min(message.capacity, self.num_leases - self._num_granted) if message.serving else 0
            leases = tuple(self._lease() for _ in range(room))
            return Work(newest=self.newest, leases=leases, evaluation=self.evaluation)
        if isinstance(message, EvaluationResult):
            self.evaluation = None
        return Receipt(outcome=Outcome.COMMITTED)

    def _lease(self) -> Lease:
        self._num_granted += 1
        return Lease(
            lease_id=f"lease-{self._num_granted}", prompt_index=self._num_granted, group_size=2, temperature=1.0,
            max_tokens=8, seed=7,
        )  # fmt: skip

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in tuple(self.heard) if isinstance(message, kind)]

    @property
    def states(self) -> list[ActorState]:
        """In the order in which they were told, repeats left out."""
        told: list[ActorState] = []
        for request in self.of(WorkRequest):
            told += [request.state] if told[-1:] != [request.state] else []
        return told

    def wait_until(self, is_reached: Callable[[], bool], limit_s: float = 60) -> None:
        deadline = time.monotonic() + limit_s
        while not is_reached():
            assert time.monotonic() < deadline, self.heard[-5:]
            time.sleep(0.02)


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[HandLearner]:
    made = HandLearner(tmp_path)
    yield made
    made.close()


class Sums:
    """An environment whose scores may be late."""

    full_reward = 1.0

    def __init__(self, score_s: float = 0.0) -> None:
        self.score_s = score_s

    def episode(self, split: str, index: int) -> SingleTurnEpisode:
        return SlowEpisode(self, None, [ChatMessage(role="user", content=f"{index} + 1 =")])

    def category(self, task: object) -> str:
        return ""

    async def late_score(self) -> float:
        await asyncio.sleep(self.score_s)
        return 1.0


class SlowEpisode(SingleTurnEpisode):
    async def answer(self, text: str, *, is_truncated: bool) -> Turn:
        return Turn(await self._environment.late_score())


class FailingEngine(SimulatedEngine):
    """Fails as often as it is told to, in the way it is told to."""

    fault: Exception | None = None
    num_faults = 10**6
    never_starts = never_answers_probes = False
    pressure = Pressure()

    async def start(self) -> None:
        if self.never_starts:
            await asyncio.Event().wait()

    async def sample(self, prompt: Sequence[int], sampling: SamplingParameters) -> Answer:
        await asyncio.sleep(0)
        if self.fault and self.num_faults > 0:
            self.num_faults -= 1
            raise self.fault
        return await super().sample(prompt, sampling)

    async def probe(self) -> None:
        if self.never_answers_probes:
            await asyncio.Event().wait()


class Bench:
    """An actor in this process, with an engine that fails on demand."""

    def __init__(self, learner: HandLearner, model: Path, folder: Path, environment: Sums, **limits: Any) -> None:
        limits = {"max_groups_in_flight": 1, "tokens_per_s": 10_000, **limits}
        actor = Actor(engine="simulated", max_model_tokens=256, **limits)
        network = Network(port=learner.port, heartbeat_s=0.5, silence_s=2.0, request_timeout_s=5.0)
        chat = Chat(model)
        self.engine = FailingEngine(actor=actor, vocab_size=chat.vocab_size, end_tokens=chat.end_tokens)
        self.metrics = ActorMetrics()
        guard = EngineGuard(self.engine, actor, self.metrics.registry)
        rollout = Rollout(guard, environment, chat, actor)
        self._make = lambda: self._connect(Parts(self.engine, guard, environment, rollout, chat), network, folder)
        self._actor = actor

    def _connect(self, parts: Parts, network: Network, folder: Path) -> None:
        hello = Hello(peer_id="a", session="s", role=Role.ACTOR, engine="simulated", config_hash="agreed")
        self.link = LearnerLink(network, hello)
        self._fitter = Fitter(self.engine, network, folder, name="a", in_flight=True, welcome=lambda: self.link.welcome)
        self.worker = Worker(parts, self.link, self._fitter, self.metrics, self._actor)
        self._fitter.on_loaded = self.worker.note_load

    def run(self, until: Callable[[], bool] = lambda: False) -> str:
        """Why it ended by itself, or by `drain` once `until` holds."""

        async def run() -> str:
            async with asyncio.timeout(60):
                self._make()
                running = asyncio.create_task(self.worker.run())
                try:
                    while not running.done() and not until():
                        await asyncio.wait([running], timeout=0.02)
                    self.worker.drain()
                    return await running
                finally:
                    await self._fitter.close()
                    await self.link.close()

        return asyncio.run(run())

    def counted(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(name) or 0.0


class EvaluatorBench(Bench):
    """An evaluator in its place, which owes two answers."""

    def _connect(self, parts: Parts, network: Network, folder: Path) -> None:
        hello = Hello(peer_id="e", session="s", role=Role.EVALUATOR, engine="simulated", config_hash="agreed")
        self.link = LearnerLink(network, hello)
        self._fitter = Fitter(self.engine, network, folder, name="e", in_flight=True, welcome=lambda: self.link.welcome)
        task = EvaluationTask("sums", parts.environment, range(2))
        plan = Plan([task], SamplingParameters(0.0, 4), samples_per_problem=1, max_concurrency=2, seed=0)
        self.worker = EvaluationService(  # pyright: ignore
            parts, self.link, self._fitter, plan, drain_s=1.0, metrics=EvaluatorMetrics()
        )


@pytest.fixture
def make_bench(learner: HandLearner, tiny_model: Path, tmp_path: Path) -> Callable[..., Bench]:
    return lambda environment=None, **limits: Bench(
        learner, tiny_model, tmp_path / "snapshots", environment or Sums(), **limits
    )


class ActorProcess:
    """`chord-actor`, or another module, with the simulated engine."""

    def __init__(self, learner: HandLearner, model: Path, folder: Path, module: str = "actors", **actor: Any) -> None:
        config = write_config(
            folder, model, actor={"engine": "simulated", "max_groups_in_flight": 2, **actor},
            network={"port": learner.port, "host": "127.0.0.1"},
        )  # fmt: skip
        command = [sys.executable, "-m", module, "--config", str(config), "--name", "actor-0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> "ActorProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask_to_stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


def test_a_drained_actor_ends_what_it_began_sends_it_and_says_goodbye(
    learner: HandLearner, tiny_model: Path, tmp_path: Path
) -> None:
    with ActorProcess(learner, tiny_model, tmp_path, tokens_per_s=8.0, drain_s=60.0) as actor:
        learner.wait_until(lambda: any(len(request.held) == 2 for request in learner.of(WorkRequest)))
        held = learner.of(WorkRequest)[-1].held
        actor.ask_to_stop()
        code, said = actor.end()
    assert code == 0, said
    assert learner.states == [ActorState.STARTING, ActorState.FITTING, ActorState.SERVING, ActorState.DRAINING]
    assert set(held) <= {header.lease_id for header in learner.of(GroupHeader)}
    assert isinstance(learner.heard[-1], Goodbye)
    first_drained = next(at for at, request in enumerate(learner.of(WorkRequest)) if request.state == "draining")
    assert all(request.capacity == 0 for request in learner.of(WorkRequest)[first_drained:])


def test_a_second_sigterm_ends_an_actor_at_once_and_gives_its_leases_back(
    learner: HandLearner, tiny_model: Path, tmp_path: Path
) -> None:
    with ActorProcess(learner, tiny_model, tmp_path, tokens_per_s=0.001, drain_s=600.0) as actor:
        learner.wait_until(lambda: any(request.held for request in learner.of(WorkRequest)))
        actor.ask_to_stop()
        learner.wait_until(lambda: ActorState.DRAINING in learner.states)
        actor.ask_to_stop()
        code, said = actor.end()
    assert code == 0, said
    assert not learner.of(GroupHeader)
    assert isinstance(learner.heard[-1], Goodbye)


def test_a_drained_evaluator_ends_the_evaluation_that_it_began(
    learner: HandLearner, tiny_model: Path, tmp_path: Path
) -> None:
    learner.evaluation = learner.newest
    options = {"tokens_per_s": 8.0, "drain_s": 60.0}
    with ActorProcess(learner, tiny_model, tmp_path, "actors.evaluator", **options) as evaluator:
        learner.wait_until(lambda: ActorState.SERVING in learner.states)
        evaluator.ask_to_stop()
        code, said = evaluator.end()
    assert code == 0, said
    told = [state for state in learner.states if state is not ActorState.FITTING]
    assert told == [ActorState.STARTING, ActorState.SERVING, ActorState.DRAINING]
    assert [result.scores[0].num_problems for result in learner.of(EvaluationResult)] == [8]
    assert isinstance(learner.heard[-1], Goodbye)


def test_a_second_sigterm_ends_an_evaluator_at_once_and_leaves_its_evaluation_owed(
    learner: HandLearner, tiny_model: Path, tmp_path: Path
) -> None:
    learner.evaluation = learner.newest
    options = {"tokens_per_s": 0.001, "drain_s": 600.0}
    with ActorProcess(learner, tiny_model, tmp_path, "actors.evaluator", **options) as evaluator:
        learner.wait_until(lambda: ActorState.SERVING in learner.states)
        evaluator.ask_to_stop()
        learner.wait_until(lambda: ActorState.DRAINING in learner.states)
        evaluator.ask_to_stop()
        code, said = evaluator.end()
    assert code == 0, said
    assert learner.of(EvaluationResult) == []
    assert learner.evaluation == learner.newest
    assert isinstance(learner.heard[-1], Goodbye)


def test_what_is_unfinished_after_drain_s_is_given_back(
    learner: HandLearner, make_bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench(Sums(score_s=600), drain_s=0.1, score_timeout_s=600.0)
    assert bench.run(until=lambda: any(r.held for r in learner.of(WorkRequest))) == "asked to stop"
    assert "giving back ['lease-1'] unfinished" in caplog.text
    assert isinstance(learner.heard[-1], Goodbye)


def test_a_wrong_configuration_is_told_while_the_engine_still_starts(
    learner: HandLearner, make_bench: Callable[..., Bench]
) -> None:
    learner.refuses = "configuration: a has hash agreed, expected another"
    bench = make_bench()
    bench.engine.never_starts = True
    with pytest.raises(OperatorError, match="configuration: a has hash agreed, expected another"):
        bench.run()


def test_an_engine_that_does_not_start_in_time_is_named(learner: HandLearner, make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(start_timeout_s=3.0)
    bench.engine.never_starts = True
    with pytest.raises(
        ComponentFailure, match=r"waited \d+ s for its start from the simulated engine, expected it within 3 s"
    ):
        bench.run()
    assert learner.states == [ActorState.STARTING]
    assert all(request.capacity == 0 for request in learner.of(WorkRequest))


def test_answers_that_fail_cost_their_lease_and_not_the_actor(
    learner: HandLearner, make_bench: Callable[..., Bench]
) -> None:
    bench = make_bench()
    bench.engine.fault, bench.engine.num_faults = RuntimeError("out of pages"), 2
    assert bench.run(until=lambda: len(learner.of(GroupHeader)) > 2) == "asked to stop"
    failures = learner.of(LeaseFailure)
    assert {failure.reason for failure in failures} == {"engine: simulated: RuntimeError: out of pages"}
    assert 1 <= len(failures) <= 2
    assert bench.counted("chord_actor_request_failures_total") == 2
    assert bench.counted("chord_actor_probe_failures_total") == 0


def most_at_a_time(learner: HandLearner) -> int:
    """Groups that the actor had or asked for, in any request."""
    return max((len(request.held) + request.capacity for request in learner.of(WorkRequest)), default=0)


def test_an_actor_takes_on_more_groups_while_its_engine_has_room(
    learner: HandLearner, make_bench: Callable[..., Bench]
) -> None:
    bench = make_bench(max_groups_in_flight=0)
    bench.run(until=lambda: most_at_a_time(learner) > FIRST_GROUPS + 4)
    assert bench.counted("chord_actor_concurrency_groups") > FIRST_GROUPS + 4


def test_an_actor_never_takes_on_more_groups_than_it_may(
    learner: HandLearner, make_bench: Callable[..., Bench]
) -> None:
    make_bench(max_groups_in_flight=6).run(until=lambda: len(learner.of(GroupHeader)) > 40)
    assert most_at_a_time(learner) == 6


def test_an_actor_whose_engine_is_overfull_comes_down_to_one_group_and_never_to_none(
    learner: HandLearner, make_bench: Callable[..., Bench]
) -> None:
    bench = make_bench(max_groups_in_flight=0)
    bench.engine.pressure = Pressure(kv_cache_frac=1.0, waiting_frac=0.9)
    bench.run(until=lambda: len(learner.of(GroupHeader)) > 20)
    assert bench.counted("chord_actor_concurrency_groups") == 1
    *_, last = (request for request in learner.of(WorkRequest) if request.state is ActorState.SERVING)
    assert len(last.held) + last.capacity <= 1
    assert bench.counted("chord_actor_kv_cache_usage_ratio") == 1


def test_an_actor_without_work_is_idle_and_says_for_how_long(
    learner: HandLearner, make_bench: Callable[..., Bench]
) -> None:
    learner.num_leases = 1
    bench = make_bench()
    bench.run(until=lambda: any(request.idle_s > 0.5 for request in learner.of(WorkRequest)))
    told = [request.idle_s for request in learner.of(WorkRequest)]
    assert told == sorted(told)
    assert told[0] == 0
    assert bench.counted("chord_actor_idle_seconds_total") > 0.5


def test_an_actor_is_ready_without_a_lease_but_not_on_weights_of_long_ago_nor_when_it_drains(
    learner: HandLearner, make_bench: Callable[..., Bench]
) -> None:
    learner.num_leases = 0
    bench, said = make_bench(), list[str]()

    def look() -> bool:
        said.append(bench.worker.why_not_ready(max_lag=2))
        if not said[-1]:  # ready: now the learner names weights that nobody can fetch
            learner.newest = learner.snapshot.version.model_copy(update={"step": 3, "hash": "b" * 32})
        return "behind" in said[-1]

    bench.run(until=look)
    assert said[0].startswith("the actor is starting: no version yet")
    assert "" in said
    assert said[-1].startswith("the actor's weights are 3 versions behind, expected at most 2: version 0")
    assert bench.worker.why_not_ready(max_lag=2).startswith("the actor is draining")
    assert bench.counted("chord_actor_version_lag_steps") == 3
    assert bench.counted("chord_actor_version_step") == 0


def test_an_engine_that_fails_again_and_again_ends_the_actor_with_one_line(
    learner: HandLearner, make_bench: Callable[..., Bench]
) -> None:
    bench = make_bench()
    bench.engine.fault = RuntimeError("out\nof pages")
    with pytest.raises(ComponentFailure) as ended:
        bench.run()
    line = str(ended.value)
    assert line.startswith(
        "the simulated engine is beyond help: 3 failures in a row, last request: RuntimeError: out of"
    )
    assert "probe failures 0" in line
    assert "\n" not in line
    assert learner.of(Goodbye)[-1].reason == line


def test_a_dead_engine_ends_the_actor_at_once(learner: HandLearner, make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.engine.fault = EngineDead("its process has ended")
    with pytest.raises(ComponentFailure, match="the simulated engine is beyond help: its process has ended"):
        bench.run()


def test_an_engine_that_leaves_probes_unanswered_ends_the_actor(
    learner: HandLearner, make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.guard.PROBE_EVERY_S", 0.01)
    bench = make_bench(probe_timeout_s=0.05)
    bench.engine.never_answers_probes = True
    with pytest.raises(ComponentFailure, match=r"3 failures in a row, last probe: waited \d+ s for .*probe failures 3"):
        bench.run()
    assert bench.counted("chord_actor_probe_failures_total") == 3


def test_an_environment_that_does_not_answer_costs_the_lease_and_is_named(
    learner: HandLearner, make_bench: Callable[..., Bench]
) -> None:
    bench = make_bench(Sums(score_s=600), score_timeout_s=0.1)
    bench.run(until=lambda: bool(learner.of(LeaseFailure)))
    reason = learner.of(LeaseFailure)[0].reason
    assert re.match(r"WaitTimeout: waited \d+ s for a score from the environment, expected it within 0 s", reason)
    assert bench.counted("chord_actor_request_failures_total") == 0


def test_an_environment_that_does_not_answer_costs_the_evaluation_and_not_the_evaluator(
    learner: HandLearner, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner.evaluation = learner.newest
    sums = Sums(score_s=600)
    bench = EvaluatorBench(learner, tiny_model, tmp_path / "snapshots", sums, score_timeout_s=2.0)

    def look() -> bool:
        if re.search(r"failed and is owed still: waited \d s for a score from the environment", caplog.text):
            sums.score_s = 0.0
        return bool(learner.of(EvaluationResult))

    assert bench.run(until=look) == "asked to stop"
    assert learner.of(EvaluationResult)[0].scores[0].num_correct == 2


def test_an_environment_that_never_answers_ends_the_evaluator_which_a_new_start_may_mend(
    learner: HandLearner, tiny_model: Path, tmp_path: Path
) -> None:
    learner.evaluation = learner.newest
    bench = EvaluatorBench(learner, tiny_model, tmp_path / "snapshots", Sums(score_s=600), score_timeout_s=0.1)
    with pytest.raises(ComponentFailure, match="3 evaluations in a row failed, the last: waited 0 s for a score"):
        bench.run()


def test_after_a_learners_restart_an_actor_is_stale_until_its_weights_are_known_to_be_right(
    learner: HandLearner, make_bench: Callable[..., Bench]
) -> None:
    bench = make_bench()
    learner.num_leases = 0

    def restart() -> bool:
        if learner.states[-1:] == [ActorState.SERVING] and learner.incarnation == 1:
            learner.newest, learner.incarnation = None, 2
        if learner.states[-1:] == [ActorState.STALE]:
            learner.newest = learner.snapshot.version.model_copy(update={"incarnation": 2})
        return learner.states[-2:] == [ActorState.STALE, ActorState.SERVING]

    bench.run(until=restart)
    told = [state for state in learner.states if state is not ActorState.DRAINING]
    assert told[-3:] == [ActorState.SERVING, ActorState.STALE, ActorState.SERVING]


def test_failures_of_answers_that_were_under_way_together_count_once() -> None:
    async def run() -> EngineGuard:
        actor = Actor(max_model_tokens=64)
        engine = FailingEngine(actor=actor, vocab_size=10, end_tokens=frozenset())
        engine.fault = RuntimeError("a hiccup")
        guard = EngineGuard(engine, actor, CollectorRegistry())
        answers = [guard.sample([1], SamplingParameters(1.0, 4)) for _ in range(8)]
        await asyncio.gather(*answers, return_exceptions=True)
        watching = asyncio.create_task(guard.watch())
        _, pending = await asyncio.wait([watching], timeout=0)
        assert pending
        watching.cancel()
        return guard

    assert asyncio.run(run()).num_request_failures == 8
