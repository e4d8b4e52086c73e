"""`make pitfalls`: plants each pitfall in a copy of the packages and shows which of the maths tests notice it.

Every pitfall runs the maths tests from a copy of its own, at most two at a time. It fails where one goes unnoticed,
where a pitfall no longer fits the source, or where the tests fail without any.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.pitfalls.catalogue import BATCH, HEAD, PITFALLS, ROWS, SCHEMA, STEP, VLLM, Pitfall

HOUSE = Path(__file__).parents[2]
COPIED = ("actors", "common", "learner", "tests", "pyproject.toml")
OBJECTIVE = ("tests/test_objective_reference.py", "tests/test_objective_golden.py", "tests/test_invariance.py")
STEPS = ("tests/test_invariance.py", "tests/test_composition.py", "tests/test_step.py")
COMPOSITION = ("tests/test_composition.py",)
ENGINE = ("tests/test_vllm.py::test_log_probs_are_those_of_the_loaded_weights_at_the_temperature",)
CONFIG = (
    "tests/test_config.py::test_a_wrong_value_is_refused_in_one_line_with_path_got_and_expected",
    "tests/test_composition.py::test_filtered_sampling_is_refused_in_training",
    "tests/test_methods.py::test_what_would_train_something_else_than_it_says_is_refused",
)


def maths_tests(file: str) -> tuple[str, ...]:
    """The tests that look at the numbers of a step, as far as `file` can change them."""
    if file.startswith("learner/objective/"):
        return OBJECTIVE
    if file in (STEP, HEAD, BATCH, ROWS):
        return STEPS
    if file == VLLM:
        return ENGINE
    return CONFIG if file == SCHEMA else COMPOSITION


LIMIT_S = 280
NUM_AT_A_TIME = 2
BROKEN = {"AttributeError", "ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "TypeError"}
"""What a pitfall that is no program raises: such a failure notices nothing."""


@dataclass(frozen=True)
class Found:
    """What the tests made of one copy."""

    failed: list[str]
    """Names of tests, without their parameters."""
    is_whole: bool
    """Whether pytest ran to its end."""
    said: str
    duration_s: float


def planted(pitfall: Pitfall, house: Path) -> str:
    """The file's text with the pitfall in it. Raises SystemExit where the source has no place for it any more."""
    source = (house / pitfall.file).read_text()
    if (count := source.count(pitfall.right)) != 1:
        raise SystemExit(
            f"pitfalls: {pitfall.name!r}: {pitfall.file}: got {count} places, expected 1 with {pitfall.right!r}: "
            "mend tests/pitfalls/catalogue.py"
        )
    return source.replace(pitfall.right, pitfall.wrong)


def copy_house(destination: Path) -> None:
    for name in COPIED:
        source = HOUSE / name
        if source.is_dir():
            shutil.copytree(source, destination / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, destination / name)


def examine(pitfall: Pitfall | None) -> Found:
    """Run the maths tests in a copy with `pitfall`, or in a faithful one."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pitfall-") as folder:
        house = Path(folder)
        copy_house(house)
        if pitfall:
            (house / pitfall.file).write_text(planted(pitfall, house))
        try:
            done = subprocess.run(
                tests_command(pitfall), cwd=house, capture_output=True, text=True, timeout=LIMIT_S, check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Found([], False, f"not done in {LIMIT_S} s", time.monotonic() - started)
    failures = re.findall(r"^(?:FAILED|ERROR) tests/test_\w+\.py::(\w+).*? - ([\w.]+)", done.stdout, re.MULTILINE)
    names = sorted({name for name, error in failures if error not in BROKEN})
    is_whole = done.returncode == (1 if failures else 0)
    return Found(names, is_whole, done.stdout[-2000:] + done.stderr[-500:], time.monotonic() - started)


def tests_command(pitfall: Pitfall | None) -> list[str]:
    """Two ranks are started only where they can tell more than one does."""
    command = [
        sys.executable, "-B", "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider",
        "-p", "tests.pitfalls.first_failure",
    ]  # fmt: skip
    if pitfall is None:
        return [*command, *dict.fromkeys((*OBJECTIVE, *STEPS, *CONFIG, *ENGINE))]
    ranks = [] if pitfall.needs_two_ranks else ["-k", "not two_ranks"]
    return [*command, *maths_tests(pitfall.file), *ranks]


def report(pitfall: Pitfall, found: Found) -> bool:
    """Print what was found; whether the pitfall was noticed."""
    print(f"{pitfall.name}\n    planted in {pitfall.file}, {found.duration_s:.0f} s", flush=True)
    for name in found.failed:
        print(f"    caught by {name}")
    if not found.failed:
        print(f"    NOT CAUGHT\n{found.said}")
    return bool(found.failed) and found.is_whole


def main(words: list[str]) -> int:
    """Examine all pitfalls, or those whose name or file holds one of `words`."""
    chosen = [one for one in PITFALLS if not words or any(word in f"{one.name} {one.file}" for word in words)]
    started = time.monotonic()
    for pitfall in chosen:
        planted(pitfall, HOUSE)
    faithful = examine(None)
    if faithful.failed or not faithful.is_whole:
        print(f"pitfalls: the tests fail without any:\n{faithful.said}")
        return 1
    with ThreadPoolExecutor(NUM_AT_A_TIME) as pool:
        caught = [report(*one) for one in zip(chosen, pool.map(examine, chosen), strict=True)]
    print(f"{sum(caught)} of {len(chosen)} pitfalls were caught in {time.monotonic() - started:.0f} s")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
