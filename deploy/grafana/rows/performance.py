"""How fast, and where the time goes."""

from deploy.grafana.panels import Row, chart

ROW = Row(
    "Performance",
    [
        chart(
            "Step time",
            "From one optimizer step to the next.",
            {
                "median": "histogram_quantile(0.5, sum by (le) "
                "(rate(chord_learner_step_seconds_bucket{$scope}[$__rate_interval])))",
                "95 %": "histogram_quantile(0.95, sum by (le) "
                "(rate(chord_learner_step_seconds_bucket{$scope}[$__rate_interval])))",
            },
            unit="s",
        ),
        chart(
            "Where the learner's time goes",
            "Seconds per second: waiting for groups, training, publishing.",
            {"{{phase}}": "sum by (phase) (rate(chord_learner_phase_seconds_total{$scope}[$__rate_interval]))"},
            unit="percentunit",
        ),
        chart(
            "Tokens",
            "Per second: sampled by all actors, and loss-bearing tokens trained, waiting included.",
            {
                "sampled": 'run:chord_actor_tokens:rate5m{run="$run"}',
                "trained: {{component}}": 'run:chord_tokens_trained:rate5m{run="$run"}',
            },
            unit="cps",
        ),
        chart(
            "Time to write a checkpoint",
            "Mean. The train loop stands still meanwhile.",
            {
                "mean": "sum(rate(chord_checkpoint_seconds_sum{$scope}[1h])) "
                "/ sum(rate(chord_checkpoint_seconds_count{$scope}[1h]))",
            },
            unit="s",
        ),
        chart(
            "Memory",
            "Resident, of each component's main process.",
            {"{{job}} {{instance}}": 'process_resident_memory_bytes{job=~"$job", run="$run"}'},
            unit="bytes",
        ),
        chart(
            "Processor time",
            "Cores in use, of each component's main process.",
            {"{{job}} {{instance}}": 'rate(process_cpu_seconds_total{job=~"$job", run="$run"}[$__rate_interval])'},
            unit="none",
        ),
    ],
)
