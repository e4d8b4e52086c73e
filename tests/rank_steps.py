"""Run by torchrun in tests: the same optimizer steps on two ranks; rank 0 saves the weights and the report.

rank_steps.py MODEL OUTPUT ZERO_STAGE NUM_EXPERTS
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from learner.ranks import Ranks
from tests.steps import CPU, make_engine, some_rows, take_steps, weights_of


def main() -> None:
    model, output, zero_stage, num_experts = sys.argv[1:]
    ranks = Ranks(CPU)
    engine = make_engine(Path(model), ranks, zero_stage=int(zero_stage))
    report = take_steps(engine, ranks, some_rows(num_experts=int(num_experts)), budget=64)
    weights = weights_of(engine)
    if ranks.is_first:
        save_file(weights, output)
        Path(output).with_suffix(".json").write_text(json.dumps(report.metrics))
    ranks.close()


main()
