"""The one check that a path is a model folder, made before anything heavy is imported."""

from pathlib import Path

from common.errors import OperatorError


def require_model_folder(path: str | Path) -> Path:
    """The path, where it is a Hugging Face folder. Raises OperatorError elsewhere."""
    if not (Path(path) / "config.json").is_file():
        raise OperatorError(f"model.path: got {str(path)!r}, expected a Hugging Face folder with a config.json")
    return Path(path)
