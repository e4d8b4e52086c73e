"""The presets: a method in one word, as the values that its paper gives for it (CHORD: arXiv 2508.11408)."""

from typing import Any


def _preset(
    *, peak: float, valley: float, decay: int = 0, weighting: str = "none", sft_steps: int | None = 0
) -> dict[str, Any]:
    return {
        "mu_peak": peak,
        "mu_valley": valley,
        "mu_warmup_steps": 0,
        "mu_decay_steps": decay,
        "mu_target": None,
        "expert_weighting": weighting,
        "sft_steps": sft_steps,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "sft": _preset(peak=1.0, valley=1.0),
    "dft": _preset(peak=1.0, valley=1.0, weighting="is"),
    "grpo": _preset(peak=0.0, valley=0.0),
    "sft_then_rl": _preset(peak=0.0, valley=0.0, sft_steps=None),
    "chord_mu": _preset(peak=0.9, valley=0.05, decay=200),
    "chord_phi": _preset(peak=0.1, valley=0.1, weighting="phi"),
}
"""Keys of the section `algorithm` that each preset owns; any of them can be overridden."""
