"""The train loop, on every rank: rows → optimizer step → version, until the last step or the wish to stop.

Rank 0 consumes committed groups and expert rows; it waits for actors (with a limit that names them); other ranks wait
for rank 0.
"""

import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common.config.schema import Config
from common.weights.snapshot import Snapshot
from learner.batch import TrainBatch, build_batch
from learner.checkpoints import Checkpoints
from learner.final import export_policy
from learner.host import Host
from learner.objective.importance import Correction
from learner.policy_model import load_policy_model, resolve_compute_dtype
from learner.ranks import Ranks
from learner.recorder import describe_groups
from learner.rows import Row, deal, micro_batches, split_to_budget, unshare
from learner.schedule import lr_at, mu_of
from learner.source import StepRows, Stopped
from learner.train_engine import Objective, OptimizerSettings, StepReport, TrainEngine

log = logging.getLogger(__name__)

PUBLISHED_DTYPE = torch.bfloat16
STEP_S = 1200.0
"""Longest time that other ranks grant rank 0 beyond its waits: a step, a checkpoint, a snapshot."""


@dataclass
class Meter:
    """Rates between two steps: what all actors sampled, and how long they idled."""

    time: float
    sampled_tokens: int = 0
    idle_s: float = 0.0


class Conductor:
    """One rank of the learner, from start to end."""

    def __init__(self, config: Config) -> None:
        self._config = config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if config.learner.num_threads:
            torch.set_num_threads(config.learner.num_threads)
        torch.manual_seed(config.run.seed)
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        learner = config.learner
        longest_wait_s = max(learner.start_timeout_s, learner.group_timeout_s, learner.eval_timeout_s)
        self._ranks = Ranks(device, timeout_s=longest_wait_s + STEP_S)
        self._host = Host(config) if self._ranks.is_first else None
        self._stop_on_signals()
        model = load_policy_model(
            Path(config.model.path),
            dtype=getattr(torch, config.model.dtype),
            head_chunk_tokens=config.learner.head_chunk_tokens,
        )
        model.compute_dtype = resolve_compute_dtype(config.learner.compute_dtype, device)
        algorithm = config.algorithm
        correction = Correction(
            kind=algorithm.correction, clip_low=algorithm.clip_low, clip_high=algorithm.clip_high, cap=algorithm.cap,
            band=algorithm.band,
        )  # fmt: skip
        settings = OptimizerSettings(
            learner.weight_decay, learner.adam_betas, learner.max_grad_norm, learner.zero_stage
        )
        self._engine = TrainEngine(
            model, self._ranks, device, Objective(correction, algorithm.expert_weighting), settings
        )
        self._checkpoints = Checkpoints(Path(config.run.dir) / "checkpoints", keep=learner.keep_checkpoints)
        self._meter = Meter(time.monotonic())

    def run(self) -> bool:
        """Train to the last step; True where it was reached, False where the run was asked to stop before."""
        step = self._restore()
        saved = step
        snapshot = self._publish(step)
        last = self._config.learner.num_steps
        while step < last and self._take_step(step):
            step += 1
            snapshot = self._publish(step)
            if step % self._config.learner.checkpoint_every_steps == 0:
                self._checkpoint(step)
                saved = step
        if saved < step:
            self._checkpoint(step)
        self._finish(step, snapshot)
        return step == last

    def close(self) -> None:
        if self._host:
            self._host.close()
        self._ranks.close()

    def _restore(self) -> int:
        """Load the newest good checkpoint, if any; returns the optimizer steps completed."""
        found = self._checkpoints.newest_good() if self._host else None
        step = self._ranks.share_number(found.step if found else -1)
        if step >= 0:
            self._engine.restore(Path(self._config.run.dir) / "checkpoints" / f"step-{step:08d}")
            log.info("resumed from the checkpoint of step %d", step)
        if self._host:
            self._host.recorder.rewind(max(step, 0))
        return max(step, 0)

    def _take_step(self, step: int) -> bool:
        """One optimizer step; False where the run was asked to stop instead."""
        started = time.monotonic()
        rows = self._next_rows(step)
        if not self._ranks.share_number(1 if rows else 0):
            return False
        shares = self._deal(rows.rows) if rows else None
        batches = self._ranks.deal_batches(shares)
        train_started = time.monotonic()
        algorithm, learner = self._config.algorithm, self._config.learner
        mu = mu_of(algorithm, step)
        lr = lr_at(
            step,
            peak=learner.lr,
            warmup_steps=learner.lr_warmup_steps,
            num_steps=learner.num_steps,
            schedule=learner.lr_schedule,
        )
        report = self._engine.step(batches, mu=mu, lr=lr)
        train_s = time.monotonic() - train_started
        if self._host and rows:
            self._host.ledger.finish_batch(step)
            self._host.source.record_uses(rows.composition)
            self._record(rows, report, lr=lr, train_s=train_s, started=started)
        return True

    def _next_rows(self, step: int) -> StepRows | None:
        if not self._host:
            return None
        self._host.step = step
        if self._host.ledger.batch(step) is None:
            self._host.open_for_work()
            self._host.phase = "training"
        else:
            self._host.phase = "replaying"
        try:
            self._host.check_for_end()
            return self._host.source.next_rows(step)
        except Stopped:
            return None

    def _deal(self, rows: Sequence[Row]) -> list[list[TrainBatch]]:
        budget = self._config.learner.micro_batch_tokens
        rows = rows if self._config.learner.share_prompts else unshare(rows)
        rows = [part for row in rows for part in split_to_budget(row, budget)]
        return [[build_batch(some) for some in micro_batches(share, budget)] for share in deal(rows, self._ranks.count)]

    def _publish(self, step: int) -> Snapshot | None:
        """Make version `step` of the policy."""
        started = time.monotonic()
        tensors = self._engine.tensors(PUBLISHED_DTYPE)
        if not self._host:
            return None
        self._host.step = step
        snapshot = self._host.publisher.publish(tensors, step)
        self._publish_s = time.monotonic() - started
        return snapshot

    def _checkpoint(self, step: int) -> None:
        if self._host:
            self._host.phase = "checkpointing"
            self._checkpoints.begin(step)
        self._ranks.barrier()
        self._engine.save(self._checkpoints.partial_path(step))
        self._ranks.barrier()
        if self._host:
            self._checkpoints.finish(step)
            kept = self._checkpoints.all()
            if len(kept) == self._config.learner.keep_checkpoints:
                self._host.ledger.prune_bodies(kept[0].step)

    def _finish(self, step: int, snapshot: Snapshot | None) -> None:
        if not self._host:
            return
        num_steps = self._config.learner.num_steps
        try:
            if step == num_steps and snapshot:
                self._host.phase = "exporting"
                export_policy(snapshot, base=Path(self._config.model.path), destination=self._host.run_dir.final)
                self._host.phase = "evaluating"
                self._host.wait_for_evaluations()
        except Stopped:
            pass
        self._host.recorder.write_summary(num_steps=num_steps)
        self._host.say_farewell()
        self._host.phase = "ended"

    def _record(self, rows: StepRows, report: StepReport, *, lr: float, train_s: float, started: float) -> None:
        host = self._host
        assert host
        step = rows.composition.step
        metrics = report.metrics
        square = metrics["policy_ratio_sq_mean"]
        now, peers = time.monotonic(), host.inbox.peers
        meter = Meter(now, peers.sampled_tokens, sum(peer.idle_s for peer in peers.all()))
        elapsed = max(now - self._meter.time, 1e-9)
        host.recorder.add_step(
            {
                "step": step + 1,
                "mu": rows.mu,
                "lr": lr,
                **metrics,
                "policy_ess_frac": metrics["policy_ratio_mean"] ** 2 / square if square else None,
                "num_policy_tokens": report.num_policy_tokens,
                "num_expert_tokens": report.num_expert_tokens,
                "num_expert_rows": len(rows.composition.expert_row_ids),
                **describe_groups(rows.groups, step=step, actor_ids=host.ledger.actor_ids(rows.composition.group_ids)),
                "sampled_answer_tokens_mean": host.inbox.mean_answer_tokens,
                "wait_s": rows.wait_s,
                "train_s": train_s,
                "publish_s": self._publish_s,
                "step_s": now - started,
                "learner_tokens_per_s": (report.num_policy_tokens + report.num_expert_tokens) / train_s,
                "actor_tokens_per_s": max(meter.sampled_tokens - self._meter.sampled_tokens, 0) / elapsed,
                "learner_wait_frac": rows.wait_s / (now - started),
                "actor_idle_frac": min(
                    max(meter.idle_s - self._meter.idle_s, 0.0) / elapsed / max(len(peers.actors()), 1), 1.0
                ),
                "weight_bytes_sent": host.server.sent_bytes,
                "trajectory_bytes_received": host.inbox.received_bytes,
            }
        )
        self._meter = meter

    def _stop_on_signals(self) -> None:
        """SIGTERM and Ctrl-C end the run after the step in progress; rank 0 tells the others."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._host.is_stopping.set() if self._host else None)
