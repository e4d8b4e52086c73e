"""The rules of the house: who may import whom, what lies where, and how words and files are kept."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
WINGS = ("actors", "learner", "common")
MAY_IMPORT = {"common": {"common"}, "actors": {"actors", "common"}, "learner": {"learner", "common"}}
SOURCES = sorted(path for wing in WINGS for path in (HOUSE / wing).rglob("*.py"))
SCRIPTS: dict[str, str] = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]["scripts"]
HEAVY = {"torch", "transformers", "deepspeed", "vllm", "safetensors", "reasoning_gym"}
MAX_LINES = 400
MAX_CONDUCTOR_LINES = 250
CONDUCTORS = ("conductor.py", "worker.py")
UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}

IMPORT_A_WING = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] not in ("actors", "learner", "common"), error
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

ASK_FOR_HELP = """
import importlib, json, sys
module, _, function = sys.argv[1].partition(":")
sys.argv = [module, "--help"]
try:
    getattr(importlib.import_module(module), function)()
except SystemExit as end:
    print(json.dumps({"code": end.code, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def name_of(path: Path) -> str:
    return str(path.relative_to(HOUSE))


def imported_names(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            yield node.module or ""


def run_child(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A Python process that was started in `folder`; warnings of other people's packages are theirs."""
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=True)


def test_imports_run_one_way() -> None:
    for path in SOURCES:
        wing = path.relative_to(HOUSE).parts[0]
        ours = {name.partition(".")[0] for name in imported_names(path)} & set(WINGS)
        assert ours <= MAY_IMPORT[wing], name_of(path)


@pytest.mark.parametrize("wing", WINGS)
def test_a_process_that_imports_a_whole_wing_has_nothing_of_the_other(wing: str, tmp_path: Path) -> None:
    loaded = set(json.loads(run_child(IMPORT_A_WING, wing, folder=tmp_path).stdout.splitlines()[-1]))
    assert loaded & set(WINGS) == MAY_IMPORT[wing]


def test_the_packages_are_those_of_this_checkout_wherever_a_process_starts(tmp_path: Path) -> None:
    code = "import actors, learner, common; print(*(p.__file__ for p in (actors, learner, common)), sep='\\n')"
    found = [Path(line) for line in run_child(code, folder=tmp_path).stdout.splitlines()]
    assert found == [HOUSE / wing / "__init__.py" for wing in WINGS]


def test_an_init_file_holds_one_docstring_and_exports_nothing() -> None:
    for path in SOURCES:
        if path.name == "__init__.py":
            module = ast.parse(path.read_text())
            assert ast.get_docstring(module), name_of(path)
            assert len(module.body) == 1, name_of(path)


def test_every_file_begins_by_saying_what_it_is_for() -> None:
    assert [name_of(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_nothing_is_unpickled() -> None:
    for path in SOURCES:
        assert not UNSAFE & {name.partition(".")[0] for name in imported_names(path)}, name_of(path)
        attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not {"recv_pyobj", "send_pyobj"} & attributes, name_of(path)


def test_every_file_is_short_enough_to_be_read() -> None:
    for path in SOURCES:
        limit = MAX_CONDUCTOR_LINES if path.name in CONDUCTORS else MAX_LINES
        assert len(path.read_text().splitlines()) <= limit, name_of(path)


def test_every_module_is_named_after_a_noun_of_the_system() -> None:
    for path in SOURCES:
        parts = {part.removesuffix(".py") for part in path.relative_to(HOUSE).parts}
        assert not parts & {"util", "utils", "helper", "helpers", "misc", "manager", "managers"}, name_of(path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_answers_for_help_without_heavy_imports(script: str, tmp_path: Path) -> None:
    lines = run_child(ASK_FOR_HELP, SCRIPTS[script], folder=tmp_path).stdout.splitlines()
    assert any("Usage" in line for line in lines)
    end = json.loads(lines[-1])
    assert end["code"] == 0
    assert not HEAVY & set(end["modules"])
    assert set(end["modules"]) & set(WINGS) <= MAY_IMPORT[SCRIPTS[script].partition(".")[0]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_is_also_a_module_to_run(script: str, tmp_path: Path) -> None:
    module = SCRIPTS[script].partition(":")[0]
    assert module.endswith(".__main__")
    command = [sys.executable, "-m", module.removesuffix(".__main__"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
