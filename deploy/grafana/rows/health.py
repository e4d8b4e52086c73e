"""Is everything there, and does it move?"""

from deploy.grafana.panels import Limits, Row, chart, number

ROW = Row(
    "Health",
    [
        number(
            "Learner",
            "1 while the learner answers Prometheus, 0 when it does not. Nothing is here once its target is taken out.",
            'min(up{job="chord-learner", run="$run"})',
            unit="none",
            limits=Limits(warning=1, alarm=0.5),
        ),
        number(
            "Done",
            "Optimizer steps completed, of learner.num_steps.",
            "max(chord_learner_step{$scope} / chord_learner_steps_planned{$scope})",
            unit="percentunit",
        ),
        number(
            "Since the last step",
            "Time since the last optimizer step ended. Compare it with *Step time* below.",
            "time() - max(chord_learner_last_step_timestamp_seconds{$scope})",
            unit="s",
            limits=Limits(warning=600, alarm=1800),
        ),
        number(
            "Actors that serve",
            "Actors that the learner hears, with weights of this run. None: nothing is sampled.",
            'sum(chord_peers{$scope, role="actor", state="serving"})',
            unit="none",
            limits=Limits(warning=1, alarm=0.5),
        ),
        number(
            "Lost or trained twice",
            "Groups acknowledged and then lost, and groups trained twice. Anything but 0 is a bug.",
            "sum(chord_groups_lost{$scope} + chord_groups_duplicated{$scope})",
            unit="none",
            limits=Limits(warning=1, alarm=1),
        ),
        number(
            "Since the last checkpoint",
            "What a crash costs now: the steps since are replayed from the ledger.",
            "time() - max(chord_checkpoint_timestamp_seconds{$scope})",
            unit="s",
            limits=Limits(warning=3600, alarm=7200),
        ),
        number(
            "Free on the run's disk",
            "Share of the file system of run.dir that is free.",
            "min(chord_run_disk_free_bytes{$scope} / chord_run_disk_size_bytes{$scope})",
            unit="percentunit",
            limits=Limits(warning=0.15, alarm=0.05),
        ),
        number(
            "Alerts that fire",
            "Of this run. What each means, and what to do: deploy/RUNBOOKS.md.",
            'count(ALERTS{alertstate="firing", run="$run"}) or vector(0)',
            unit="none",
            limits=Limits(warning=1, alarm=1),
        ),
        chart(
            "Actors and evaluators by state",
            "As the learner sees its peers. Many *stale* or *fitting* ones: weights do not get through.",
            {"{{role}} {{state}}": "sum by (role, state) (chord_peers{$scope}) > 0"},
            unit="none",
            width=6,
        ),
        chart(
            "Ready",
            "Share of the components whose /readyz says yes. A learner is ready when it grants leases, an actor "
            "when it serves recent weights.",
            {"{{job}}": 'avg by (job) (chord_ready{job=~"$job", run="$run"})'},
            unit="percentunit",
            width=6,
        ),
        chart(
            "Restarts",
            "Starts of components in the hour before, after their first. More than one or two: look at their logs.",
            {"{{job}}": 'sum by (job) (changes(process_start_time_seconds{job=~"$job", run="$run"}[1h]))'},
            unit="none",
            limits=Limits(warning=2, alarm=5),
            width=6,
        ),
        chart(
            "Refused at the door",
            "Messages refused and connections shut by the learner, and peers whose key it did not accept.",
            {
                "authentication": "sum(increase(chord_authentication_failures_total{$scope}[$__rate_interval]))",
                "messages": "sum(increase(chord_messages_refused_total{$scope}[$__rate_interval])) or vector(0)",
                "connections": "sum(increase(chord_connections_closed_total{$scope}[$__rate_interval]))",
            },
            unit="none",
            width=6,
        ),
    ],
)
