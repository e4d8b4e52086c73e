"""The configuration: what goes before what, what is refused and in which words, and what components must agree on."""

import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.worker import REPORT_S
from common.config.load import resolve_config, to_toml_document
from common.config.presets import PRESETS
from common.config.schema import Config
from common.errors import ConfigError, OperatorError
from common.local.__main__ import require_same_run
from common.run_dir import RunDir
from tests.configuration_table import PAGE, page
from tests.runs import run_module, write_config

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
plain_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | text,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(text, values, max_size=3),
    max_leaves=6,
)


def written(folder: Path, document: str) -> Path:
    path = folder / "run.toml"
    path.write_text(document, encoding="utf-8")
    return path


def refusal(*overrides: str, path: Path | None = None) -> str:
    """The one line that a wrong configuration is refused with."""
    with pytest.raises(ConfigError) as refused:
        resolve_config(path, overrides)
    (line,) = refused.value.lines
    assert "\n" not in line
    return line


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "learner", "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_preset_gives_way_to_the_file_and_the_file_to_an_override(tmp_path: Path) -> None:
    path = written(tmp_path, '[algorithm]\npreset = "chord_mu"\nmu_peak = 0.5\nmu_decay_steps = 7\n')
    resolved = resolve_config(path, ["algorithm.mu_decay_steps=9"])
    algorithm = resolved.config.algorithm
    assert (algorithm.mu_valley, algorithm.mu_peak, algorithm.mu_decay_steps) == (0.05, 0.5, 9)
    assert resolved.origins["algorithm", "mu_valley"] == "preset chord_mu"
    assert resolved.origins["algorithm", "mu_peak"] == str(path)
    assert resolved.origins["algorithm", "mu_decay_steps"] == "override"
    assert ("algorithm", "cap") not in resolved.origins


def test_another_preset_on_the_command_line_discards_the_file_s_values_of_the_keys_it_owns(tmp_path: Path) -> None:
    path = written(tmp_path, '[algorithm]\npreset = "chord_mu"\nmu_peak = 0.5\ncap = 3.0\n')
    resolved = resolve_config(path, ["algorithm.preset=grpo"])
    assert resolved.config.algorithm.mu_peak == 0.0
    assert resolved.config.algorithm.cap == 3.0
    assert resolved.origins["algorithm", "mu_peak"] == "preset grpo"
    assert resolve_config(path, ["algorithm.preset=grpo", "algorithm.mu_peak=0.0"]).config == resolved.config


def test_the_file_s_own_preset_named_again_discards_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, '[algorithm]\npreset = "chord_phi"\nmu_peak = 0.3\nmu_valley = 0.3\n')
    assert resolve_config(path, ["algorithm.preset=chord_phi"]).config.algorithm.mu_peak == 0.3


def test_presets_own_the_same_keys_of_the_algorithm_and_are_valid() -> None:
    owned = {frozenset(keys) for keys in PRESETS.values()}
    assert len(owned) == 1
    assert owned.pop() <= set(type(Config().algorithm).model_fields)
    for name, values in PRESETS.items():
        found = resolve_config(None, [f"algorithm.preset={name}"]).config.algorithm.model_dump()
        assert values.items() <= found.items()
    assert not resolve_config(None, ["algorithm.preset=grpo"]).config.algorithm.trains_on_experts
    assert not resolve_config(None, ["algorithm.preset=sft"]).config.algorithm.trains_on_groups


def test_single_environment_options_are_merged_into_the_file_s(tmp_path: Path) -> None:
    path = written(tmp_path, '[environment.options]\nfamily = "chain_sum"\nmax_terms = 3\n')
    overrides = ["environment.options.max_terms=4", "environment.options.note=any text", "environment.options.on=true"]
    options = resolve_config(path, overrides).config.environment.options
    assert options == {"family": "chain_sum", "max_terms": 4, "note": "any text", "on": True}
    assert resolve_config(path, ["environment.options={a = 1}"]).config.environment.options["a"] == 1


def test_overrides_are_toml_where_they_are_and_bare_text_where_they_are_not() -> None:
    overrides = ["run.dir=true", "model.path=1e3", "learner.lr=1e-5", "algorithm.band=[0.25, 4]", "actor.swap=wait"]
    config = resolve_config(None, [*overrides, "learner.share_prompts=false"]).config
    assert (config.run.dir, config.model.path, config.learner.lr) == ("true", "1e3", 1e-5)
    assert (config.algorithm.band, config.actor.swap, config.learner.share_prompts) == ((0.25, 4.0), "wait", False)


