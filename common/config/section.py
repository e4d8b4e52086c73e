"""What every section of the configuration is made of: its base, and the values that several of them have."""

import re
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0)]
Port = Annotated[int, Field(ge=0, le=65535)]
ADDRESS = re.compile(r"[^\s:]+:[1-9][0-9]{0,4}")
"""HOST:PORT."""


class EngineKind(StrEnum):
    AUTO = "auto"
    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    SIMULATED = "simulated"


class Section(BaseModel):
    """A frozen group of keys that refuses unknown ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, ser_json_inf_nan="constants")
