"""The context: how many tokens the learner's model can attend to, as its config.json says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.config.schema import Config
from common.errors import OperatorError


@dataclass(frozen=True)
class Context:
    """None where the model has no such limit."""

    positions: int | None
    """`max_position_embeddings`, unless positions are stretched beyond it (YaRN may leave it as it was)."""
    window: int | None
    """`sliding_window` where a layer has one; attention over packed rows knows none."""

    @classmethod
    def of(cls, model_path: Path) -> "Context":
        from transformers import AutoConfig

        config = cast(Any, AutoConfig).from_pretrained(model_path, local_files_only=True).get_text_config()
        positions = None if _is_stretched(config) else getattr(config, "max_position_embeddings", None)
        return cls(positions, _window(config))

    @property
    def limit(self) -> tuple[int, str] | None:
        """Tokens of the longest row that can be trained, and the key of config.json that says so."""
        limits = ((self.positions, "max_position_embeddings"), (self.window, "sliding_window"))
        return min(((tokens, key) for tokens, key in limits if tokens), default=None)

    def check_answers(self, config: Config) -> None:
        """Raises OperatorError where an actor may send a group that the learner would refuse to train."""
        longest = config.actor.max_model_tokens
        if config.algorithm.trains_on_groups and self.window and longest > self.window:
            raise OperatorError(
                f"actor.max_model_tokens: got {longest}, expected at most {self.window} (sliding_window of "
                f"{config.model.path}): the learner trains with attention over all tokens"
            )


def _is_stretched(config: Any) -> bool:
    """Rotary positions may be given once, or for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in given.values() if isinstance(value, dict)] or [given]
    return any(kind.get("rope_type", "default") != "default" for kind in kinds)


def _window(config: Any) -> int | None:
    """A key that the architecture does not know is nobody's window; where layers differ, one that slides is enough."""
    is_known = hasattr(type(config), "sliding_window") or "sliding_window" in config.attribute_map
    kinds = getattr(config, "layer_types", None)
    if not is_known or (kinds and not any("sliding" in kind for kind in kinds)):
        return None
    return config.sliding_window or None
