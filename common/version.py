"""A policy version: which weights, of which run, from which start of its learner."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Version(BaseModel):
    """Names one set of weights. Two versions are the same weights exactly where their hashes are equal."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run_id: Annotated[str, Field(max_length=64)]
    incarnation: Annotated[int, Field(ge=0)]
    """Start count of the learner that published it; rises at every start."""
    step: Annotated[int, Field(ge=0, le=2**31 - 1)]
    """Optimizer steps completed; version 0 is the initial policy."""
    hash: Annotated[str, Field(max_length=64)]
    """Hash of the snapshot's bytes (see common.weights.snapshot), hexadecimal."""

    def __str__(self) -> str:
        return f"version {self.step} ({self.hash[:8]})"
