"""deploy/docker: the image's Dockerfile, and the compose file with everything."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from common.config.load import resolve_config
from tests.deploy.checkov import findings
from tests.deploy.manifests import CLUSTERS, pods
from tests.deploy.pins import IMAGE, TARGETS, Unresolved, path_of, pins, resolve
from tests.deploy.test_kubernetes import MODULES
from tests.deploy.tools import ROOT, TOOLS

DOCKER = ROOT / "deploy" / "docker"
PYTHON = TOOLS / "python" / "bin"
METRICS_PORT = 9400
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def dockerfile() -> str:
    """Its instructions, one a line."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    return "\n".join(lines).replace("\\\n", " ")


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([PYTHON / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_checkov_finds_nothing(tmp_path: Path) -> None:
    shutil.copy(DOCKER / "Dockerfile", tmp_path)
    assert findings("dockerfile", tmp_path) == []


@pytest.mark.parametrize("target", TARGETS)
def test_every_version_is_pinned_within_what_the_project_asks_for(target: str) -> None:
    pinned = dict(line.split("==") for line in pins(target))
    for wanted in map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][target]]):
        assert wanted.specifier.contains(pinned[wanted.name.lower()]), wanted
    (stage,) = re.findall(rf"^FROM build AS build-{target}\n(.*?)(?=^FROM |\Z)", dockerfile(), re.MULTILINE | re.DOTALL)
    assert f"COPY deploy/docker/{path_of(target).name} constraints.txt\n" in stage
    assert f'RUN pip install ".[{target}]"' in stage
    assert "PIP_CONSTRAINT=/build/constraints.txt" in dockerfile()


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_pinned_can_be_installed_and_is_all_that_would_be(target: str) -> None:
    try:
        resolved = resolve(target)
    except Unresolved as error:
        if target == "cpu" and "no version of torch==" in str(error):
            pytest.skip("no index at hand has PyTorch's CPU build: name one in PIP_EXTRA_INDEX_URL")
        raise
    assert resolved == pins(target)


def test_the_base_of_the_images_is_a_python_that_the_project_takes() -> None:
    bases = re.findall(r"^FROM (\S+)", dockerfile(), re.MULTILINE)
    (python,) = [base.partition("@")[0] for base in bases if ":" in base]
    image, _, tag = python.partition(":")
    assert (image, tag.partition("-")[2]) == ("python", "slim-bookworm")
    release = tag.partition("-")[0]
    assert SpecifierSet(PROJECT["requires-python"]).contains(release)
    assert release.rpartition(".")[0] in IMAGE


def test_the_build_is_given_what_it_copies_and_nothing_else() -> None:
    copied = {
        word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile(), re.MULTILINE) for word in line.split()
    }
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    for name in copied:
        assert (ROOT / name).exists(), name


def test_containers_run_as_the_images_user_and_are_asked_at_the_port_that_they_serve() -> None:
    (user,) = re.findall(r"^USER (\d+):\1$", dockerfile(), re.MULTILINE)
    assert f":{METRICS_PORT}/healthz" in re.findall(r"HEALTHCHECK.*", dockerfile())[0]
    for folder in CLUSTERS.values():
        for pod in pods(folder):
            context = pod.spec["securityContext"]
            assert {context["runAsUser"], context["runAsGroup"], context["fsGroup"]} == {int(user)}
            assert pod.ports["metrics"] == METRICS_PORT


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The compose file as Compose itself resolves it."""
    command = [TOOLS / "docker-compose", "--file", DOCKER / "compose.yml", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def words_of(service: dict[str, Any]) -> list[str]:
    """What it runs, in words; a script's last line."""
    command = service["command"]
    if command[0] != "/bin/sh":
        return command
    script = command[-1].replace("\\\n", " ").replace("$$", "$").strip().splitlines()[-1]
    return script.removeprefix("exec ").replace('"', "").replace("$(cat /etc/hostname)", "0a1b2c").split()


