"""The parcel: the newest version as the courier hands it over, read from the file that the learner hashed."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from common.version import Version
from common.weights.fingerprint import fingerprint_of
from common.weights.transports import Outline

TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32", torch.float64: "float64"}
TYPES[torch.uint8] = "uint8"


class Parcel:
    """Holds the file open, so that it may be deleted meanwhile."""

    def __init__(self, path: Path, version: Version) -> None:
        self.version = version
        self._descriptor = os.open(path, os.O_RDONLY)
        self._path = f"/proc/self/fd/{self._descriptor}"
        with safe_open(self._path, framework="pt") as file:
            self._names = sorted(file.keys())
        self.outlines = [
            Outline(name, TYPES[tensor.dtype], tuple(tensor.shape))  # pyright: ignore[reportArgumentType]
            for name, tensor in self.tensors()
        ]
        self.fingerprint = fingerprint_of(self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """In the order of the outlines, one in memory at a time."""
        with safe_open(self._path, framework="pt") as file:
            for name in self._names:
                yield name, file.get_tensor(name)

    def close(self) -> None:
        os.close(self._descriptor)