@settings(deadline=None, derandomize=True)
@given(
    directory=text.filter(bool), host=text, lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    options=st.dictionaries(text, plain_values, max_size=4), betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_a_configuration_comes_back_from_its_own_document(
    tmp_path_factory: pytest.TempPathFactory, directory: str, host: str, lr: float, options: dict[str, Any],
    betas: tuple[float, float], seed: int,
) -> None:  # fmt: skip
    document: dict[str, Any] = Config().model_dump(mode="json")
    document["run"] |= {"dir": directory, "seed": seed}
    document["network"] |= {"host": host, "allow_unauthenticated": True}
    document["learner"] |= {"lr": lr, "adam_betas": betas}
    document["environment"]["options"] = options
    document["algorithm"] |= PRESETS["chord_mu"]
    config = Config.model_validate(document)
    run_dir = RunDir(tmp_path_factory.getbasetemp())
    run_dir.save_config(config)
    assert resolve_config(run_dir.config).config == config
    require_same_run(run_dir, config)
    assert resolve_config(run_dir.config).config.agreement_hash == config.agreement_hash
    assert [path.name for path in run_dir.path.glob("config*")] == ["config.toml"]


def test_infinite_options_come_back_too(tmp_path: Path) -> None:
    config = resolve_config(None, ["environment.options={low = -inf, high = inf}"]).config
    found = resolve_config(written(tmp_path, to_toml_document(config))).config
    assert found.environment.options == {"low": -math.inf, "high": math.inf}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learner.lrr=1", ["learner.lrr", "unknown key", "learner.lr"]),
        ("lerner.lr=1", ["lerner", "unknown key", "learner"]),
        ("run.nonsense=1", ["run.nonsense", "unknown key", "num_actors"]),
        ("learner.num_steps=many", ["learner.num_steps", 'got "many"', "expected integer"]),
        ("learner.num_steps=1.5", ["learner.num_steps", "got 1.5", "expected integer"]),
        ("learner.share_prompts=1", ["learner.share_prompts", "got 1", "expected boolean"]),
        ("learner.lr=0", ["learner.lr", "got 0", "expected greater than 0"]),
        ("learner.lr=nan", ["learner.lr", "got NaN", "expected a finite number"]),
        ("sampling.temperature=inf", ["sampling.temperature", "got Infinity", "expected a finite number"]),
        ("run.dir=", ["run.dir", 'got ""', "expected at least 1 character"]),
        ("network.port=65536", ["network.port", "got 65536", "expected less than or equal to 65535"]),
        ("actor.swap=maybe", ["actor.swap", 'got "maybe"', "expected 'in_flight' or 'wait'"]),
        ("algorithm.preset=[1]", ["algorithm.preset", "got [1]", "expected 'sft', 'grpo'"]),
        ("algorithm.cap=2024-01-01", ["algorithm.cap", "got 2024-01-01", "expected text, numbers"]),
        ("environment.options=5", ["environment.options", "got 5", "expected an object"]),
        ("algorithm.group_size=1", ["algorithm.group_size", "got 1", "expected greater than or equal to 2"]),
        ("algorithm.band=[5, 1]", ["algorithm.band", "got [5.0, 1.0]", "expected [low, high]"]),
        ("algorithm.mu_decay_steps=0", ["algorithm.mu_decay_steps", "got 0 with mu_peak 0.9", "expected a decay"]),
        (
            "learner.offload=optimizer",
            ["learner.offload", 'got "optimizer" with zero_stage 0', "expected zero_stage 1"],
        ),
        ("expert.rows_per_step=0", ["expert.rows_per_step", "got 0 with algorithm.mu_peak 0.9", "expected at least 1"]),
        ("algorithm.correction=none", ["algorithm.correction", 'got "none" with max_staleness 1', "expected a corr"]),
        ("learner=1", ["got 'learner=1'", "expected section.key=value"]),
        ("learner.lr", ["got 'learner.lr'", "expected section.key=value"]),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_with_path_got_and_expected(override: str, words: list[str]) -> None:
    line = refusal(override)
    assert line.startswith("override: ")
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize("section", ["sampling", "eval"])
def test_answers_that_leave_the_prompt_no_room_are_refused(section: str) -> None:
    line = refusal(f"{section}.max_tokens=512", "actor.max_model_tokens=512")
    assert line.startswith(f"override: {section}.max_tokens: got 512, expected fewer than actor.max_model_tokens (512)")
    resolve_config(None, [f"{section}.max_tokens=511", "actor.max_model_tokens=512"])


def test_the_length_of_answers_that_nobody_samples_does_not_matter() -> None:
    unused = ["algorithm.preset=sft", "sampling.max_tokens=2048"]
    resolve_config(None, [*unused, "eval.max_tokens=64"])
    assert "sampling.max_tokens: got 2048" in refusal(*unused)


def test_a_lease_must_outlive_a_report_that_comes_twice_as_late_as_it_should() -> None:
    resolve_config(None, [f"network.lease_s={2 * REPORT_S}"])
    line = refusal(f"network.lease_s={1.9 * REPORT_S}")
    assert line == "override: network.lease_s: got 1.9, expected greater than or equal to 2"


def test_numbers_may_be_written_as_python_does_and_unset_takes_a_value_back(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[algorithm]\nmu_target = 0.4\nmu_peak = 0.5\nmu_valley = 0.5\n")
    assert resolve_config(path).config.algorithm.mu_target == 0.4
    algorithm = resolve_config(path, ["algorithm.mu_target=unset", "algorithm.mu_peak=.5"]).config.algorithm
    assert (algorithm.mu_target, algorithm.mu_peak) == (None, 0.5)
    assert refusal("algorithm.cap=unset").endswith('got "unset", expected number')


def test_what_is_refused_in_one_company_is_fine_in_another() -> None:
    resolve_config(None, ["algorithm.preset=grpo", "expert.rows_per_step=0"])
    resolve_config(None, ["algorithm.correction=none", "algorithm.max_staleness=0"])
    resolve_config(None, ["algorithm.mu_decay_steps=0", "algorithm.mu_peak=0.2", "algorithm.mu_valley=0.2"])


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("[learner]\nnum_steps = true\n", ["learner.num_steps", "got true", "expected integer"]),
        ("num_steps = 3\n", ["num_steps", "got 3", "expected [section] key = value"]),
        ("today = 2024-01-01\n", ["today", "expected [section] key = value"]),
        ("[algorithm]\npreset = { a = 1 }\n", ["algorithm.preset", 'got {"a": 1}', "expected 'sft', 'grpo'"]),
        ("[learner\n", ["not a TOML file"]),
    ],
)
def test_a_wrong_file_is_named_in_the_line(document: str, words: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, document)
    line = refusal(path=path)
    assert [word for word in [str(path), *words] if word not in line] == [], line


