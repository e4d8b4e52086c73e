"""A whole run whose actors pass the weights on to one another."""

from pathlib import Path

from tests.runs import LocalRun, audit, import_experts, read_lines, read_summary, write_config


def test_three_actors_cost_the_learner_one_copy_of_a_version_and_the_run_ends_well(
    tiny_model: Path, tmp_path: Path
) -> None:
    slow = {"engine": "simulated", "tokens_per_s": 6.0}  # an actor that has a version keeps it until others have it
    config = write_config(
        tmp_path, tiny_model, run={"num_actors": 3}, actor=slow, eval={"every_steps": 0},
        learner={"num_steps": 6}, weights={"relay": 1, "relay_timeout_s": 20.0},
    )  # fmt: skip
    import_experts(config)
    with LocalRun(config) as run:
        run.finish()
        num_relays = run.output.count("passing versions on to other actors: tcp://127.0.0.1:")
        assert "does not pass" not in run.output
    assert num_relays == 3
    num_bytes = (run.folder / "final" / "model.safetensors").stat().st_size
    lines = read_lines(run.folder / "metrics.jsonl")
    assert num_bytes <= lines[0]["weight_bytes_sent"] <= 2.1 * num_bytes, "versions 0 and perhaps 1, once"
    assert lines[-1]["weight_bytes_sent"] <= 7.1 * num_bytes
    assert read_summary(run.folder)["lost"] == 0
    assert not audit(run.folder)["violations"]
