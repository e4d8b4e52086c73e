"""The dashboard *Fleet*: one row per actor, the worst engine beside the mean."""

from typing import Any

from deploy.grafana.panels import Column, Limits, Row, board, chart, instances

EVERY = 'job=~"$job", run="$run"'
"""All actors of the run, whichever are chosen."""
TOKENS = "rate(chord_actor_tokens_total{%s}[$__rate_interval])"
LAG = "chord_actor_version_lag_steps{%s}"
KV_CACHE = "chord_actor_kv_cache_usage_ratio{%s}"
WAITING = "chord_actor_waiting_answers_ratio{%s}"
IDLE = "rate(chord_actor_idle_seconds_total{%s}[$__rate_interval])"
PREEMPTIONS = "increase(chord_actor_preemptions_total{%s}[1h])"
GROUP_TIME = (
    "rate(chord_actor_group_seconds_sum{%s}[$__rate_interval]) "
    "/ rate(chord_actor_group_seconds_count{%s}[$__rate_interval])"
)
FAILURES = (
    "increase(chord_actor_lease_failures_total{%s}[1h]) + increase(chord_actor_request_failures_total{%s}[1h]) "
    "+ increase(chord_actor_probe_failures_total{%s}[1h])"
)
RESTARTS = "changes(process_start_time_seconds{%s}[1d]) and on (instance) chord_actor_version_step"


def of(measure: str, labels: str = "$scope") -> str:
    """A measure of the chosen actors, or of those with other labels."""
    return measure.replace("%s", labels)


def by_instance(measure: str) -> str:
    return f"max by (instance) ({of(measure)})"


def worst_beside_mean(measure: str, *, worst: str = "max") -> dict[str, str]:
    return {"worst": f"{worst}({of(measure)})", "mean": f"avg({of(measure)})"}


ACTORS = Row(
    "Actors",
    [
        instances(
            "One line for each actor",
            "Sort by any column. One that differs from the others is the one to look at.",
            [
                Column("Version", by_instance("chord_actor_version_step{%s}"), "none", Limits(warning=0, alarm=-0.5)),
                Column("Lag (steps)", by_instance(LAG), "none", Limits(warning=2, alarm=4)),
                Column("Ready", by_instance("chord_ready{%s} and on (instance) chord_actor_version_step"), "none"),
                Column("Tokens per second", by_instance(TOKENS), "short"),
                Column(
                    "Of the mean",
                    f"{by_instance(TOKENS)} / scalar(avg({of(TOKENS, EVERY)}))",
                    "percentunit",
                    Limits(warning=0.8, alarm=0.5),
                ),
                Column("Idle", by_instance(IDLE), "percentunit", Limits(warning=0.5, alarm=0.9)),
                Column("Groups in flight", by_instance("chord_actor_groups_in_flight{%s}"), "none"),
                Column("KV cache", by_instance(KV_CACHE), "percentunit", Limits(warning=0.9, alarm=0.98)),
                Column("Waiting answers", by_instance(WAITING), "percentunit", Limits(warning=0.2, alarm=0.5)),
                Column("Preemptions (1 h)", by_instance(PREEMPTIONS), "none", Limits(warning=10, alarm=100)),
                Column("Failures (1 h)", by_instance(FAILURES), "none", Limits(warning=1, alarm=5)),
                Column("Restarts (1 d)", by_instance(RESTARTS), "none", Limits(warning=1, alarm=5)),
            ],
        )
    ],
)

WORST = Row(
    "The worst engine beside the mean",
    [
        chart(
            "Tokens per second",
            "Sampled by the slowest actor and by the mean one. Far apart: one machine is slow, throttled or shared.",
            worst_beside_mean(TOKENS, worst="min"),
            unit="cps",
        ),
        chart(
            "Lag",
            "Policy versions behind the newest that the actor has heard of.",
            worst_beside_mean(LAG),
            unit="none",
            limits=Limits(warning=2, alarm=4),
        ),
        chart(
            "KV cache",
            "Share in use. Full is well used, as long as answers do not wait or lose their place.",
            worst_beside_mean(KV_CACHE),
            unit="percentunit",
            limits=Limits(warning=0.9, alarm=0.98),
        ),
        chart(
            "Waiting answers",
            "Share of the answers under way that wait for room in the engine.",
            worst_beside_mean(WAITING),
            unit="percentunit",
            limits=Limits(warning=0.2, alarm=0.5),
        ),
        chart(
            "Time of a group",
            "From its lease to the finished group.",
            worst_beside_mean(GROUP_TIME),
            unit="s",
        ),
        chart(
            "Failures",
            "In the hour before: leases given back, answers that an engine could not give, failed health checks.",
            worst_beside_mean(FAILURES),
            unit="none",
            limits=Limits(warning=1, alarm=5),
        ),
    ],
)

EACH = Row(
    "Actor $instance",
    [
        chart(
            "Tokens per second",
            "Sampled by this actor, beside the mean and the slowest of the run.",
            {
                "this one": of(TOKENS),
                "mean": f"avg({of(TOKENS, EVERY)})",
                "slowest": f"min({of(TOKENS, EVERY)})",
            },
            unit="cps",
            width=6,
        ),
        chart(
            "Lag",
            "Policy versions behind the newest that it has heard of, beside the mean.",
            {"this one": of(LAG), "mean": f"avg({of(LAG, EVERY)})"},
            unit="none",
            limits=Limits(warning=2, alarm=4),
            width=6,
        ),
        chart(
            "KV cache",
            "Share in use, beside the mean, and the share of its answers that wait for room.",
            {"this one": of(KV_CACHE), "mean": f"avg({of(KV_CACHE, EVERY)})", "waiting": of(WAITING)},
            unit="percentunit",
            limits=Limits(warning=0.9, alarm=0.98),
            width=6,
        ),
        chart(
            "Restarts and failures",
            "Starts in the day before, after the first; failures in the hour before.",
            {"restarts": of(RESTARTS), "failures": of(FAILURES)},
            unit="none",
            limits=Limits(warning=1, alarm=5),
            width=6,
        ),
    ],
    repeat="instance",
)


def fleet() -> dict[str, Any]:
    return board(
        "chord-rl: Fleet",
        "The actors of one run, each beside the others.",
        uid="chord-fleet",
        members="chord_actor_version_step",
        rows=[ACTORS, WORST, EACH],
    )
