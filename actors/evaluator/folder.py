"""A model folder as a snapshot, so that it is loaded and scored like any version of a run."""

from pathlib import Path

from common.errors import OperatorError
from common.weights.snapshot import Snapshot, write_snapshot

CHUNK_BYTES = 4 << 20


def snapshot_of_folder(folder: Path, scratch: Path) -> Snapshot:
    """Write the folder's weights, in bfloat16, as version 0 into `scratch`."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        raise OperatorError(f"{folder}: got no *.safetensors file, expected the weights of a model")
    converted = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    path = scratch / "model.safetensors"
    return write_snapshot(converted, path, run_id="folder", incarnation=0, step=0, chunk_bytes=CHUNK_BYTES)