def test_what_compose_mounts_exists(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for volume in service["volumes"]:
            if volume["type"] == "bind" and volume["source"] != str(ROOT / "models"):  # made by `make`
                assert Path(volume["source"]).exists(), (name, volume["source"])


def test_every_command_of_compose_accepts_its_configuration(compose: dict[str, Any]) -> None:
    recipe = str(ROOT / "deploy" / "recipes" / "demo.toml")
    for name in ("learner", "actor", "evaluator"):
        service = compose["services"][name]
        command, *words = [word.replace("/etc/chord/chord.toml", recipe) for word in words_of(service)]
        done = subprocess.run(
            [sys.executable, "-m", MODULES[command], *words, "--check"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        config = resolve_config(Path(recipe), [word for word in words if "=" in word and word[0] != "-"]).config
        section = {"learner": config.learner, "actor": config.actor, "evaluator": config.eval}[name]
        assert section.metrics_port == METRICS_PORT
        assert config.network.port == 5757
        assert config.network.host == ("0.0.0.0" if name == "learner" else "learner")
        minutes = int(service["stop_grace_period"].partition("m")[0])
        assert 60 * minutes > config.actor.drain_s


def test_scripts_in_compose_are_clean(compose: dict[str, Any]) -> None:
    commands = [service["command"] for service in compose["services"].values() if service.get("command")]
    scripts = [command[-1].replace("$$", "$") for command in commands if command[0] == "/bin/sh"]
    assert len(scripts) == 2
    for script in scripts:
        done = subprocess.run(["shellcheck", "--shell=sh", "-"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_every_container_of_compose_has_no_more_rights_than_it_needs(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ()))
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"])


def test_an_index_of_cpu_builds_reaches_the_build(compose: dict[str, Any]) -> None:
    assert "PIP_EXTRA_INDEX_URL=… docker compose" in (DOCKER / "compose.yml").read_text()
    command = [TOOLS / "docker-compose", "--file", DOCKER / "compose.yml", "config", "--format", "json"]
    environment = {**os.environ, "PIP_EXTRA_INDEX_URL": "https://example.org/cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for name, service in json.loads(done.stdout)["services"].items():
        if "build" in compose["services"][name]:
            assert service["build"]["args"]["PIP_EXTRA_INDEX_URL"] == "https://example.org/cpu"
    (stage,) = re.findall(r"^FROM base AS build\n(.*?)^FROM ", dockerfile(), re.MULTILINE | re.DOTALL)
    assert "ARG PIP_EXTRA_INDEX_URL=\n" in stage


def test_prometheus_of_compose_is_that_of_a_lab_machine_without_an_alertmanager(compose: dict[str, Any]) -> None:
    mounted = {volume["target"]: volume["source"] for volume in compose["services"]["prometheus"]["volumes"]}
    path = Path(mounted["/etc/prometheus/prometheus.yml"])
    ours, other = (yaml.safe_load(one.read_text()) for one in (path, ROOT / "deploy/prometheus/prometheus.yml"))
    del other["alerting"]
    assert ours == other
    assert not any("alertmanager" in service["image"] for service in compose["services"].values())


def test_prometheus_and_grafana_find_what_compose_starts(compose: dict[str, Any]) -> None:
    services = compose["services"]
    targets = yaml.safe_load((DOCKER / "targets" / "compose.yml").read_text())
    hosts = {target.partition(":")[0] for one in targets for target in one["targets"]}
    replicas = services["actor"]["deploy"]["replicas"]
    actors = {f"{compose['name']}-actor-{number + 1}" for number in range(replicas)}
    assert hosts == {"learner", "evaluator", *actors}
    assert {target.partition(":")[2] for one in targets for target in one["targets"]} == {str(METRICS_PORT)}
    assert {one["labels"]["job"] for one in targets} == set(MODULES)
    assert len({one["labels"]["run"] for one in targets}) == 1
    mounts = {volume["target"] for volume in services["grafana"]["volumes"]}
    providers = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/chord.yaml").read_text())["providers"]
    assert {provider["options"]["path"] for provider in providers} <= mounts
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "deploy/grafana/dashboards" / Path(home).name).exists()
    sources = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/chord.yaml").read_text())["datasources"]
    assert [source["url"] for source in sources] == ["$PROMETHEUS_URL"]
    assert services["grafana"]["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
