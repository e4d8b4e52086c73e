"""The section `[eval]`: what is evaluated, how answers are sampled for it, and the benchmarks that there are."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from common.config.section import Count, EngineKind, Port, Positive, Section


class BenchmarkName(StrEnum):
    """Published benchmarks that the evaluator knows the layout of."""

    AMC = "amc"
    AIME24 = "aime24"
    AIME25 = "aime25"
    MATH500 = "math500"
    GSM8K = "gsm8k"
    MMLU_PRO = "mmlu_pro"


PROCEDURAL = "reasoning_gym/"
"""Before the name of a family, which makes it a benchmark."""
MAX_BENCHMARKS = 31
"""With the held-out problems there are 32 tasks at most: so many scores fit into one message."""


class Eval(Section):
    every_steps: Count = Field(10, description="optimizer steps between evaluations; 0 evaluates never")
    held_out: bool = Field(True, description="score the environment's own held-out problems, as the first task")
    num_problems: Positive = Field(200, description="held-out problems, all different, of a procedural task")
    benchmarks: list[str] = Field(
        default_factory=list,
        description="further tasks: NAME, NAME=FILE or DATASET (?question=COLUMN&…), reasoning_gym/FAMILY",
    )
    max_benchmark_problems: Count = Field(0, description="problems of one benchmark, drawn by run.seed; 0 takes all")
    samples_per_problem: Annotated[int, Field(ge=1, le=4096)] = Field(1, description="k of avg@k: answers to a problem")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of probability sampled from; 1 is all")
    top_k: Count = Field(0, description="likeliest tokens sampled from; 0 is all")
    max_tokens: Count = Field(0, description="tokens of one answer at most; 0: as sampling.max_tokens")
    engine: EngineKind | None = Field(None, description="the evaluator's engine; unset: as actor.engine")
    max_concurrency: Positive = Field(64, description="answers in flight at a time")
    save_samples: bool = Field(False, description="keep every answer in RUN_DIR/samples, a file for each version")
    metrics_port: Port = Field(0, description="Prometheus port; 0 takes a free one and prints it")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.samples_per_problem > 1 and self.temperature == 0:
            raise ValueError(
                f"eval.samples_per_problem: got {self.samples_per_problem} with eval.temperature 0, expected 1 "
                "(greedy answers to a problem are all alike), or a temperature"
            )
        names = [text.partition("=")[0] for text in self.benchmarks]
        for name in names:
            if not (name.startswith(PROCEDURAL) or name in set(BenchmarkName)):
                raise ValueError(
                    f'eval.benchmarks: got "{name}", expected one of {", ".join(BenchmarkName)}, {PROCEDURAL}FAMILY'
                )
            if names.count(name) > 1:
                raise ValueError(f'eval.benchmarks: got "{name}" {names.count(name)} times, expected it once')
        if len(names) > MAX_BENCHMARKS:
            raise ValueError(f"eval.benchmarks: got {len(names)}, expected {MAX_BENCHMARKS} at most")
        if not (self.held_out or names):
            raise ValueError("eval.held_out: got false without eval.benchmarks, expected something to evaluate on")
        return self
