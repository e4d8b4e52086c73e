"""The policy's entropy on its own answers to test problems, measured alike for every method.

metrics.jsonl has it on policy tokens only, and supervised runs have none. Here the answers that chord-eval sampled at
temperature 1 are read once more by the policy, and the entropy of the distribution that each token was drawn from is
averaged over all tokens. Answers are tokenised from their text, which gives the sampled tokens back but for rare cases.
"""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from common.chat import Chat, ChatMessage, Demonstration
from common.problems import ReasoningProblems
from tests.compare.task import TRAINED
from tests.runs import read_lines

TOLD = "nats per token: "


def main(
    policy: Path,
    samples: Path,
    seed: Annotated[int, typer.Option(help="That the answers were sampled with, as run.seed.")] = 0,
    num_answers: Annotated[int, typer.Option(min=1, help="The first answer to each of so many problems.")] = 64,
) -> None:
    """Print the entropy of the answers in SAMPLES (chord-eval --samples) under the model in POLICY."""
    print(f"{TOLD}{mean_entropy(policy, answered(Chat(policy), samples, seed=seed, num=num_answers)):.5f}")


def answered(chat: Chat, samples: Path, *, seed: int, num: int) -> list[Demonstration]:
    """Problems with the first answer to each, as tokens; the mask is 1 on what the policy drew."""
    firsts = {line["problem"]: line for line in read_lines(samples) if line["sample"] == 0}
    problems = ReasoningProblems(seed=seed, **TRAINED.environment()).distinct("held_out")
    rows: list[Demonstration] = []
    for number, problem in enumerate(islice(problems, min(num, len(firsts)))):
        answer = ChatMessage(role="assistant", content=firsts[number]["text"])
        row = chat.demonstration([*problem.messages, answer])
        drawn = len(row.tokens) - firsts[number]["is_truncated"]  # without an end of turn where it drew none
        rows.append(Demonstration(row.tokens[:drawn], row.mask[:drawn]))
    return rows


def mean_entropy(policy: Path, rows: list[Demonstration]) -> float:
    """Nats per token that the mask names."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    total, num = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.tokens])).logits[0, :-1]
        logprobs = logits[torch.tensor(row.mask[1:]) > 0].log_softmax(-1)
        total -= float((logprobs.exp() * logprobs).sum())
        num += len(logprobs)
    return total / max(num, 1)


if __name__ == "__main__":
    typer.run(main)
