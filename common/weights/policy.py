"""The policy that a snapshot stands for: its own tensors, or a base model's with its LoRA adapters merged in.

A version of a LoRA run holds, for each adapted weight W [out, in], A [r, in] and B [out, r], and beside them the scale
and the hash of the base. Whoever loads it makes W + scale · B · A, so every engine serves the same plain model.
"""

import hashlib
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common.errors import OperatorError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]

WEIGHT, DOWN, UP = ".weight", ".lora_A.weight", ".lora_B.weight"
BASE_HASH, SCALE = "adapters.base_hash", "adapters.scale"
HASH_BYTES = 16


def pack_adapters(adapters: Mapping[str, "Tensor"], *, base: Path, scale: float) -> "dict[str, Tensor]":
    """The tensors of a version that holds adapters only, named MODULE.lora_A.weight and MODULE.lora_B.weight."""
    import torch

    return {
        **adapters,
        BASE_HASH: torch.frombuffer(bytearray(hash_of_base(base)), dtype=torch.uint8),
        SCALE: torch.tensor([scale], dtype=torch.float64),
    }


def is_adapters(path: Path) -> bool:
    """Whether a snapshot holds adapters, and no model of its own."""
    return BASE_HASH in read_shapes(path)


def read_shapes(path: Path) -> dict[str, Shape]:
    """Name and shape of every tensor in a safetensors file, from its header alone."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 -- not a mapping


def shapes_of_base(folder: Path) -> dict[str, Shape]:
    """Of every tensor in a model folder."""
    return {name: shape for file in _files_of(folder) for name, shape in read_shapes(file).items()}


def check_fit(path: Path, expected: Mapping[str, Shape], *, base: Path, optional: AbstractSet[str]) -> None:
    """Compare the policy that a snapshot stands for with a model's tensors, before anything is touched.

    `optional` ones may be left out. Raises ValueError where a tensor does not fit, OperatorError where adapters are not
    of the model in the folder `base`.
    """
    check_shapes(_shapes_of_policy(path, base), expected, where=str(path), base=base, optional=optional)


def check_shapes(
    got: Mapping[str, Shape], expected: Mapping[str, Shape], *, where: str, base: Path, optional: AbstractSet[str]
) -> None:
    """Raises ValueError where they are not the `expected` ones, those of the folder `base`."""
    wrong = {name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)} - optional
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"{where}: {len(wrong)} tensors do not fit {base}, first {name}: "
            f"got {got.get(name, 'none')}, expected {expected.get(name, 'none')}"
        )


def _shapes_of_policy(path: Path, base: Path) -> dict[str, Shape]:
    if not is_adapters(path):
        return read_shapes(path)
    with _opened(path) as file:
        expected, got = bytes(file.get_tensor(BASE_HASH).tolist()).hex(), hash_of_base(base).hex()
    if got != expected:
        raise OperatorError(
            f"model.path: {base}: got weights with hash {got}, expected {expected}: the model that the learner adapts"
        )
    shapes = shapes_of_base(base)
    check_adapters(read_shapes(path), shapes, where=str(path))
    return shapes


def check_adapters(got: Mapping[str, Shape], base: Mapping[str, Shape], *, where: str) -> None:
    """Raises ValueError where an adapter is none of a matrix of the base."""
    for name in got.keys() - {BASE_HASH, SCALE}:
        module = name.removesuffix(DOWN).removesuffix(UP)
        down, up = got.get(module + DOWN, ()), got.get(module + UP, ())
        made, weight = (*up[:1], *down[1:]), base.get(module + WEIGHT)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or made != weight:
            raise ValueError(f"{where}: {name}: got an adapter of shapes {down} and {up}, expected one of {weight}")


def tensors_of_policy(path: Path, base: Path) -> "Iterator[tuple[str, Tensor]]":
    """Every tensor of the policy that the snapshot in `path` stands for; what is merged comes in float32."""
    import torch

    if not is_adapters(path):
        yield from _read_tensors(path)
        return
    adapters = dict(_read_tensors(path))
    scale = float(adapters[SCALE])
    for file in _files_of(base):
        for name, weight in _read_tensors(file):
            down = adapters.get(name.removesuffix(WEIGHT) + DOWN)
            if down is None:
                yield name, weight
            else:
                up = adapters[name.removesuffix(WEIGHT) + UP]
                yield name, torch.addmm(weight.float(), up.float(), down.float(), alpha=scale)


@cache
def hash_of_base(folder: Path) -> bytes:
    """Of the weights in a model folder, which stay as they are while a run goes on."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for path in _files_of(folder):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=HASH_BYTES)).digest())
    return digest.digest()


def _files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _read_tensors(path: Path) -> "Iterator[tuple[str, Tensor]]":
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 -- not a mapping
            yield name, file.get_tensor(name)


def _opened(path: Path) -> Any:
    from safetensors import safe_open  # pyright: ignore[reportUnknownVariableType]

    return cast(Any, safe_open)(path, framework="pt")
