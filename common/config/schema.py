"""The schema of the configuration: one frozen section per noun of the system, every field with its unit and meaning."""

import hashlib
import json
from ipaddress import ip_address
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from common.config.algorithm import Algorithm
from common.config.evaluation import Eval
from common.config.run import Run
from common.config.section import ADDRESS, Count, EngineKind, Fraction, Port, Positive, Seconds, Section
from common.config.weights import Weights


class Model(Section):
    path: str = Field("", description="Hugging Face folder of the initial policy")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the learner's parameters")


class Actor(Section):
    engine: EngineKind = Field(EngineKind.AUTO, description="auto takes vLLM where importable, else transformers")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="engine precision; auto leaves it to the engine"
    )
    swap: Literal["in_flight", "wait"] = Field(
        "in_flight", description="load new weights between tokens of running answers, or wait until they end"
    )
    max_groups_in_flight: Count = Field(
        0, description="leases one actor works on at a time at most; 0: as many as its KV cache turns out to bear"
    )
    max_model_tokens: Positive = Field(1024, description="prompt + answer tokens that the engine makes room for")
    kv_cache_gib: Annotated[float, Field(gt=0)] = Field(0.5, description="KV cache of a vLLM engine on a CPU, GiB")
    gpu_memory_frac: Annotated[float, Field(gt=0, le=1)] = Field(0.85, description="GPU memory a vLLM engine may take")
    num_threads: Count = Field(0, description="CPU threads of one engine; 0 leaves it to the engine")
    tokens_per_s: Annotated[float, Field(gt=0)] = Field(2000.0, description="speed of the simulated engine")
    start_timeout_s: Seconds = Field(900.0, description="longest start of the engine")
    load_timeout_s: Seconds = Field(
        300.0, description="longest phase of loading a version; with swap wait, running answers end within it"
    )
    answer_timeout_s: Seconds = Field(
        540.0, description="longest time of one answer of the engine; below learner.group_timeout_s"
    )
    probe_timeout_s: Seconds = Field(20.0, description="longest reply of the engine to a health check")
    score_timeout_s: Seconds = Field(
        60.0, description="longest reply of an environment; a score counts from when the scorer comes to it"
    )
    drain_s: Seconds = Field(30.0, description="on SIGTERM, running groups may take so long to end and be sent")
    metrics_port: Port = Field(0, description="Prometheus port; 0 takes a free one and prints it")


class Sampling(Section):
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of rollouts; the learner's policy half uses it too"
    )
    max_tokens: Positive = Field(64, description="tokens of one answer at most")
    top_p: float = Field(1.0, description="must be 1: the learner cannot match filtered log-probs; see eval.top_p")
    top_k: int = Field(0, description="must be 0, for the same reason; see eval.top_k")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, plain in (("top_p", 1.0), ("top_k", 0)):
            if getattr(self, key) != plain:
                raise ValueError(
                    f"sampling.{key}: got {getattr(self, key)}, expected {plain:g}: the learner cannot match the "
                    f"log-probs of filtered sampling (for evaluations there is eval.{key})"
                )
        return self


class Environment(Section):
    name: str = Field("reasoning_gym", description="a name of the entry-point group chord_rl.environments")
    options: dict[str, Any] = Field(default_factory=dict, description="handed to the environment as they are")


