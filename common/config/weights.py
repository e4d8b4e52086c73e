"""The section `[weights]`: by which way a version gets from the learner to its actors."""

from typing import Literal

from pydantic import Field

from common.config.section import Count, EngineKind, Port, Seconds, Section


class Weights(Section):
    transport: Literal["zmq", "nccl", "gloo"] = Field(
        "zmq",
        description="how tensors travel: as files and deltas over ZeroMQ; by NCCL from the learner's GPU to those of "
        "vLLM; by gloo, which is NCCL's stand-in where there is no GPU, for tests",
    )
    courier_port: Port = Field(
        0, description="where the learner's courier listens, with nccl or gloo; 0 takes a free port and tells actors"
    )
    transfer_timeout_s: Seconds = Field(
        60.0, description="longest turn of one actor with the courier, its wait for that aside; then ZeroMQ it is"
    )
    relay: Count = Field(
        0, description="actors that one actor passes a version on to; 0: everyone fetches from the learner"
    )
    relay_timeout_s: Seconds = Field(
        3.0, description="an actor that passes nothing on for longer is given up, and the learner asked"
    )

    @property
    def is_direct(self) -> bool:
        """Whether a courier hands tensors over."""
        return self.transport != "zmq"

    def check(self, *, engine: EngineKind, swap: str, lora_rank: int) -> None:
        """Raises ValueError where the other sections do not go with it."""
        if not self.is_direct:
            return
        how = f'weights.transport "{self.transport}"'
        if engine in (EngineKind.TRANSFORMERS, EngineKind.SIMULATED):
            raise ValueError(f'actor.engine: got "{engine}" with {how}, expected "vllm", or weights.transport "zmq"')
        if swap == "wait":
            raise ValueError(f'actor.swap: got "wait" with {how}, expected "in_flight": the courier waits for nobody')
        if lora_rank:
            raise ValueError(
                f'learner.lora_rank: got {lora_rank} with {how}, expected weights.transport "zmq", which sends the '
                "adapters alone"
            )
