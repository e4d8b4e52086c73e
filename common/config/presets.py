"""The presets: a method in one word, as the values that the paper gives for it (arXiv 2508.11408)."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {
        "mu_peak": 0.0, "mu_valley": 0.0, "mu_warmup_steps": 0, "mu_decay_steps": 0, "expert_weighting": "none",
    },
    "sft": {
        "mu_peak": 1.0, "mu_valley": 1.0, "mu_warmup_steps": 0, "mu_decay_steps": 0, "expert_weighting": "none",
    },
    "chord_mu": {
        "mu_peak": 0.9, "mu_valley": 0.05, "mu_warmup_steps": 0, "mu_decay_steps": 200, "expert_weighting": "none",
    },
    "chord_phi": {
        "mu_peak": 0.1, "mu_valley": 0.1, "mu_warmup_steps": 0, "mu_decay_steps": 0, "expert_weighting": "phi",
    },
}  # fmt: skip
"""Keys of the section `algorithm` that each preset owns."""
