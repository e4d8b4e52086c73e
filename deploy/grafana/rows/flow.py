"""Groups on their way from a lease to a step."""

from deploy.grafana.panels import Limits, Row, chart

ROW = Row(
    "Flow",
    [
        chart(
            "Groups held",
            "Leased: being sampled. Committed: waiting for a step. Training: in the step that is being taken.",
            {"{{state}}": "sum by (state) (chord_groups{$scope})"},
            unit="none",
        ),
        chart(
            "Queue",
            "Committed and training groups, of the most that may be held: (max_staleness + 1) · groups_per_step. "
            "Always full: actors wait for the learner.",
            {"full": 'run:chord_groups_held:ratio{run="$run"}'},
            unit="percentunit",
            limits=Limits(warning=0.9, alarm=1.01),
        ),
        chart(
            "Who waits for whom",
            "Share of its time in which the learner waited for groups, and in which actors had none to sample. "
            "The side that never waits is the slower one.",
            {
                "learner waits": "chord_learner_wait_ratio{$scope}",
                "actors idle": "chord_actors_idle_ratio{$scope}",
            },
            unit="percentunit",
            limits=Limits(warning=0.5, alarm=0.8),
        ),
        chart(
            "Staleness",
            "Optimizer steps between sampling and training: mean and largest of the groups trained, and the bound "
            "(algorithm.max_staleness). It never exceeds the bound.",
            {
                "mean": "sum(rate(chord_staleness_steps_sum{$scope}[$__rate_interval])) "
                "/ sum(rate(chord_staleness_steps_count{$scope}[$__rate_interval]))",
                "largest": "chord_staleness_steps_max{$scope}",
                "bound": "chord_staleness_bound_steps{$scope}",
            },
            unit="none",
        ),
        chart(
            "Groups trained and dropped",
            "Per second. Dropped groups cost sampling; their reason tells why.",
            {
                "trained": "sum(rate(chord_groups_trained_total{$scope}[$__rate_interval]))",
                "dropped: {{reason}}": "sum by (reason) (rate(chord_groups_dropped_total{$scope}[$__rate_interval]))",
            },
            unit="cps",
        ),
        chart(
            "Sent again",
            "Groups that came a second time and were refused: harmless, but many mean a bad network.",
            {"redelivered": "sum(increase(chord_groups_redelivered_total{$scope}[$__rate_interval]))"},
            unit="none",
        ),
        chart(
            "Trajectories received",
            "Bytes of groups that the learner takes in.",
            {"received": "sum(rate(chord_trajectory_received_bytes_total{$scope}[$__rate_interval]))"},
            unit="Bps",
        ),
        chart(
            "Time to commit",
            "From a round of messages to their transaction on disk; no receipt leaves before. Slow: the ledger's disk.",
            {
                "median": "histogram_quantile(0.5, sum by (le) "
                "(rate(chord_inbox_commit_seconds_bucket{$scope}[$__rate_interval])))",
                "99 %": "histogram_quantile(0.99, sum by (le) "
                "(rate(chord_inbox_commit_seconds_bucket{$scope}[$__rate_interval])))",
            },
            unit="s",
            limits=Limits(warning=0.25, alarm=1),
        ),
        chart(
            "Connections",
            "To the learner's ports; network.max_connections is the most that each of them takes.",
            {"connections": "chord_connections{$scope}"},
            unit="none",
        ),
    ],
)