class Learner(Section):
    num_steps: Positive = Field(100, description="optimizer steps of the whole run")
    groups_per_step: Positive = Field(8, description="groups in one optimizer step")
    lr: Annotated[float, Field(gt=0)] = Field(1e-6, description="peak learning rate")
    lr_after_sft: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak learning rate after algorithm.sft_steps, where the schedule begins anew; unset: lr"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after warm-up, to 0 at the end"
    )
    lr_warmup_steps: Count = Field(0, description="linear warm-up from 0, optimizer steps")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's decoupled weight decay")
    adam_betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW's β")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="global gradient norm is clipped to this")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        0, description="DeepSpeed ZeRO: ranks share out the optimizer (1), gradients too (2), parameters too (3)"
    )
    overlap_comm: bool = Field(False, description="ZeRO: communicate while gradients are still computed (on GPUs)")
    offload: Literal["none", "optimizer"] = Field(
        "none", description="optimizer keeps its state, and steps, in host memory (on GPUs, with zero_stage 1 to 3)"
    )
    num_ranks: Positive = Field(1, description="training processes; more than 1 starts them through torchrun")
    num_nodes: Positive = Field(
        1, description="machines that the ranks are spread over evenly; each starts chord-learner --node-index N"
    )
    rendezvous: str = Field("", description="HOST:PORT on machine 0 where the ranks of several machines meet")
    num_threads: Count = Field(0, description="CPU threads of one rank; 0 leaves it to torch")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "float32",
        description="precision of the decoder's matrix products; auto takes bfloat16 where hardware has units for it",
    )
    micro_batch_tokens: Positive = Field(
        4096, description="token budget of one forward pass; attention, which pads, computes twice as many at most"
    )
    recompute_activations: bool = Field(
        False, description="keep each layer's input only and compute the rest again in the backward pass: less memory"
    )
    head_chunk_tokens: Positive = Field(512, description="positions whose vocabulary logits exist at a time")
    effective_mu_every_steps: Count = Field(
        20,
        description="steps between measurements of effective μ, each as dear as a step's training; 0: none",
    )
    lora_rank: Count = Field(0, description="train LoRA adapters of this rank in place of the weights; 0: the weights")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="adapters are scaled by lora_alpha / lora_rank")
    lora_targets: tuple[str, ...] = Field(
        (), description="linear layers that get adapters, such as q_proj; empty: every one but the head"
    )
    share_prompts: bool = Field(True, description="compute a group's prompt once for its K answers")
    checkpoint_every_steps: Positive = Field(50, description="optimizer steps between checkpoints")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints that are kept")
    keep_arrivals: bool = Field(
        False, description="keep the tokens of every group, so that chord-learner --replay can repeat the whole run"
    )
    metrics_port: Port = Field(0, description="Prometheus port; 0 takes a free one and prints it")
    metrics_host: str = Field("127.0.0.1", description="address that every component's metrics are served on")
    start_timeout_s: Seconds = Field(600.0, description="longest wait for the first group of a run")
    group_timeout_s: Seconds = Field(600.0, description="longest wait for a group while training")
    eval_timeout_s: Seconds = Field(600.0, description="longest wait at the end for evaluations still running")
    step_timeout_s: Seconds = Field(1200.0, description="longest optimizer step, checkpoint or snapshot")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f'learner.offload: got "{self.offload}" with zero_stage 0, expected zero_stage 1, 2 or 3')
        if self.num_ranks % self.num_nodes:
            raise ValueError(
                f"learner.num_ranks: got {self.num_ranks}, expected a multiple of {self.num_nodes} num_nodes"
            )
        if self.num_nodes > 1 and not ADDRESS.fullmatch(self.rendezvous):
            raise ValueError(
                f'learner.rendezvous: got "{self.rendezvous}", expected HOST:PORT on machine 0 (num_nodes > 1)'
            )
        return self


