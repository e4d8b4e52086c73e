"""Makes the engine that the configuration names; imports vLLM or transformers only where chosen."""

import importlib.util
import logging
from pathlib import Path

from actors.engine import Engine
from common.config.schema import Actor, EngineKind

log = logging.getLogger(__name__)


def make_engine(
    kind: EngineKind, *, model_path: Path, actor: Actor, vocab_size: int, end_tokens: frozenset[int]
) -> Engine:
    """An engine that is not started yet; `auto` takes vLLM where importable, else transformers."""
    if kind is EngineKind.AUTO:
        has_vllm = importlib.util.find_spec("vllm") is not None
        kind = EngineKind.VLLM if has_vllm else EngineKind.TRANSFORMERS
        log.warning("engine auto: vLLM is %s, taking %s", "importable" if has_vllm else "not importable", kind)
    match kind:
        case EngineKind.VLLM:
            from actors.engines.vllm import VllmEngine

            return VllmEngine(model_path, actor=actor, vocab_size=vocab_size, end_tokens=end_tokens)
        case EngineKind.TRANSFORMERS:
            from actors.engines.transformers import TransformersEngine

            return TransformersEngine(model_path, actor=actor, vocab_size=vocab_size, end_tokens=end_tokens)
        case EngineKind.SIMULATED:
            from actors.engines.simulated import SimulatedEngine

            return SimulatedEngine(actor=actor, vocab_size=vocab_size, end_tokens=end_tokens)
