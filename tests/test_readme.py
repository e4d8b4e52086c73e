"""README keeps its word: its example environment is installed and trained on, and what it names exists."""

import re
import tomllib
from pathlib import Path

from common.config.load import resolve_config
from common.config.schema import Config
from learner.metrics import GAUGES
from tests.installed import install_environment
from tests.runs import LocalRun, read_lines, write_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code_block(marker: str, language: str) -> str:
    """The first block of `language` after `marker`."""
    found = re.search(rf"```{language}\n(.*?)```", README.partition(marker)[2], re.DOTALL)
    assert found, f"README has no {language} block after {marker!r}"
    return found.group(1)


def install_example(folder: Path) -> Path:
    """The example as an installed package."""
    example = code_block("<!-- example:", "python")
    assert (
        len([line for line in example.splitlines() if line.strip() and not line.startswith(("from", "import"))]) <= 10
    )
    entry = code_block("Offer it from any installed package", "toml").splitlines()[-1].replace('"', "")
    return install_environment(folder, example, entry)


def test_the_example_environment_trains(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_model, run={"num_actors": 1}, algorithm={"preset": "grpo"}, learner={"num_steps": 2},
        **tomllib.loads(code_block('reverse = "my_package:Reverse"', "toml")),
    )  # fmt: skip
    with LocalRun(config, extra_path=install_example(tmp_path / "packages")) as run:
        run.finish()
    assert [line["step"] for line in read_lines(run.folder / "metrics.jsonl")] == [1, 2]
    assert read_lines(run.folder / "eval.jsonl")[-1]["task"] == "reverse"


def test_the_configuration_of_every_command_line_is_taken() -> None:
    commands = re.findall(
        r"^(?:CUDA_\S+ )?chord-(?:local|learner|actor|eval) ([^#\n]*--config my\.toml[^#\n]*)", README, re.M
    )
    assert len(commands) >= 6
    for command in commands:
        overrides = [word for word in command.split() if "=" in word and not word.startswith("--")]
        resolve_config(ROOT / "deploy" / "recipes" / "demo.toml", overrides)


def test_every_configuration_key_that_readme_names_exists() -> None:
    sections = Config.model_fields
    for section, key in re.findall(r"`(\w+)\.(\w+)(?: = [^`]*)?`", README):
        if section in sections and key not in ("jsonl", "public"):  # the names of files
            assert key in sections[section].annotation.model_fields, f"README names {section}.{key}"  # pyright: ignore


def test_every_gauge_shows_a_field_that_readme_explains() -> None:
    for field in GAUGES:
        assert field.removesuffix("_max") in README, f"README does not explain {field}"