class Network(Section):
    host: str = Field("127.0.0.1", description="address of the learner: bound by it; to actors it may be a name")
    port: Port = Field(5757, description="the learner's front door; chord-local turns 0 into a free port")
    weights_port: Port = Field(0, description="where the learner serves weights; 0 takes a free port and tells actors")
    announcements_port: Port = Field(0, description="where it announces versions; 0 takes a free port and tells actors")
    heartbeat_s: Seconds = Field(1.0, description="between ZeroMQ heartbeats")
    silence_s: Seconds = Field(3.5, description="a peer silent for longer is disconnected, and taken for gone")
    lease_s: Annotated[float, Field(ge=2.0)] = Field(
        20.0, description="a lease whose actor has been silent for longer is issued again; it reports once a second"
    )
    request_timeout_s: Seconds = Field(10.0, description="one request to the learner, before it is sent again")
    learner_timeout_s: Seconds = Field(180.0, description="an actor gives up on a learner unreachable for longer")
    keys: str = Field("", description="folder of CURVE keys (see chord-keys); empty: nobody is authenticated")
    allowed_keys: str = Field("", description="folder of the public keys let in; empty: the folder allowed/ in keys")
    allow_unauthenticated: bool = Field(False, description="without keys, serve other machines too: anyone may come in")
    max_connections: Positive = Field(256, description="peers that each of the learner's ports serves at a time")
    max_message_bytes: Positive = Field(
        64 << 20, description="largest message that either side takes, and largest group in full"
    )
    max_unacknowledged_bytes: Positive = Field(
        128 << 20, description="what the learner holds of one peer's unhandled messages; actors keep to half of it"
    )
    chunk_bytes: Annotated[int, Field(ge=1 << 20, le=4 << 20)] = Field(2 << 20, description="one chunk of weights")
    chunk_credit: Positive = Field(8, description="chunks one actor asks for ahead")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.keys or self.allow_unauthenticated or _is_loopback(self.host)):
            raise ValueError(
                f'network.keys: got none with network.host "{self.host}", expected a folder of keys (see chord-keys), '
                "a loopback address, or network.allow_unauthenticated = true where everyone who gets there is trusted"
            )
        if self.allowed_keys and not self.keys:
            raise ValueError(
                f'network.allowed_keys: got "{self.allowed_keys}" without network.keys, expected both: nobody is asked '
                "for a key"
            )
        if self.max_unacknowledged_bytes < self.max_message_bytes:
            raise ValueError(
                f"network.max_unacknowledged_bytes: got {self.max_unacknowledged_bytes}, expected at least "
                f"max_message_bytes ({self.max_message_bytes})"
            )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Expert(Section):
    path: str = Field("", description="expert store, an SQLite file made by chord-expert; empty: RUN_DIR/expert.sqlite")
    rows_per_step: Count = Field(32, description="expert rows in one optimizer step")


AGREED: dict[str, set[str] | None] = {
    "run": {"seed"}, "sampling": None, "environment": None, "algorithm": None,
    "eval": {
        "held_out", "num_problems", "benchmarks", "max_benchmark_problems", "samples_per_problem", "temperature",
        "top_p", "top_k", "max_tokens",
    },
}  # fmt: skip
"""What learner, actors and evaluator must hold in common: a section's keys, None for all of them."""

LASTING = ("groups_per_step", "lora_rank", "lora_alpha", "lora_targets")
"""Keys of the learner that a run keeps from its begin to its end."""


RECIPE = {
    "model": {"dtype"},
    "learner": {
        "lr", "lr_after_sft", "lr_schedule", "lr_warmup_steps", "num_steps", "weight_decay", "adam_betas",
        "max_grad_norm",
    },
}  # fmt: skip
"""What an optimizer step depends on beyond what is agreed upon with the actors, rounding aside."""


