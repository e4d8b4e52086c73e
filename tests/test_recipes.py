"""The recipes of the paper's runs: what they resolve to, and that what they need is what the imports make."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from actors.environment import make_environment
from common.config.load import resolve_config
from common.config.presets import PRESETS
from common.config.schema import Config
from learner.expert.openr1 import Prompting
from learner.schedule import lr_of, mu_of

ROOT = Path(__file__).parents[1]
MATHS, TOOLS = "qwen2.5-7b-openr1-math", "llama3.2-3b-toolace"
BILLIONS = {MATHS: 7.62, TOOLS: 3.21}
"""Parameters of the models, as their cards say."""
RECIPES = sorted(path.stem for path in (ROOT / "deploy" / "recipes").glob("*.toml"))


def path_of(recipe: str) -> Path:
    return ROOT / "deploy" / "recipes" / f"{recipe}.toml"


def recipe(name: str, *overrides: str) -> Config:
    return resolve_config(path_of(name), overrides).config


def mus(config: Config, *steps: int) -> list[float]:
    return [round(mu_of(config, step, mean_reward=None), 4) for step in steps]


@pytest.mark.parametrize("name", [MATHS, TOOLS])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_of_the_paper_resolves_with_every_preset(name: str, preset: str) -> None:
    config = recipe(name, f"algorithm.preset={preset}")
    assert config.algorithm.preset == preset
    assert config.algorithm.aggregation == "token_mean"


@pytest.mark.parametrize("name", [MATHS, TOOLS])
@pytest.mark.parametrize("module", ["learner", "actors", "actors.evaluator", "learner.expert list", "common.local"])
def test_every_command_checks_a_recipe_of_the_paper(name: str, module: str) -> None:
    command = [sys.executable, "-m", *module.split(), "--config", f"deploy/recipes/{name}.toml", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f'run.dir = "runs/{name}"' in done.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves(name: str) -> None:
    assert recipe(name).run.dir.startswith("runs/")


def test_the_maths_recipe_has_the_papers_numbers() -> None:
    config = recipe(MATHS)
    learner, algorithm = config.learner, config.algorithm
    assert (learner.num_steps, learner.groups_per_step, config.expert.rows_per_step) == (1500, 32, 64)
    assert (algorithm.group_size, config.sampling.temperature, config.sampling.max_tokens) == (8, 1.0, 16 << 10)
    assert learner.adam_betas == (0.9, 0.999)
    assert learner.lr in (1e-6, 5e-6, 1e-5)
    assert [lr_of(config, step) for step in (0, 1499)] == [learner.lr] * 2
    assert config.environment.options["reward"] == "four_level"
    assert (algorithm.expert_weighting, algorithm.advantage_scale) == ("none", "std")
    assert mus(config, 0, 100, 200, 1499) == [0.9, 0.475, 0.05, 0.05]


def test_the_tools_recipe_has_the_papers_numbers() -> None:
    config = recipe(TOOLS)
    learner, algorithm = config.learner, config.algorithm
    assert (learner.num_steps, learner.groups_per_step, config.expert.rows_per_step) == (100, 96, 96)
    assert (algorithm.group_size, config.sampling.temperature, learner.lr) == (8, 1.0, 1e-6)
    assert config.environment.name == "function_calling"
    assert (algorithm.expert_weighting, algorithm.advantage_scale) == ("none", "std")
    assert mus(config, 0, 10, 20, 99) == [0.6, 0.3, 0.0, 0.0]


@pytest.mark.parametrize("name", [MATHS, TOOLS])
def test_chord_phi_on_the_command_line_has_its_own_constant_mu(name: str) -> None:
    config = recipe(name, "algorithm.preset=chord_phi")
    assert config.algorithm.expert_weighting == "phi"
    assert mus(config, 0, 10, 200, 1499) == [0.1] * 4


def test_the_maths_recipe_is_evaluated_as_in_the_paper() -> None:
    config = recipe(MATHS)
    assert config.eval.benchmarks == ["aime24", "aime25"]
    assert (config.eval.samples_per_problem, config.eval.temperature) == (32, 1.0)
    for benchmark in ("amc", "mmlu_pro"):
        assert benchmark in path_of(MATHS).read_text()
        assert recipe(MATHS, f'eval.benchmarks=["{benchmark}"]').eval.benchmarks == [benchmark]


@pytest.mark.parametrize("name", [MATHS, TOOLS])
def test_limits_of_a_recipe_fit_each_other(name: str) -> None:
    config = recipe(name)
    assert config.actor.max_model_tokens >= config.sampling.max_tokens + 1024
    assert (config.actor.dtype, config.model.dtype, config.learner.zero_stage) == ("bfloat16", "bfloat16", 2)
    assert config.expert.path != recipe(TOOLS if name == MATHS else MATHS).expert.path


@pytest.mark.parametrize("name", [MATHS, TOOLS])
def test_memory_in_the_comments_is_what_parameters_and_ranks_make(name: str) -> None:
    """In GB: parameters, float32 copy and moments, all that a rank holds (tools: with 8,192 tokens of activations)."""
    text, num_ranks, billions = path_of(name).read_text(), recipe(name).learner.num_ranks, BILLIONS[name]
    parameters, moments = 2 * billions, 12 * billions
    activations = 8192 * 0.3e-3 if name == TOOLS else 0.0
    held = parameters + (moments + parameters) / num_ranks + 3 + activations
    assert f" {parameters:.1f}" in text
    assert f" {moments:.1f} / R" in text
    assert f" {held:.0f} GB" in text


def test_the_maths_recipes_expert_rows_answer_its_prompts(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(9)))
    config = recipe(MATHS, f"environment.options.source={source}")
    environment: Any = make_environment("math", seed=config.run.seed, options=config.environment.options)
    task, messages = environment.task("train", 0)
    assert tuple(messages) == Prompting.of(config).messages(task.question)
    right, wrong = f"So \\boxed{{{task.answer}}}", "So \\boxed{-7}"
    rewards = [
        environment.judge(task, text, is_truncated=is_truncated).reward
        for text, is_truncated in ((right, False), (wrong, False), ("I do not know.", False), ("Let me", True))
    ]
    assert rewards == [1.0, 0.0, -0.1, -1.0]


@pytest.mark.parametrize("name", [MATHS, TOOLS])
def test_a_recipe_names_each_key_once_and_only_such_as_exist(name: str) -> None:
    document = tomllib.loads(path_of(name).read_text())
    for section, keys in document.items():
        assert set(keys) <= set(type(getattr(recipe(name), section)).model_fields), section


def run_elsewhere(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in a folder where there is no model and no prompts file."""
    command = [sys.executable, "-m", *map(str, arguments), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("name", "dataset"), [(MATHS, "openr1-math"), (TOOLS, "toolace")])
def test_the_check_of_an_import_reads_nothing_but_the_recipe(name: str, dataset: str, tmp_path: Path) -> None:
    done = run_elsewhere(tmp_path, "learner.expert", "import", dataset, "--config", path_of(name))
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
