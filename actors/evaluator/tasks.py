"""What an evaluation consists of: the environment's own held-out problems, and benchmarks, in the configured order."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from actors.environment import Environment, make_environment
from actors.evaluator.benchmarks import load_benchmark
from common.config.evaluation import PROCEDURAL
from common.config.schema import Config
from common.config.schema import Environment as EnvironmentConfig
from common.errors import ConfigError, OperatorError

FORM = "Think as much as you need, then give the final answer alone between <answer> and </answer>."
"""Asked of a family that is a benchmark: without a word about a form, a score would be one of form."""


@dataclass(frozen=True)
class EvaluationTask:
    """Problems that are scored together."""

    name: str
    environment: Environment
    problems: Sequence[int]
    """Numbers of its held-out problems, ascending."""
    golds: Mapping[int, str] = field(default_factory=dict[int, str])
    """Right answers by problem, where they are known."""


def make_tasks(config: Config) -> tuple[EvaluationTask, ...]:
    """Everything to evaluate, at least one task. Raises OperatorError where a task cannot be had."""
    held_out = [_held_out(config)] if config.eval.held_out else []
    tasks = (*held_out, *(_benchmark(request, config) for request in config.eval.benchmarks))
    names = [task.name for task in tasks]
    if names and names.count(names[0]) > 1:
        raise ConfigError(
            [f'eval.benchmarks: got "{names[0]}", which the held-out problems are called, expected another name']
        )
    return tasks


def name_of_held_out(config: Config) -> str:
    """What the environment's own problems are called: the family where it has one."""
    name = str(config.environment.options.get("family", config.environment.name))
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:64]


def _held_out(config: Config) -> EvaluationTask:
    options = config.environment.options
    if not options and config.environment == EnvironmentConfig():
        raise ConfigError(["environment: got none, expected one in --config, or benchmarks alone (--benchmark NAME)"])
    environment = make_environment(config.environment.name, seed=config.run.seed, options=options)
    num_problems = config.eval.num_problems
    try:
        environment.episode("held_out", num_problems - 1)
    except IndexError as error:
        raise OperatorError(f"eval.num_problems: got {num_problems}, expected as many as there are: {error}") from error
    return EvaluationTask(name_of_held_out(config), environment, range(num_problems))


def _benchmark(request: str, config: Config) -> EvaluationTask:
    if request.startswith(PROCEDURAL):
        return _procedural(request, config)
    name, _, source = request.partition("=")
    benchmark = load_benchmark(name, source)
    limit = config.eval.max_benchmark_problems
    problems: Sequence[int] = range(len(benchmark.golds))
    if 0 < limit < len(problems):
        problems = sorted(Random(f"{config.run.seed}/{name}").sample(problems, limit))
    return EvaluationTask(name, benchmark.environment, problems, dict(enumerate(benchmark.golds)))


def _procedural(request: str, config: Config) -> EvaluationTask:
    """A family with its own parameters; its first eval.num_problems held-out problems, or as many as it has."""
    name, equals, source = request.partition("=")
    if equals:
        raise ConfigError([f'eval.benchmarks: got "{request}", expected no source ("{source}") for a family'])
    family = name.removeprefix(PROCEDURAL)
    try:
        environment = make_environment(
            "reasoning_gym", seed=config.run.seed, options={"family": family, "system_prompt": FORM}
        )
    except ConfigError as error:
        reason = str(error).removeprefix(f"environment.options: {family}: ")
        raise ConfigError([f"eval.benchmarks: {name}: {reason}"]) from error
    num_problems = 0
    try:
        while num_problems < config.eval.num_problems:
            environment.episode("held_out", num_problems)
            num_problems += 1
    except IndexError as error:
        if num_problems == 0:
            raise ConfigError([f"eval.benchmarks: {name}: {error}, expected at least one"]) from error
    return EvaluationTask(name, environment, range(num_problems))
