"""One side of the learner's comparison: a process that takes a step when it is told to, and says how long it took."""

import gc
import multiprocessing
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from tests.bench.group import CLIP, Group, Shape, make_group

LIMIT_S = 300.0
"""Longest wait for a side's start, and for one of its steps."""
Step = Callable[[], None]
"""Forward, loss and backward; adds to the gradients."""


@dataclass(frozen=True)
class End:
    """What a side reports at last."""

    peak_bytes: int
    gradient: Path
    """Gradients by name, added up over all steps."""


class Contender:
    """The handle of such a process."""

    def __init__(self, name: str, model: Path, shape: Shape, gradient: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=serve, args=(far, name, model, shape, gradient), daemon=True)
        self._process.start()
        self._hear("its start")

    def step(self) -> float:
        """Seconds of one step."""
        self._pipe.send("step")
        return self._hear("a step")

    def end(self) -> End:
        self._pipe.send("end")
        return self._hear("its end")

    def close(self) -> None:
        self._process.kill()
        self._process.join()

    def _hear(self, what: str) -> Any:
        if not self._pipe.poll(LIMIT_S):
            raise TimeoutError(f"waited {LIMIT_S:.0f} s for {what} of {self._name}")
        try:
            return self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"{self._name} ended before {what}") from error


def serve(pipe: Connection, name: str, path: Path, shape: Shape, gradient: Path) -> None:
    """The process: its life is its pipe's."""
    warnings.simplefilter("ignore")
    disable_progress_bar()
    model, step = SIDES[name](path, make_group(shape))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    pipe.send("ready")
    while pipe.recv() == "step":
        started = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - started)
    peak = high_water_bytes()
    torch.save({name: parameter.grad for name, parameter in model.named_parameters()}, gradient)
    pipe.send(End(peak - before, gradient))


def high_water_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def chord(path: Path, group: Group) -> tuple[nn.Module, Step]:
    """Ours, as the train engine takes it."""
    from learner.batch import build_batch
    from learner.objective.importance import Correction
    from learner.objective.policy import policy_loss
    from learner.policy_model import load_policy_model
    from learner.rows import Branch, Row

    model = load_policy_model(path, dtype=torch.float32, head_chunk_tokens=512)
    branches = tuple(
        Branch(tokens, torch.ones(len(tokens)).numpy(), logprobs, float(advantage), 1.0, is_expert=False)
        for tokens, logprobs, advantage in zip(group.answers, group.behavior_logprobs, group.advantages, strict=True)
    )
    row = Row(group.prompt, branches)
    correction = Correction(kind="ppo", clip_low=CLIP, clip_high=CLIP)

    def step() -> None:
        batch = build_batch([row])
        logprobs, _ = model(batch)
        loss, _ = policy_loss(
            logprobs, batch.behavior_logprobs, batch.advantages, batch.policy_mask,
            correction=correction, num_tokens=float(group.answers.size),
        )  # fmt: skip
        loss.backward()

    return model.lm, step


def trl(path: Path, group: Group) -> tuple[nn.Module, Step]:
    """TRL's trainer, with its own loss on rows that are given to it; no recomputation, which would slow it down."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    settings = GRPOConfig(
        output_dir=str(path.parent / "unused"), use_cpu=True, report_to=[], disable_tqdm=True, bf16=False,
        per_device_train_batch_size=len(group.answers), num_generations=len(group.answers), temperature=1.0,
        gradient_checkpointing=False, loss_type="bnpo", beta=0.0, epsilon=CLIP,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["one"] * len(group.answers)}),
        processing_class=AutoTokenizer.from_pretrained(path),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # set by its train loop, which does not run here
    inputs = _padded(group)
    model.train()

    def step() -> None:
        trainer._compute_loss(model, inputs).backward()

    return model, step


def plain(path: Path, group: Group) -> tuple[nn.Module, Step]:
    """What one would write: logits of the answers' positions, log-softmax, the clipped loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").train()
    inputs = _padded(group)
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    num_answer, advantages = group.answers.shape[1], inputs["advantages"][:, None]

    def step() -> None:
        logits = model(input_ids=tokens, logits_to_keep=num_answer + 1, use_cache=False).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(2, inputs["completion_ids"][:, :, None]).squeeze(2)
        ratio = (logprobs - inputs["old_per_token_logps"]).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        (-torch.min(ratio * advantages, clipped * advantages).mean()).backward()

    return model, step


def _padded(group: Group) -> dict[str, torch.Tensor]:
    """The group as TRL takes it: one row an answer, the prompt in each; here none is padded."""
    answers = torch.from_numpy(group.answers).long()
    prompts = torch.from_numpy(group.prompt).long().expand(len(answers), -1).contiguous()
    return {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts),
        "completion_ids": answers, "completion_mask": torch.ones_like(answers),
        "advantages": torch.from_numpy(group.advantages),
        "old_per_token_logps": torch.from_numpy(group.behavior_logprobs),
        "num_items_in_batch": torch.tensor(float(answers.numel())),
    }  # fmt: skip


SIDES = {"chord": chord, "trl": trl, "plain": plain}