def test_every_mistake_has_a_line_of_its_own() -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_config(None, ["learner.lr=-1", "run.seed=-1", "eval.engine=none"])
    assert [line.split(":")[1].strip() for line in refused.value.lines] == ["run.seed", "learner.lr", "eval.engine"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"nowhere\.toml: cannot be read .* expected a configuration file"):
        resolve_config(tmp_path / "nowhere.toml")


def test_check_prints_every_value_with_its_origin_and_ends_with_0(tmp_path: Path) -> None:
    path = written(tmp_path, "[learner]\nlr = 2e-6\n")
    done = check("--config", str(path), "run.dir=runs/μ", "algorithm.preset=chord_phi")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.partition(" = ")[0]: line for line in done.stdout.splitlines()}
    assert len(lines) == sum(len(section) for section in Config().model_dump().values())
    assert lines["learner.lr"].endswith(f"# {path}")
    assert lines["run.dir"].endswith("# override")
    assert "runs/μ" in lines["run.dir"]
    assert lines["algorithm.mu_peak"].endswith("# preset chord_phi")
    assert lines["algorithm.cap"].endswith("# default")


def test_a_process_with_a_wrong_configuration_ends_with_2_and_one_line_for_each_mistake(tmp_path: Path) -> None:
    path = written(tmp_path, "[learner]\nlrr = 2e-6\n")
    done = check("--config", str(path), "algorithm.group_size=1", "learner.num_steps=many")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("chord-learner: ") and "expected" in line for line in lines)
    assert [
        name for name in ("algorithm.group_size", "learner.num_steps", "learner.lrr") if name not in done.stderr
    ] == []


AGREED = ["run.seed=1", "sampling.max_tokens=65", "sampling.temperature=0.9", "environment.options.family=gsm_symbolic"]
AGREED += ["environment.name=other", "algorithm.group_size=4", "algorithm.cap=3", "algorithm.max_staleness=2"]
AGREED += ["algorithm.preset=grpo", "eval.num_problems=7", "eval.temperature=1"]
AGREED += ['eval.benchmarks=["amc"]', "eval.max_benchmark_problems=5", "eval.top_p=0.9", "eval.top_k=20"]
AGREED += ["eval.max_tokens=9"]
FREE = ["run.dir=elsewhere", "run.num_actors=9", "learner.lr=1e-5", "learner.num_steps=7", "network.port=1"]
FREE += [
    'run.sinks=["wandb"]',
    "actor.engine=simulated",
    "eval.every_steps=3",
    "eval.engine=vllm",
    "eval.save_samples=true",
    "model.path=here",
    "expert.rows_per_step=8",
]


