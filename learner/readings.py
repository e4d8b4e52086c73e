"""The learner's Prometheus metrics that are read off its parts when they are scraped."""

import shutil
import time
from collections import Counter as Tally
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from common.config.schema import Config
from common.metrics import Reading
from common.wire.connections import Closing
from common.wire.messages import ActorState, Role
from learner.checkpoints import Checkpoint
from learner.ledger.leases import DropReason

if TYPE_CHECKING:
    from learner.host import Host

AUTHENTICATION = (Closing.AUTHENTICATION, Closing.REVOKED, Closing.IDENTITY)
SELDOM_S = 60.0
"""Between two looks at what takes time to count."""

Labelled = Mapping[tuple[str, ...], float]


def readings_of(host: "Host", config: Config) -> list[Reading]:
    """Neither is touched before a reading is."""
    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    return [
        Reading(
            gauge, "chord_learner_steps_planned", "Optimizer steps of the whole run.",
            lambda: config.learner.num_steps,
        ),
        Reading(
            gauge, "chord_staleness_bound_steps", "Largest staleness at which a group is trained.",
            lambda: config.algorithm.max_staleness,
        ),
        Reading(
            gauge, "chord_groups", "Groups that are leased, committed (waiting to be trained) or in training.",
            lambda: groups(host), labels=["state"],
        ),
        Reading(
            gauge, "chord_groups_held_max", "Groups that may be leased, committed and in training together.",
            lambda: (config.algorithm.max_staleness + 1) * config.learner.groups_per_step,
        ),
        Reading(
            counter, "chord_groups_dropped_total", "Groups dropped in the whole run, by reason.",
            lambda: dropped(host), labels=["reason"],
        ),
        Reading(
            counter, "chord_groups_redelivered_total", "Groups that came again in the whole run, and were refused.",
            lambda: host.ledger.account.num_redelivered(),
        ),
        Reading(
            gauge, "chord_groups_lost", "Groups acknowledged, but neither trained, dropped nor held; must be 0.",
            lambda: host.ledger.account.num_lost(),
        ),
        Reading(
            gauge, "chord_groups_duplicated", "Groups trained twice, counted once a minute; must be 0.",
            seldom(lambda: host.ledger.account.num_duplicates()),
        ),
        Reading(
            gauge, "chord_peers", "Actors and evaluators, by state.", lambda: peers(host), labels=["role", "state"]
        ),
        Reading(
            gauge, "chord_actors_version_lag_steps_max",
            "Newest version less the oldest that an actor serves; nothing where none serves any.",
            lambda: version_lag(host),
        ),
        Reading(
            gauge, "chord_version_step", "Newest version announced.",
            lambda: newest.step if (newest := host.publisher.newest) else None,
        ),
        Reading(
            counter, "chord_weights_sent_bytes_total", "Bytes of weights sent, in full and as deltas.",
            lambda: host.server.sent_bytes,
        ),
        Reading(
            gauge, "chord_evaluations_owed", "Versions whose evaluation is not there yet.",
            lambda: len(host.publisher.owed_steps),
        ),
        Reading(
            gauge, "chord_expert_rows", "Rows in the expert store; 0 where the method uses none.",
            lambda: host.source.num_expert_rows,
        ),
        Reading(
            gauge, "chord_expert_epochs", "Times that the expert store was drawn from end to end in the whole run.",
            lambda: host.source.expert_epochs,
        ),
        Reading(
            gauge, "chord_checkpoint_step", "Optimizer steps that the newest checkpoint holds.",
            lambda: newest.step if (newest := newest_checkpoint(host)) else None,
        ),
        Reading(
            gauge, "chord_checkpoint_timestamp_seconds", "When the newest checkpoint was written, Unix time.",
            lambda: newest.written_at if (newest := newest_checkpoint(host)) else None,
        ),
        Reading(
            gauge, "chord_checkpoint_interval_steps", "Optimizer steps from one checkpoint to the next.",
            lambda: config.learner.checkpoint_every_steps,
        ),
        Reading(
            gauge, "chord_run_disk_free_bytes", "Room left on the disk of run.dir.",
            lambda: shutil.disk_usage(host.run_dir.path).free,
        ),
        Reading(
            gauge, "chord_run_disk_size_bytes", "Size of the disk of run.dir.",
            lambda: shutil.disk_usage(host.run_dir.path).total,
        ),
        Reading(
            counter, "chord_trajectory_received_bytes_total", "Bytes that came in at the front door.",
            lambda: host.inbox.received_bytes,
        ),
        Reading(
            gauge, "chord_connections", "Connections to the learner's ports.",
            lambda: sum(listener.num_connections for listener in host.listeners),
        ),
        Reading(
            counter, "chord_connections_closed_total", "Connections that the learner closed, by reason.",
            lambda: closed(host), labels=["reason"],
        ),
        Reading(
            counter, "chord_authentication_failures_total",
            "Connections closed because their key is not allowed, or does not speak for the name given.",
            lambda: sum(closed(host)[(reason,)] for reason in AUTHENTICATION),
        ),
        Reading(
            counter, "chord_messages_refused_total", "Messages refused, by fault.",
            lambda: refused(host), labels=["fault"],
        ),
    ]  # fmt: skip


def groups(host: "Host") -> Labelled:
    counts = host.ledger.tallies.counts()
    return {("leased",): counts.leased, ("committed",): counts.committed, ("training",): counts.training}


def dropped(host: "Host") -> Labelled:
    counts = host.ledger.tallies.dropped()
    return {(reason,): counts.get(reason, 0) for reason in DropReason}


def peers(host: "Host") -> Labelled:
    """Every state has its number, 0 too: none serving is what somebody wants to hear of."""
    present = Tally((peer.role, peer.state) for peer in host.inbox.peers.all())
    return {(role, state): present[role, state] for role in Role for state in ActorState}


def version_lag(host: "Host") -> float | None:
    newest = host.publisher.newest
    served = [
        peer.serving_step
        for peer in host.inbox.peers.actors()
        if peer.serving_step is not None and peer.state is not ActorState.GONE
    ]
    return max(newest.step - min(served), 0) if newest and served else None


def newest_checkpoint(host: "Host") -> Checkpoint | None:
    return next(reversed(host.checkpoints.all()), None)


def closed(host: "Host") -> Labelled:
    return {(reason,): sum(listener.closings[reason] for listener in host.listeners) for reason in Closing}


def refused(host: "Host") -> Labelled:
    faults = sum((Tally(dict(listener.refusals)) for listener in host.listeners), Tally[str]())
    return {(fault,): count for fault, count in faults.items()}


def seldom(read: Callable[[], float]) -> Callable[[], float]:
    """`read`, whose last result stands for a while."""
    last: tuple[float, float] | None = None

    def read_seldom() -> float:
        nonlocal last
        if last is None or time.monotonic() - last[0] > SELDOM_S:
            last = time.monotonic(), read()
        return last[1]

    return read_seldom
