"""The export: `final/`, the trained policy as a Hugging Face folder that transformers and vLLM load."""

import json
import shutil
from pathlib import Path

from common.weights.policy import is_adapters, tensors_of_policy
from common.weights.snapshot import Snapshot, write_snapshot

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".gguf", ".index.json")
EXPORT = "export"
"""The ledger's fact that holds the hash of what was exported."""


def export_policy(snapshot: Snapshot, *, base: Path, destination: Path) -> str:
    """The snapshot's policy beside the base's config and tokenizer; what was evaluated last is what lies there.

    Returns the hash of its weights: that of the version, or another one where adapters were merged into the base.
    """
    partial = destination.with_name(".partial-final")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_FILES):
            shutil.copy(file, partial / file.name)
    config = json.loads((partial / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config.pop("torch_dtype", None)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    exported = _write_weights(snapshot, base, partial / "model.safetensors")
    shutil.rmtree(destination, ignore_errors=True)
    partial.rename(destination)
    return exported.version.hash


def _write_weights(snapshot: Snapshot, base: Path, path: Path) -> Snapshot:
    """The snapshot's very bytes; adapters are merged into their base."""
    import torch

    if not is_adapters(snapshot.path):
        shutil.copyfile(snapshot.path, path)
        return snapshot
    merged = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors_of_policy(snapshot.path, base)}
    version = snapshot.version
    return write_snapshot(
        merged, path, run_id=version.run_id, incarnation=version.incarnation, step=version.step,
        chunk_bytes=snapshot.manifest.chunk_bytes,
    )  # fmt: skip
