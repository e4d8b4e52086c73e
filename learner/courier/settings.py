"""What the courier is told: how to serve at its start, and each new version. Lines of JSON on its standard input."""

from pydantic import BaseModel, ConfigDict

from common.version import Version


class CourierSettings(BaseModel):
    """The first line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transport: str
    """nccl or gloo."""
    host: str
    port: int
    keys: str
    allowed_keys: str
    """Both as in the configuration's [network]."""
    device: int
    """Number of the GPU that it sends from."""
    num_threads: int
    """CPU threads; 0 leaves it to torch."""
    timeout_s: float
    """Longest turn of one engine."""
    heartbeat_s: float
    silence_s: float
    max_connections: int


class CourierOffer(BaseModel):
    """Every further line: the newest version, whose file is there for some seconds at least."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    version: Version
