"""Chat messages and their tokens: the one place where text becomes what the policy reads and writes.

Actors and learner share it, so that an expert row is tokenised exactly as an answer to the same prompt would be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict

from common.errors import OperatorError
from common.model_folder import require_model_folder

_MARK = "\u241eanswer\u241e"
"""Stands for an answer in a rendered conversation; no tokenizer or template gives it a meaning."""


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True)
class Demonstration:
    """A conversation as tokens; the mask is 1.0 on what the assistant wrote, its end-of-turn token included."""

    tokens: list[int]
    mask: list[float]


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, model_path: Path) -> None:
        """Raises OperatorError where the folder holds no tokenizer with a chat template."""
        require_model_folder(model_path)
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        self._tokenizer = cast(Any, AutoTokenizer).from_pretrained(model_path, local_files_only=True)
        if not self._tokenizer.chat_template:
            raise OperatorError(f"model.path: {model_path} has no chat template, expected an instruct model")
        config = cast(Any, AutoConfig).from_pretrained(model_path, local_files_only=True)
        self.vocab_size: int = config.get_text_config().vocab_size
        ends: set[int] = {self._tokenizer.eos_token_id}
        if (model_path / "generation_config.json").is_file():
            generation = cast(Any, GenerationConfig).from_pretrained(model_path).eos_token_id
            ends |= set(cast("list[int]", generation if isinstance(generation, list) else [generation])) - {None}
        self.end_tokens: frozenset[int] = frozenset(ends)
        """Tokens that end an answer."""

    def prompt_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The conversation so far, up to where the assistant begins to write."""
        return self._encode(self._render(messages, answer_next=True))

    def continuation_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """What stands between an answer that ended with its end-of-turn token and the next answer.

        `messages` are the environment's replies. Answers are never tokenised again: these tokens are appended to them.
        """
        opening = [ChatMessage(role="user", content=""), ChatMessage(role="assistant", content=_MARK)]
        whole = self._render([*opening, *messages], answer_next=True)
        return self._encode(whole.partition(_MARK)[2].removeprefix(self._end_text))

    def demonstration(self, messages: Sequence[ChatMessage]) -> Demonstration:
        """Tokens and mask of a conversation that ends with the assistant; every assistant turn bears loss."""
        first = next(i for i, message in enumerate(messages) if message.role == "assistant")
        tokens, mask = self.prompt_tokens(messages[:first]), list[float]()
        mask += [0.0] * len(tokens)
        replies: list[ChatMessage] = []
        for message in messages[first:]:
            if message.role != "assistant":
                replies.append(message)
                continue
            if replies:
                between = self.continuation_tokens(replies)
                tokens, mask, replies = tokens + between, mask + [0.0] * len(between), []
            answer = [*self._encode(message.content), self._tokenizer.eos_token_id]
            tokens, mask = tokens + answer, mask + [1.0] * len(answer)
        return Demonstration(tokens, mask)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    @property
    def _end_text(self) -> str:
        return self._tokenizer.eos_token

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _render(self, messages: Sequence[ChatMessage], *, answer_next: bool) -> str:
        rows = [message.model_dump() for message in messages]
        return self._tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=answer_next)
