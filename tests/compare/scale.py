"""Every size of the comparison in one place: what two CPU cores can bear. A test, or a larger machine, takes others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.compare.task import UNTRAINED, Family

RATES_EXPERT = (1.5e-4, 5e-4, 5e-5)
RATES_POLICY = (2e-5, 6e-5, 6e-6)
RATES_BOTH = (6e-5, 1.5e-4, 2e-5)
"""From the rate that GRPO wants to the one that SFT wants."""


@dataclass(frozen=True)
class Scale:
    """Read by the plan and by the harness; what a result depends on is in its settings' hash."""

    model: Path = Path("models/smollm2-135m")
    engine: str = "vllm"
    dtype: str = "bfloat16"
    """Of the engines and of the learner's matrix products: named, so that all machines compute alike."""
    num_threads: int = 2
    """Of the learner and of each engine; they wait for one another most of the time."""
    max_model_tokens: int = 256
    num_steps: int = 40
    groups_per_step: int = 6
    group_size: int = 8
    rows_per_step: int = 8
    num_expert_rows: int = 1000
    eval_every_steps: int = 10
    num_validation_problems: int = 100
    """Of the run's own evaluations, greedy: curves, choice of learning rate, choice of checkpoint."""
    num_test_problems: int = 200
    num_test_answers: int = 4
    """k of avg@k, at the temperature of the rollouts."""
    num_retention_problems: int = 100
    """Of each family, greedy."""
    num_entropy_answers: int = 64
    families: Sequence[Family] = UNTRAINED
    seeds: Sequence[int] = (0, 1, 2)
    rates: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {
            "sft": RATES_EXPERT, "dft": RATES_EXPERT,
            "grpo": RATES_POLICY, "sft_then_rl": RATES_POLICY,
            "chord_mu": RATES_BOTH, "chord_phi": RATES_BOTH,
        }
    )  # fmt: skip
    """Learning rates that each method is tried with, in this order: equally many for all. Of sft_then_rl it is
    the one after the supervised steps, which have that of sft."""
    lags: Sequence[int] = (0, 1, 4, 8)
    lag_sft_steps: int = 10
    """Supervised steps before the num_steps with weights that lag; evaluated at their end (eval_every_steps)."""
    lag_seeds: Sequence[int] = (0, 1, 2)
    more_lag_seeds: Sequence[int] = (3, 4, 5, 6, 7)
    """Further seeds for what the bar is on: no lag, and corrected lags up to it."""


BAR = 0.05
"""Of the difference in reward to no lag."""
BAR_LAG = 4
"""It holds for lags up to this one, with correction."""