class Config(Section):
    """Everything that a run is determined by."""

    run: Run = Run()  # pyright: ignore[reportCallIssue]
    model: Model = Model()  # pyright: ignore[reportCallIssue]
    actor: Actor = Actor()  # pyright: ignore[reportCallIssue]
    sampling: Sampling = Sampling()  # pyright: ignore[reportCallIssue]
    environment: Environment = Environment()  # pyright: ignore[reportCallIssue]
    algorithm: Algorithm = Algorithm()  # pyright: ignore[reportCallIssue]
    learner: Learner = Learner()  # pyright: ignore[reportCallIssue]
    network: Network = Network()  # pyright: ignore[reportCallIssue]
    weights: Weights = Weights()  # pyright: ignore[reportCallIssue]
    expert: Expert = Expert()  # pyright: ignore[reportCallIssue]
    eval: Eval = Eval()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.algorithm.trains_on_experts and self.expert.rows_per_step == 0:
            raise ValueError(
                f"expert.rows_per_step: got 0 with {self.algorithm.source_of_mu} (μ > 0), expected at least 1 expert "
                "row per step"
            )
        if self.algorithm.trains_on_groups and self.sft_steps >= self.learner.num_steps:
            raise ValueError(
                f"algorithm.sft_steps: got {self.sft_steps}, expected fewer than learner.num_steps "
                f"({self.learner.num_steps}): no step would train on groups"
            )
        if self.algorithm.preset == "sft_then_rl" and self.sft_steps == 0:
            raise ValueError(f"learner.num_steps: got {self.learner.num_steps}, expected at least 2: one of each kind")
        if self.algorithm.sft_ends_with == "best" and self.sft_steps and not 0 < self.eval.every_steps < self.sft_steps:
            raise ValueError(
                f'eval.every_steps: got {self.eval.every_steps} with algorithm.sft_ends_with "best", expected 1 to '
                f"{self.sft_steps - 1}: evaluations to choose by, within the {self.sft_steps} sft_steps"
            )
        if self.algorithm.overlong == "soft_penalty" and not (
            1 <= self.algorithm.overlong_buffer_tokens <= self.sampling.max_tokens
        ):
            raise ValueError(
                f"algorithm.overlong_buffer_tokens: got {self.algorithm.overlong_buffer_tokens} with overlong "
                f'"soft_penalty", expected 1 to sampling.max_tokens ({self.sampling.max_tokens})'
            )
        self._check_room()
        self.weights.check(engine=self.actor.engine, swap=self.actor.swap, lora_rank=self.learner.lora_rank)
        if self.actor.answer_timeout_s >= self.learner.group_timeout_s:
            raise ValueError(
                f"actor.answer_timeout_s: got {self.actor.answer_timeout_s:g}, expected less than "
                f"learner.group_timeout_s ({self.learner.group_timeout_s:g}): one hung answer must not end the run"
            )
        return self

    def _check_room(self) -> None:
        """Answers that end where the engine's room does never reach the length at which they count as cut off."""
        answers = {"eval.max_tokens": self.eval.max_tokens}
        if self.algorithm.trains_on_groups or not self.eval.max_tokens:
            answers["sampling.max_tokens"] = self.sampling.max_tokens
        for name, tokens in answers.items():
            if tokens >= self.actor.max_model_tokens:
                raise ValueError(
                    f"{name}: got {tokens}, expected fewer than actor.max_model_tokens "
                    f"({self.actor.max_model_tokens}), in which the prompt must fit too"
                )

    @property
    def sft_steps(self) -> int:
        """Optimizer steps of supervised fine-tuning before the method's own schedule begins."""
        steps = self.algorithm.sft_steps
        return self.learner.num_steps // 2 if steps is None else steps

    @property
    def first_group_step(self) -> int:
        """The first optimizer step that trains on groups, counted from 0; learner.num_steps where none does."""
        return self.sft_steps if self.algorithm.trains_on_groups else self.learner.num_steps

    @property
    def recipe(self) -> dict[str, Any]:
        """By key, what a step must be taken with again when it is replayed."""
        values = self.model_dump(mode="json", include=RECIPE)
        if self.learner.lr_schedule == "constant":
            del values["learner"]["num_steps"]
        return {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}

    @property
    def agreed(self) -> dict[str, dict[str, Any]]:
        """By section, what learner, actors and evaluator hold in common, and a run from its begin to its end."""
        return {
            section: self.model_dump(mode="json", include={section: keys or True})[section]
            for section, keys in AGREED.items()
        }

    @property
    def lasting(self) -> dict[str, dict[str, Any]]:
        """By section, what no later start of a run may change."""
        return self.agreed | self.model_dump(mode="json", include={"learner": set(LASTING)})

    @property
    def agreement_hash(self) -> str:
        """Equal exactly where two components would sample, score and train the same thing."""
        nested = {section: {section: values} for section, values in self.agreed.items()}  # as runs have it on record
        return hashlib.sha256(json.dumps(nested, sort_keys=True).encode()).hexdigest()[:16]
