"""Whole runs under chord-local: what hangs is noticed, named, started again, and the run ends well."""

import os
import re
import signal
from pathlib import Path

from tests.runs import LocalRun, import_experts, read_summary, write_config


def test_a_stopped_actor_and_a_stopped_learner_are_replaced_and_the_run_ends_well(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path, tiny_model, run={"num_actors": 1, "watchdog_s": 8.0}, actor={"engine": "simulated"},
        eval={"every_steps": 0}, learner={"num_steps": 400, "checkpoint_every_steps": 5}, network={"lease_s": 3.0},
    )  # fmt: skip
    import_experts(config)
    with LocalRun(config) as run:
        for name in ("actor-0", "learner"):
            done = run.num_steps_done()
            run.wait_until(lambda done=done: run.num_steps_done() > done)
            stopped = run.components()[name]
            os.kill(stopped.pid, signal.SIGSTOP)
            silence = rf"{name} has given no sign of life for \d+ s \(its last: .*expected one within 8 s"
            run.wait_until(lambda silence=silence: bool(re.search(silence, run.output)))
            run.wait_until(lambda name=name: f"{name} ended with signal SIGKILL: starting it again" in run.output)
        done = run.num_steps_done()
        run.wait_until(lambda: run.num_steps_done() > done)
        run.stop()
        run.finish()
    summary = read_summary(run.folder)
    assert summary["lost"] == summary["duplicates"] == 0
    assert summary["incarnations"] == 2
