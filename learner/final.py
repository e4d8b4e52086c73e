"""The export: `final/`, the trained policy as a Hugging Face folder that transformers and vLLM load."""

import json
import shutil
from pathlib import Path

from common.weights.policy import is_adapters, tensors_of_policy
from common.weights.snapshot import Snapshot

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".gguf", ".index.json")


def export_policy(snapshot: Snapshot, *, base: Path, destination: Path) -> None:
    """The snapshot's policy beside the base's config and tokenizer; what was evaluated last is what lies there."""
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
    _write_weights(snapshot.path, base, partial / "model.safetensors")
    shutil.rmtree(destination, ignore_errors=True)
    partial.rename(destination)


def _write_weights(path: Path, base: Path, destination: Path) -> None:
    """The snapshot's very bytes; adapters are merged into their base."""
    import torch
    from safetensors.torch import save_file

    if not is_adapters(path):
        shutil.copyfile(path, destination)
        return
    merged = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors_of_policy(path, base)}
    save_file(merged, destination, metadata={"format": "pt"})
