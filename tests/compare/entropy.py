"""The policy's entropy on its own answers to test problems, measured alike for every method.

metrics.jsonl has it on policy tokens only, and supervised runs have none. Here the answers that chord-eval sampled are
read once more by the policy, and the entropy of its distribution at temperature 1 is averaged over
all their tokens. Answers are tokenised from their text, which gives the sampled tokens back but for rare cases.
"""

from pathlib import Path
from typing import Annotated

import typer

from common.chat import Chat, ChatMessage, Demonstration
from tests.runs import read_lines

TOLD = "nats per token: "


def main(
    policy: Path,
    samples: Path,
    problems: Path,
    num_answers: Annotated[int, typer.Option(min=1, help="The first answer to each of so many problems.")] = 64,
) -> None:
    """Print the entropy of POLICY on SAMPLES, its answers (chord-eval --samples) to the table PROBLEMS."""
    print(f"{TOLD}{mean_entropy(policy, answered(Chat(policy), samples, problems, num=num_answers)):.5f}")


def answered(chat: Chat, samples: Path, problems: Path, *, num: int) -> list[Demonstration]:
    """Problems with the first answer to each, as tokens; the mask is 1 on what the policy drew."""
    firsts = {line["problem"]: line for line in read_lines(samples) if line["sample"] == 0}
    rows: list[Demonstration] = []
    for number, problem in enumerate(read_lines(problems)[: min(num, len(firsts))]):
        asked = ChatMessage(role="user", content=problem["question"])
        row = chat.demonstration([asked, ChatMessage(role="assistant", content=firsts[number]["text"])])
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
