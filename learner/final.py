"""The export: `final/`, the trained policy as a Hugging Face folder that transformers and vLLM load."""

import json
import shutil
from pathlib import Path

from common.weights.snapshot import Snapshot

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".gguf", ".index.json")


def export_policy(snapshot: Snapshot, *, base: Path, destination: Path) -> None:
    """The snapshot's bytes beside the base model's config and tokenizer; what was evaluated last is what lies there."""
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
    shutil.copyfile(snapshot.path, partial / "model.safetensors")
    shutil.rmtree(destination, ignore_errors=True)
    partial.rename(destination)
