"""The learner's Prometheus metrics; their values come from the step record and the inbox."""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.wire.listener import Listener
from learner.ledger.account import Account
from learner.peers import Peers

GAUGES = {
    "step": ("chord_learner_step", "Optimizer steps completed."),
    "mu": ("chord_mu_ratio", "Weight of the expert half of the loss."),
    "mu_effective": ("chord_mu_effective_ratio", "The expert half's share of the gradient, when measured last."),
    "lr": ("chord_learning_rate", "Learning rate of the last step."),
    "loss": ("chord_loss", "CHORD loss of the last step."),
    "policy_loss": ("chord_policy_loss", "Policy half of the loss."),
    "expert_loss": ("chord_expert_loss", "Expert half of the loss."),
    "grad_norm": ("chord_gradient_norm", "Global gradient norm before clipping."),
    "policy_grad_norm": ("chord_policy_gradient_norm", "Gradient norm of the policy half, when measured last."),
    "expert_grad_norm": ("chord_expert_gradient_norm", "Gradient norm of the expert half, when measured last."),
    "policy_entropy": ("chord_policy_entropy_nats", "Mean entropy on policy tokens."),
    "policy_mismatch_kl": ("chord_policy_mismatch_kl_nats", "k3 estimate of KL(behaviour, policy)."),
    "policy_ess_frac": ("chord_policy_effective_sample_ratio", "Effective sample size over policy tokens."),
    "policy_clip_frac": ("chord_policy_clipped_ratio", "Share of policy tokens on the clipped branch."),
    "policy_cap_frac": ("chord_policy_capped_ratio", "Share of policy tokens whose importance weight was cut."),
    "policy_masked_frac": ("chord_policy_masked_ratio", "Share of policy tokens that the correction rejected."),
    "expert_nll_mean": ("chord_expert_nll_nats", "Mean of -log p of expert tokens."),
    "expert_p_lt_01_frac": ("chord_expert_unlikely_ratio", "Share of expert tokens with p < 0.1."),
    "expert_p_gt_09_frac": ("chord_expert_likely_ratio", "Share of expert tokens with p > 0.9."),
    "expert_phi_mean": ("chord_expert_phi_mean", "Mean token weight of the expert loss."),
    "reward_mean": ("chord_reward_mean", "Mean reward of the trained trajectories."),
    "groups_with_signal_frac": ("chord_groups_with_signal_ratio", "Share of groups whose rewards differ."),
    "sampled_answer_tokens_mean": ("chord_sampled_answer_tokens_mean", "Mean length of the answers that came."),
    "trained_answer_tokens_mean": ("chord_trained_answer_tokens_mean", "Mean length of the answers trained on."),
    "staleness_max": ("chord_staleness_steps_max", "Largest staleness in the last batch."),
    "learner_wait_frac": ("chord_learner_wait_ratio", "Share of the last step in which the learner waited for groups."),
    "actor_idle_frac": ("chord_actors_idle_ratio", "Share of their time in which actors had no group to sample."),
    "actor_tokens_per_s": ("chord_actor_tokens_per_second", "Tokens that all actors sampled per second."),
    "learner_tokens_per_s": ("chord_learner_tokens_per_second", "Loss-bearing tokens trained per second of training."),
}
"""Field of the step record → name and help."""


class GuardCollector(Collector):
    """What the learner's listening sockets refused and closed, read from them when they are scraped."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners

    def collect(self) -> Iterable[Metric]:
        refused = CounterMetricFamily("chord_messages_refused", "Messages refused, by fault.", labels=["fault"])
        closed = CounterMetricFamily("chord_connections_closed", "Connections shut, by reason.", labels=["reason"])
        for family, tallies in (
            (refused, [listener.refusals for listener in self._listeners]),
            (closed, [listener.closings for listener in self._listeners]),
        ):
            for name, count in sum(map(Tally, map(dict, tallies)), Tally[str]()).items():
                family.add_metric([name], count)
        present = GaugeMetricFamily("chord_connections", "Connections to the learner's ports.")
        present.add_metric([], sum(listener.num_connections for listener in self._listeners))
        return [refused, closed, present]


class RunCollector(Collector):
    """Who takes part, and what was dropped, read when they are scraped."""

    def __init__(self, peers: Peers, account: Account) -> None:
        self._peers = peers
        self._account = account

    def collect(self) -> Iterable[Metric]:
        present = GaugeMetricFamily("chord_peers", "Actors and evaluators, by state.", labels=["role", "state"])
        for (role, state), count in Tally((peer.role, peer.state) for peer in self._peers.all()).items():
            present.add_metric([role, state], count)
        dropped = CounterMetricFamily("chord_groups_dropped", "Groups dropped, by reason.", labels=["reason"])
        for reason, count in self._account.dropped().items():
            dropped.add_metric([reason], count)
        return [present, dropped]


class LearnerMetrics:
    """One registry; `observe` is called after every step."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges = {field: Gauge(name, text, registry=self.registry) for field, (name, text) in GAUGES.items()}
        self._groups = Counter("chord_groups_trained_total", "Groups trained.", registry=self.registry)
        self._tokens = Counter(
            "chord_tokens_trained_total", "Loss-bearing tokens trained.", ["component"], registry=self.registry
        )
        self._seconds = Counter(
            "chord_learner_phase_seconds_total", "Time of the train loop.", ["phase"], registry=self.registry
        )
        self._staleness = Histogram(
            "chord_staleness_steps", "Staleness of trained groups.", buckets=(0, 1, 2, 4, 8, 16), registry=self.registry
        )

    def observe(self, record: Mapping[str, Any]) -> None:
        """Take over one step record (a line of metrics.jsonl)."""
        for field, gauge in self._gauges.items():
            if record.get(field) is not None:
                gauge.set(record[field])
        self._groups.inc(record["num_groups"])
        self._tokens.labels("policy").inc(record["num_policy_tokens"])
        self._tokens.labels("expert").inc(record["num_expert_tokens"])
        for phase in ("wait", "train", "publish"):
            self._seconds.labels(phase).inc(record[f"{phase}_s"])
        for staleness, count in record["staleness_histogram"].items():
            for _ in range(count):
                self._staleness.observe(float(staleness))
