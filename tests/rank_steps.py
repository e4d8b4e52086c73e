"""Run by tests as each of two ranks: the gradients of many steps, dealt out in many ways; rank 0 saves them.

rank_steps.py MODEL OUTPUT_FOLDER RANK
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from learner.adapters import Lora
from learner.objective import importance
from learner.ranks import Ranks
from learner.rows import Row, deal
from learner.train_engine import Objective, TrainEngine
from tests.judge import Judge
from tests.steps import CPU, LORA, Cut, Weights, make_gauge, measure, random_rows, sharding_of

MU = 0.3
CUT = Cut(budget=64)


@dataclass(frozen=True)
class Kind:
    """Of which kind the training engine is."""

    zero_stage: int
    lora: Lora | None = None
    overlap_comm: bool = False

    @property
    def options(self) -> dict[str, Any]:
        sharding = replace(sharding_of(self.zero_stage), overlap_comm=self.overlap_comm)
        return {"sharding": sharding, "lora": self.lora}

    def __str__(self) -> str:
        return f"ZeRO {self.zero_stage}{', LoRA' if self.lora else ''}{', overlap' if self.overlap_comm else ''}"


KINDS = (
    *map(Kind, range(4)),
    *(Kind(stage, LORA) for stage in range(4)),
    *(Kind(stage, overlap_comm=True) for stage in (2, 3)),
)


@dataclass(frozen=True)
class Case:
    """Which of a step's rows each of two ranks gets: p for policy rows, e for expert rows, x for both, dealt evenly."""

    name: str
    shares: tuple[str, str]
    kind: importance.Kind = "tis"
    weighting: Literal["phi", "is", "none"] = "phi"
    weights: Weights = "ones"
    cut: Cut = CUT

    def has(self, half: Literal["p", "e"]) -> bool:
        return any(half in share or "x" in share for share in self.shares)

    @property
    def mu(self) -> float:
        return MU if self.has("p") and self.has("e") else float(self.has("e"))

    @property
    def objective(self) -> Objective:
        return Objective(importance.Correction(kind=self.kind), self.weighting)


CASES = (
    Case("both ranks have both", ("x", "x")),
    Case("both, unshared", ("x", "x"), "icepop", "none", "sequence_mean", Cut(20, shares_prompts=False)),
    Case("both, shuffled", ("x", "x"), "gspo", "is", "fractions", Cut(30, order_seed=1, padding_seed=2, num_empty=2)),
    Case("rank 1 has no policy row", ("p", "e"), "ppo", cut=Cut(25, order_seed=3)),
    Case("rank 0 has no policy row", ("e", "p"), "decoupled", "is", "sequence_mean"),
    Case("rank 1 has no row at all", ("pe", ""), "cispo", "none", "fractions"),
    Case("rank 0 has no row at all", ("", "pe"), "none"),
    Case("nobody has an expert row", ("p", ""), weights="fractions"),
    Case("nobody has a policy row", ("e", ""), weights="sequence_mean"),
)


def rows_of_case(judge: Judge, case: Case) -> list[Row]:
    """The same ones in every process."""
    rows = random_rows(
        judge, seed=11 + CASES.index(case), num_groups=3, num_experts=4, spread=0.3, temperature=0.7,
        weights=case.weights,
    )  # fmt: skip
    return [row for row in rows if case.has("e" if row.branches[0].is_expert else "p")]


def share_of(rows: list[Row], case: Case, rank: int) -> list[Row]:
    policy = [row for row in rows if not row.branches[0].is_expert]
    experts = [row for row in rows if row.branches[0].is_expert]
    kinds = {"p": policy, "e": experts, "x": deal(rows, 2)[rank]}
    return [row for kind in case.shares[rank] for row in kinds[kind]]


def report_name(kind: Kind, case: Case) -> str:
    return f"{KINDS.index(kind)}-{CASES.index(case)}"


def main(model: Path, output: Path, rank: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    meeting = f"file://{output / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=600))
    ranks, judge = Ranks(CPU), Judge(model)
    for kind in KINDS:
        gauge = make_gauge(model, ranks, **kind.options)
        for case in CASES:
            batches = case.cut.batches(share_of(rows_of_case(judge, case), case, rank))
            gradient, report = measure(gauge, batches, objective=case.objective, mu=case.mu, measures_halves=True)
            if ranks.is_first:
                save_file(gradient, output / f"{report_name(kind, case)}.safetensors")
                (output / f"{report_name(kind, case)}.json").write_text(json.dumps(report.metrics))
        save_weights(gauge, ranks, output / f"{KINDS.index(kind)}")
    ranks.close()


def save_weights(gauge: TrainEngine, ranks: Ranks, path: Path) -> None:
    """What the ranks publish after they have been through a checkpoint, beside their hashes before and after it."""
    checkpoint = path.with_name(f"checkpoint-{path.name}")
    checkpoint.mkdir(exist_ok=True)
    ranks.barrier()
    hashes = [gauge.parameters_hash()]
    gauge.save(checkpoint)
    ranks.barrier()
    gauge.restore(checkpoint)
    hashes.append(gauge.parameters_hash())
    tensors = gauge.tensors(torch.float32)
    if ranks.is_first:
        save_file(tensors, path.with_suffix(".weights"))
        path.with_suffix(".hashes").write_text(json.dumps(hashes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