def test_the_agreement_hash_changes_with_what_must_agree_and_with_nothing_else() -> None:
    hashes = {change: resolve_config(None, [change]).config.agreement_hash for change in [*AGREED, *FREE]}
    begun = resolve_config(None).config.agreement_hash
    assert [change for change in FREE if hashes[change] != begun] == []
    assert len({begun, *(hashes[change] for change in AGREED)}) == 1 + len(AGREED)


def test_the_configuration_cannot_be_changed_once_it_is_made() -> None:
    with pytest.raises(ValueError, match="frozen"):
        resolve_config(None).config.learner.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("samples_per_problem=8", "eval.samples_per_problem: got 8 with eval.temperature 0, expected 1"),
        ("top_p=0", "eval.top_p: got 0, expected greater than 0"),
        ("top_p=1.5", "eval.top_p: got 1.5, expected less than or equal to 1"),
        ("top_k=-1", "eval.top_k: got -1, expected greater than or equal to 0"),
        ("held_out=false", "eval.held_out: got false without eval.benchmarks"),
        ('benchmarks=["math501"]', 'eval.benchmarks: got "math501", expected one of amc, aime24'),
        ('benchmarks=["amc", "amc=x.jsonl"]', 'eval.benchmarks: got "amc" 2 times, expected it once'),
        (f"benchmarks={[f'reasoning_gym/{n}' for n in range(32)]}", "eval.benchmarks: got 32, expected 31 at most"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(change: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_config(None, [f"eval.{change}"])
    (line,) = refused.value.lines
    assert line.startswith(f"override: {said}")


def test_samples_and_their_temperature_are_accepted_together() -> None:
    evaluation = resolve_config(None, ["eval.samples_per_problem=8", "eval.temperature=0.6"]).config.eval
    assert (evaluation.samples_per_problem, evaluation.temperature) == (8, 0.6)


def test_a_run_of_another_method_is_not_taken_for_this_one(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    begun = resolve_config(None, ["algorithm.preset=chord_mu", "model.path=m"]).config
    require_same_run(run_dir, begun)
    run_dir.save_config(begun)
    require_same_run(run_dir, resolve_config(None, FREE).config)
    for override, words in {
        "algorithm.preset=grpo": 'algorithm.preset: got "grpo", expected "chord_mu"',
        "algorithm.mu_target=0.5": "algorithm.mu_target: got 0.5, expected unset",
        "sampling.temperature=0.5": "sampling.temperature: got 0.5, expected 1.0",
        "run.seed=3": "run.seed: got 3, expected 0",
        "learner.groups_per_step=3": "learner.groups_per_step: got 3, expected 8",
        "learner.lora_rank=3": "learner.lora_rank: got 3, expected 0",
    }.items():
        with pytest.raises(OperatorError, match=words):
            require_same_run(run_dir, resolve_config(None, [override]).config)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_of_any_preset_is_taken_for_itself(preset: str, tmp_path: Path) -> None:
    config = resolve_config(None, [f"algorithm.preset={preset}", "model.path=m"]).config
    RunDir(tmp_path).save_config(config)
    require_same_run(RunDir(tmp_path), config)


@pytest.fixture
def begun_run(tiny_model: Path, tmp_path: Path) -> Path:
    """The configuration of a run that has begun and is not complete."""
    path = write_config(tmp_path, tiny_model)
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    run_dir.save_config(resolve_config(path).config)
    run_dir.ledger.touch()
    return path


def start_local(config: Path, *arguments: str) -> str:
    """The one line that chord-local refuses to start with."""
    done = run_module("common.local", "--config", str(config), *arguments, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    return done.stderr


def test_a_refused_start_leaves_the_record_of_the_run_as_it_was(begun_run: Path) -> None:
    record = RunDir(begun_run.parent / "run").config
    before = record.read_bytes()
    line = start_local(begun_run, "sampling.max_tokens=7", "learner.num_steps=9", "network.port=1")
    assert f"{record.parent}: sampling.max_tokens: got 7, expected 6, with which the run in it began" in line
    assert record.read_bytes() == before


@pytest.mark.parametrize(
    "changed",
    [
        ["learner.num_steps=9", "run.num_actors=5", "learner.group_timeout_s=900", "learner.lr=1e-5"],
        ["sampling.max_tokens=7", "--fresh"],
    ],
)
def test_what_a_later_start_may_change_and_a_fresh_one_are_no_other_run(begun_run: Path, changed: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # where the start comes to next
        line = start_local(begun_run, *changed, f"network.port={taken.getsockname()[1]}")
    assert "is taken, expected a free port" in line


def test_the_page_of_all_keys_is_that_of_the_schema() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.configuration_table"
