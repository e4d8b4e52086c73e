"""The learner's Prometheus metrics that come with events: steps above all. learner/readings.py has the others."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily

from common.metrics import Reading

GAUGES = {
    "step": ("chord_learner_step", "Optimizer steps completed."),
    "time": ("chord_learner_last_step_timestamp_seconds", "When the last optimizer step ended, Unix time."),
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
    "truncated_frac": ("chord_answers_truncated_ratio", "Share of the trained answers that were cut off."),
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

STEP_S = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
WRITE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
COMMIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class LearnerMetrics:
    """One registry; `observe` is called after every step, the histograms' by those who do what they measure."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._last: dict[str, float] = {}
        """What is known of the fields of the step record."""
        for field, (name, text) in GAUGES.items():
            registry.register(Reading(GaugeMetricFamily, name, text, lambda field=field: self._last.get(field)))
        self._groups = Counter("chord_groups_trained_total", "Groups trained.", registry=registry)
        self._tokens = Counter(
            "chord_tokens_trained_total", "Loss-bearing tokens trained.", ["component"], registry=registry
        )
        self._expert_rows = Counter("chord_expert_rows_used_total", "Expert rows trained on.", registry=registry)
        self._seconds = Counter(
            "chord_learner_phase_seconds_total", "Time of the train loop.", ["phase"], registry=registry
        )
        self._staleness = Histogram(
            "chord_staleness_steps", "Staleness of trained groups.", buckets=(0, 1, 2, 4, 8, 16), registry=registry
        )
        self._step_s = Histogram(
            "chord_learner_step_seconds", "From one optimizer step to the next.", buckets=STEP_S, registry=registry
        )
        self.publish_s = Histogram(
            "chord_weights_publish_seconds",
            "Writing a version, making its delta and announcing it.",
            buckets=WRITE_S,
            registry=registry,
        )
        self.checkpoint_s = Histogram(
            "chord_checkpoint_seconds", "Writing a checkpoint.", buckets=WRITE_S, registry=registry
        )
        self.commit_s = Histogram(
            "chord_inbox_commit_seconds",
            "Handling a round of messages with groups, until it is on disk.",
            buckets=COMMIT_S,
            registry=registry,
        )
        self._published = Counter(
            "chord_weights_published_bytes_total",
            "Size of the versions announced, and of the deltas that lead to them.",
            ["kind"],
            registry=registry,
        )
        for counter, values in (
            (self._tokens, ("policy", "expert")),
            (self._seconds, ("wait", "train", "publish")),
            (self._published, ("full", "delta")),
        ):
            for value in values:
                counter.labels(value)

    def restore(self, record: Mapping[str, Any]) -> None:
        """Where the run stands: the record of its last step, which an earlier learner took."""
        for field in GAUGES.keys() & record.keys():
            if record[field] is None:
                self._last.pop(field, None)  # of the other half of the loss, say, when a phase has ended
            else:
                self._last[field] = record[field]

    def observe(self, record: Mapping[str, Any]) -> None:
        """Take over one step record (a line of metrics.jsonl)."""
        self.restore(record)
        self._groups.inc(record["num_groups"])
        self._tokens.labels("policy").inc(record["num_policy_tokens"])
        self._tokens.labels("expert").inc(record["num_expert_tokens"])
        self._expert_rows.inc(record["num_expert_rows"])
        self._step_s.observe(record["step_s"])
        for phase in ("wait", "train", "publish"):
            self._seconds.labels(phase).inc(record[f"{phase}_s"])
        for staleness, count in record["staleness_histogram"].items():
            for _ in range(count):
                self._staleness.observe(float(staleness))

    def count_version(self, *, num_bytes: int, delta_bytes: int) -> None:
        """A version was announced; 0 where no delta leads to it."""
        self._published.labels("full").inc(num_bytes)
        self._published.labels("delta").inc(delta_bytes)
