"""Versions on their way to the actors."""

from deploy.grafana.panels import Row, chart

ROW = Row(
    "Weights",
    [
        chart(
            "Version published and served",
            "Published by the learner; the oldest and the newest that an actor serves.",
            {
                "published": "max(chord_version_step{$scope})",
                "oldest served": 'min(chord_actor_version_step{job=~"$job", run="$run"})',
                "newest served": 'max(chord_actor_version_step{job=~"$job", run="$run"})',
            },
            unit="none",
        ),
        chart(
            "Lag",
            "Versions by which the slowest actor is behind. Above the bound on staleness it gets no leases.",
            {
                "largest": "chord_actors_version_lag_steps_max{$scope}",
                "bound on staleness": "chord_staleness_bound_steps{$scope}",
            },
            unit="none",
        ),
        chart(
            "Time to publish",
            "Mean time from the policy to an announced version, on the learner, beside the next step.",
            {
                "mean": "sum(rate(chord_weights_publish_seconds_sum{$scope}[$__rate_interval])) "
                "/ sum(rate(chord_weights_publish_seconds_count{$scope}[$__rate_interval]))",
            },
            unit="s",
        ),
        chart(
            "Bytes published",
            "Per second, as full versions and as deltas: what one actor has to fetch.",
            {"{{kind}}": "sum by (kind) (rate(chord_weights_published_bytes_total{$scope}[$__rate_interval]))"},
            unit="Bps",
        ),
        chart(
            "Bytes sent and fetched",
            "Weights sent by the learner, and fetched by all actors and evaluators.",
            {
                "sent": "sum(rate(chord_weights_sent_bytes_total{$scope}[$__rate_interval]))",
                "fetched": 'sum(rate(chord_actor_weight_received_bytes_total{job=~"$job", run="$run"}'
                "[$__rate_interval]))",
            },
            unit="Bps",
        ),
        chart(
            "Time to fetch and load",
            "Of a version: fetched and checked, and swapped into the engine. Mean of all actors and evaluators.",
            {
                "fetch": 'sum(rate(chord_actor_weight_fetch_seconds_sum{job=~"$job", run="$run"}[$__rate_interval])) '
                '/ sum(rate(chord_actor_weight_fetch_seconds_count{job=~"$job", run="$run"}[$__rate_interval]))',
                "load": 'sum(rate(chord_actor_weight_load_seconds_sum{job=~"$job", run="$run"}[$__rate_interval])) '
                '/ sum(rate(chord_actor_weight_load_seconds_count{job=~"$job", run="$run"}[$__rate_interval]))',
            },
            unit="s",
        ),
    ],
)
