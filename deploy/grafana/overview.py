"""The dashboard *Overview*: one run, from its health to its speed."""

from typing import Any

from deploy.grafana.panels import Limits, Row, board, chart, number

HEALTH = Row(
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
            limits=Limits(warning=2, alarm=1),
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
            "Share of the components whose /readyz says yes. A learner is ready when it grants leases, an actor when it "
            "serves recent weights.",
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

FLOW = Row(
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

LEARNING = Row(
    "Learning",
    [
        chart(
            "Reward",
            "Mean reward of the trajectories trained on, and its mean over half an hour.",
            {"step": "chord_reward_mean{$scope}", "30 min": 'run:chord_reward:mean30m{run="$run"}'},
            unit="none",
        ),
        chart(
            "Held-out accuracy",
            "Of the last evaluation of each task (avg@k), and the share of answers that could not be read.",
            {
                "{{task}}": 'chord_evaluation_accuracy_ratio{job=~"$job", run="$run"}',
                "{{task}} unreadable": 'chord_evaluation_unparsed_ratio{job=~"$job", run="$run"}',
            },
            unit="percentunit",
        ),
        chart(
            "Groups with signal",
            "Share of groups whose answers differ in reward. Without that GRPO learns nothing from them.",
            {"with signal": "chord_groups_with_signal_ratio{$scope}"},
            unit="percentunit",
            limits=Limits(warning=0.2, alarm=0.05),
        ),
        chart(
            "Loss",
            "CHORD loss of the last step and its two halves.",
            {
                "loss": "chord_loss{$scope}",
                "policy half": "chord_policy_loss{$scope}",
                "expert half": "chord_expert_loss{$scope}",
            },
            unit="none",
        ),
        chart(
            "Gradient norm",
            "Before clipping at learner.max_grad_norm. A jump that stays is the first sign of an exploding loss.",
            {"norm": "chord_gradient_norm{$scope}"},
            unit="none",
        ),
        chart(
            "Entropy",
            "Mean entropy of the policy on its own tokens. Near 0 all answers to a prompt are alike.",
            {
                "step": "chord_policy_entropy_nats{$scope}",
                "30 min": 'run:chord_policy_entropy_nats:mean30m{run="$run"}',
            },
            unit="suffix: nats",
        ),
        chart(
            "Off-policy correction",
            "Effective sample size, and the shares of policy tokens clipped, cut and rejected by algorithm.correction.",
            {
                "effective sample": "chord_policy_effective_sample_ratio{$scope}",
                "clipped": "chord_policy_clipped_ratio{$scope}",
                "cut": "chord_policy_capped_ratio{$scope}",
                "rejected": "chord_policy_masked_ratio{$scope}",
            },
            unit="percentunit",
        ),
        chart(
            "Behaviour and policy",
            "k3 estimate of KL(behaviour, policy): how far the sampled tokens are from the policy that is trained.",
            {"KL": "chord_policy_mismatch_kl_nats{$scope}"},
            unit="suffix: nats",
        ),
        chart(
            "Length of answers",
            "Mean tokens of the answers that came and of those trained on. A gap means that training sees a biased sample.",
            {
                "sampled": "chord_sampled_answer_tokens_mean{$scope}",
                "trained": "chord_trained_answer_tokens_mean{$scope}",
            },
            unit="none",
        ),
        chart(
            "Answers cut off",
            "Share of the trained answers that were cut off at sampling.max_tokens.",
            {"cut off": "chord_answers_truncated_ratio{$scope}"},
            unit="percentunit",
            limits=Limits(warning=0.3, alarm=0.6),
        ),
        chart(
            "Learning rate",
            "Of the last step.",
            {"learning rate": "chord_learning_rate{$scope}"},
            unit="sci",
        ),
        chart(
            "μ",
            "Weight of the expert half of the loss, and the expert half's share of the gradient, when measured last.",
            {"μ": "chord_mu_ratio{$scope}", "effective": "chord_mu_effective_ratio{$scope}"},
            unit="percentunit",
        ),
    ],
)

WEIGHTS = Row(
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

EXPERT = Row(
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
            "Shares of expert tokens that the policy finds unlikely (p < 0.1) and likely (p > 0.9). All likely: learned.",
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

PERFORMANCE = Row(
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


def overview() -> dict[str, Any]:
    return board(
        "chord-rl: Overview",
        "One run: is it well, does work flow, does the policy learn, and how fast.",
        uid="chord-overview",
        members="chord_build_info",
        rows=[HEALTH, FLOW, LEARNING, WEIGHTS, EXPERT, PERFORMANCE],
    )
