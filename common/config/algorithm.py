"""The section of the configuration that says how is trained: method, correction, advantages and the course of μ."""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config.section import Count, Fraction, Section


class StalenessPolicy(StrEnum):
    PACE = "pace"
    DROP = "drop"


class Algorithm(Section):
    preset: Literal["sft", "grpo", "sft_then_rl", "dft", "chord_mu", "chord_phi"] = Field(
        "chord_mu", description="the method, in one word"
    )
    correction: Literal["none", "ppo", "tis", "icepop", "decoupled", "cispo", "gspo"] = Field(
        "tis", description="importance correction of policy rows"
    )
    clip_low: Fraction = Field(0.2, description="ε below 1 of the clipped ratio")
    clip_high: Annotated[float, Field(ge=0)] = Field(0.2, description="ε above 1 of the clipped ratio")
    cap: Annotated[float, Field(ge=1)] = Field(2.0, description="C of truncated importance sampling; on-policy is 1")
    band: tuple[float, float] = Field(
        (0.5, 5.0), description="[α, β] outside which icepop masks a token; on-policy is 1, which must lie inside"
    )
    max_staleness: Count = Field(1, description="optimizer steps a trained token may lag; 0 is exactly synchronous")
    staleness_policy: StalenessPolicy = Field(
        StalenessPolicy.PACE, description="pace waits for the oldest lease, drop passes it by"
    )
    group_size: Annotated[int, Field(ge=2)] = Field(8, description="K answers to one prompt")
    advantage_scale: Literal["std", "none"] = Field("std", description="divide a group's advantages by its deviation")
    aggregation: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean",
        description="each half of the loss is a mean over its tokens (CHORD), or over its sequences' means",
    )
    overlong: Literal["keep", "penalty", "mask", "soft_penalty"] = Field(
        "keep",
        description="answers cut off at sampling.max_tokens: scored as any other, reward -1, no gradient, or a penalty "
        "that grows with the length (DAPO)",
    )
    overlong_buffer_tokens: Count = Field(0, description="the soft penalty begins so far below sampling.max_tokens")
    zero_variance: Literal["keep", "drop"] = Field(
        "keep", description="groups whose advantages are all 0: train them, or drop them and sample as many others"
    )
    allow_uncorrected: bool = Field(False, description='take correction "none" together with staleness all the same')
    mu_peak: Fraction = Field(0.0, description="μ after warm-up")
    mu_valley: Fraction = Field(0.0, description="μ after decay")
    mu_warmup_steps: Count = Field(0, description="optimizer steps from 0 to the peak")
    mu_decay_steps: Count = Field(0, description="optimizer steps from the peak to the valley (cosine)")
    mu_target: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="τ: μ = max(0, τ − mean reward of the step, as scored), at most 1; in place of the schedule",
    )
    expert_weighting: Literal["phi", "is", "none"] = Field("none", description="token weight of the expert loss")
    sft_steps: Count | None = Field(
        0, description="steps of supervised fine-tuning (μ = 1) before all else; unset: half of learner.num_steps"
    )
    sft_ends_with: Literal["last", "best"] = Field(
        "last", description="policy that goes on after sft_steps: the last, or that of the best held-out accuracy"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.preset == "sft_then_rl" and self.sft_steps == 0:
            raise ValueError(
                'algorithm.sft_steps: got 0 with preset "sft_then_rl", expected at least 1, or leave it out'
            )
        if self.mu_target is None and self.mu_decay_steps == 0 and self.mu_peak != self.mu_valley:
            raise ValueError(
                f"algorithm.mu_decay_steps: got 0 with mu_peak {self.mu_peak} and mu_valley {self.mu_valley}, "
                "expected a decay of at least 1 step, or peak equal to valley"
            )
        low, high = self.band
        if not 0 <= low < 1 < high:
            raise ValueError(
                f"algorithm.band: got {list(self.band)}, expected [low, high] with 0 <= low < 1 < high: on-policy "
                "tokens, whose ratio is 1, must not be masked"
            )
        if self.correction == "none" and self.max_staleness > 0 and not self.allow_uncorrected:
            raise ValueError(
                f'algorithm.correction: got "none" with max_staleness {self.max_staleness}, expected a correction '
                "(uncorrected asynchronous training collapses), max_staleness 0, or allow_uncorrected = true"
            )
        return self

    @property
    def trains_on_groups(self) -> bool:
        """Whether any step has μ < 1, so that actors have work."""
        return self.mu_target is not None or min(self.mu_peak, self.mu_valley) < 1.0 or self.mu_warmup_steps > 0

    @property
    def trains_on_experts(self) -> bool:
        """Whether any step has μ > 0."""
        return bool(self.source_of_mu)

    @property
    def source_of_mu(self) -> str:
        """The key that makes μ > 0 in some step, with its value; empty where none does."""
        keys = ("mu_target", "sft_steps", "mu_peak", "mu_valley")
        found = {key: getattr(self, key) for key in keys}
        if self.sft_steps is None:
            found["sft_steps"] = "unset"
        return next((f"algorithm.{key} {value}" for key, value in found.items() if value), "")
