"""The demonstrations: how far they have been used, and what the policy makes of them."""

from deploy.grafana.panels import Limits, Row, chart

ROW = Row(
    "Expert store",
    [
        chart(
            "Epochs",
            "Times that the store has been gone through. From the fourth on, rows teach little that is new.",
            {"epochs": "chord_expert_epochs{$scope}"},
            unit="none",
            limits=Limits(warning=4, alarm=8),
            width=6,
        ),
        chart(
            "Rows",
            "Expert rows in the store.",
            {"rows": "chord_expert_rows{$scope}"},
            unit="none",
            width=6,
        ),
        chart(
            "Rows used",
            "Expert rows trained per second.",
            {"used": "sum(rate(chord_expert_rows_used_total{$scope}[$__rate_interval]))"},
            unit="cps",
            width=6,
        ),
        chart(
            "What the policy makes of them",
            "Shares of expert tokens that are unlikely (p < 0.1) and likely (p > 0.9) to it. All likely: learned.",
            {"unlikely": "chord_expert_unlikely_ratio{$scope}", "likely": "chord_expert_likely_ratio{$scope}"},
            unit="percentunit",
            width=6,
        ),
        chart(
            "Negative log-likelihood",
            "Mean of −log p of expert tokens.",
            {"−log p": "chord_expert_nll_nats{$scope}"},
            unit="suffix: nats",
            width=12,
        ),
        chart(
            "φ",
            "Mean token weight of the expert loss: largest where the policy is undecided.",
            {"φ": "chord_expert_phi_mean{$scope}"},
            unit="none",
            width=12,
        ),
    ],
)
