"""The train loop, on every rank: rows → optimizer step → version, until the last step or the wish to stop.

Rank 0 consumes committed groups and expert rows; it waits for actors (with a limit that names them); other ranks wait
for rank 0.
"""

import logging
import signal
import time
from contextlib import suppress
from pathlib import Path

from common.config.schema import Config
from learner.checkpoints import Checkpoints
from learner.final import EXPORT, export_policy
from learner.guest import Guest
from learner.handover import kept_policy, require_kept_policy
from learner.host import Host
from learner.meter import Meter
from learner.peers import Labour
from learner.ranks import Ranks
from learner.recorder import describe_bias, describe_groups
from learner.source import Stopped
from learner.step_rows import StepRows
from learner.trainer import Taken, Trainer, prepare_device

log = logging.getLogger(__name__)

BIAS_STEPS = 64
"""What was sampled is compared with what was trained over the groups of so many steps."""


class Conductor:
    """One rank of the learner, from start to end."""

    def __init__(self, config: Config) -> None:
        self._config = config
        device = prepare_device(config)
        learner = config.learner
        longest_wait_s = max(learner.start_timeout_s, learner.group_timeout_s, learner.eval_timeout_s)
        self._ranks = Ranks(device, timeout_s=longest_wait_s + learner.step_timeout_s)
        self._host = self._guest = None
        if self._ranks.is_first:
            self._host = Host(config, on_wait=self._ranks.say_not_yet)
        else:
            self._guest = Guest(config, self._ranks.rank, limit_s=longest_wait_s + 2 * learner.step_timeout_s)
            self._ranks.on_meeting = self._guest.meet
        self._trainer = Trainer(config, self._ranks, device)
        self._checkpoints = Checkpoints(Path(config.run.dir) / "checkpoints", keep=learner.keep_checkpoints)
        self._meter = Meter(time.monotonic(), Labour())
        self._stop_on_signals()  # before, a signal ends a rank at once: it may stand in a call that hears none

    def run(self) -> bool:
        """Train to the last step; True where it was reached, False where the run was asked to stop before."""
        step = self._restore()
        if self._host and step < self._config.learner.num_steps:
            self._host.run_dir.forget_results()
        saved = step
        self._publish(step)
        if self._host:
            self._host.publisher.settle()  # nothing is trained on other weights than the run had
        last = self._config.learner.num_steps
        while step < last and self._take_step(step):
            step += 1
            is_handover = step == self._config.sft_steps and step < last
            if is_handover:
                if not self._hand_over(step):
                    saved = step  # a checkpoint of this step would say that the handover is over
                    break
            else:
                self._publish(step)
            if is_handover or step % self._config.learner.checkpoint_every_steps == 0:
                self._checkpoint(step)
                saved = step
        if saved < step:
            self._checkpoint(step)
        self._finish(step)
        return step == last

    def close(self) -> None:
        if house := self._host or self._guest:
            house.close()
        self._ranks.close()

    def _restore(self) -> int:
        """Load the newest good checkpoint, if any; returns the optimizer steps completed."""
        found = None
        if self._host:
            can_begin_anew = self._host.ledger.history.first_whole_step() == 0
            found = self._checkpoints.newest_good(can_begin_anew=can_begin_anew)
            self._host.check_history(found.step if found else 0)
        step = int(self._ranks.share_number(found.step if found else -1))
        if step >= 0:
            self._trainer.restore(self._checkpoints.path_of(step))
            log.info("resumed from the checkpoint of step %d", step)
        return max(step, 0)

    def _take_step(self, step: int) -> bool:
        """One optimizer step; False where the run was asked to stop instead."""
        rows = self._next_rows(step)
        mu = self._ranks.share_number(rows.mu if rows else -1.0)
        if mu < 0:
            return False
        if self._guest:
            self._guest.begin(step)
        taken = self._trainer.take(step, rows.rows if rows else None, mu=mu)
        if self._host and rows:
            self._settle()
            self._host.source.record_uses(rows.composition)
            self._record(rows, taken)
        return True

    def _next_rows(self, step: int) -> StepRows | None:
        if not self._host:
            return None
        self._host.step = step
        if self._host.ledger.history.batch(step) is None:
            self._host.open_for_work()
            self._host.phase = "training"
        else:
            self._host.phase = "replaying"
        try:
            self._host.check_for_end()
            return self._host.source.next_rows(step)
        except Stopped:
            return None

    def _hand_over(self, step: int) -> bool:
        """Supervised fine-tuning is over: its last policy, or its best, goes on as version `step`.

        False where the run was asked to stop before one was chosen.
        """
        chosen = -1
        if self._host:
            self._host.inbox.grants_leases = False  # the last policy of this phase may not be the one that goes on
            chosen = self._host.handover.choice.chosen if self._host.handover.choice else -1
        is_new = self._ranks.share_number(chosen) < 0
        if is_new:
            self._publish(step)
        if self._host:
            with suppress(Stopped):
                chosen = self._host.choose_policy(self._host.publisher.settle()) if is_new else chosen
                choice = self._host.handover.choice
                assert choice, "just made, or read above"
                require_kept_policy(self._config, choice, self._host.ledger.history)
        chosen = int(self._ranks.share_number(chosen))
        if chosen < 0:
            return False
        self._trainer.begin_anew(kept_policy(self._config, chosen))
        if not (is_new and chosen == step):
            self._publish(step, replaces=True)
        return True

    def _publish(self, step: int, *, replaces: bool = False) -> None:
        """Make version `step` of the policy, beside what comes next; `replaces`: it may have been another policy."""
        started = time.monotonic()
        tensors = self._trainer.published_tensors()
        if not self._host:
            return
        self._host.step = step
        is_replay = step < self._config.learner.num_steps and self._host.ledger.history.batch(step) is not None
        self._host.publisher.publish(tensors, step, is_announced=not is_replay, replaces=replaces)
        self._publish_s = time.monotonic() - started

    def _settle(self) -> None:
        """No step is recorded before the version that it began with: a crash leaves none out."""
        assert self._host
        started = time.monotonic()
        self._host.publisher.settle()
        self._publish_s += time.monotonic() - started

    def _checkpoint(self, step: int) -> None:
        began = time.monotonic()
        if self._host:
            self._host.phase = "checkpointing"
            self._checkpoints.begin(step)
        self._ranks.barrier()
        with self._checkpoints.reporting():
            self._trainer.save(self._checkpoints.partial_path(step))
        parameters_hash = self._trainer.parameters_hash()
        self._ranks.barrier()
        if self._host:
            self._host.publisher.settle()  # a start from the checkpoint compares with what is noted of its version
            self._checkpoints.finish(step, parameters_hash=parameters_hash)
            self._host.recorder.prometheus.checkpoint_s.observe(time.monotonic() - began)
            if not self._config.learner.keep_arrivals:
                self._host.ledger.prune_bodies(self._checkpoints.covered_step)

    def _finish(self, step: int) -> None:
        if not self._host:
            return
        num_steps = self._config.learner.num_steps
        snapshot = self._host.publisher.settle()
        try:
            if step == num_steps:
                self._host.phase = "exporting"
                base, final = Path(self._config.model.path), self._host.run_dir.final
                self._host.ledger.set_fact(EXPORT, export_policy(snapshot, base=base, destination=final))
                self._host.open_for_work()
                self._host.phase = "evaluating"
                self._host.wait_for_evaluations()
        except Stopped:
            pass
        self._host.recorder.write_summary(num_steps=num_steps)
        if step == num_steps:
            self._host.say_farewell()
        self._host.phase = "ended"

    def _record(self, rows: StepRows, taken: Taken) -> None:
        host = self._host
        assert host
        step, report, train_s, waited_s = rows.composition.step, taken.report, taken.train_s, host.source.waited_s
        meter = Meter(time.monotonic(), host.inbox.peers.labour)
        actor_ids = host.ledger.history.actor_ids(rows.composition.group_ids)
        host.excerpts.add(rows, taken.logprobs, actor_ids)
        host.recorder.add_step(
            {
                "step": step + 1,
                "mu": rows.mu,
                "lr": taken.lr,
                **report.fields,
                "num_expert_rows": len(rows.composition.expert_row_ids),
                **describe_groups(rows.groups, step=step, actor_ids=actor_ids, with_signal=rows.num_groups_with_signal),
                **describe_bias(host.ledger.account, last=BIAS_STEPS * self._config.learner.groups_per_step),
                "wait_s": waited_s,
                "train_s": train_s,
                "publish_s": self._publish_s,
                "learner_tokens_per_s": (report.num_policy_tokens + report.num_expert_tokens) / train_s,
                **meter.since(self._meter, waited_s=waited_s),
                "weight_bytes_sent": host.server.sent_bytes,
                "trajectory_bytes_received": host.inbox.received_bytes,
            }
        )
        self._meter = meter

    def _stop_on_signals(self) -> None:
        """SIGTERM and Ctrl-C end the run after the step in progress; rank 0 tells the others."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._host.stop() if self._host else None)
