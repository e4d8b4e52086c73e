"""What the policy makes of its steps."""

from deploy.grafana.panels import Limits, Row, chart

ROW = Row(
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
            "Mean tokens of the answers that came and of those trained on. A gap: training sees a biased sample.",
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
