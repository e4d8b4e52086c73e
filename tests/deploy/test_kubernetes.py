"""deploy/kubernetes: what kubectl makes of it is accepted by Kubernetes' own schemas, is safe, and fits the program."""

import json
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.keys.folder import LEARNER, forbidden_bits, key_name_of
from common.keys.folder import ROOT as ROOT_USER
from learner.launch import SHUTDOWN_S, placement
from tests.deploy.checkov import findings
from tests.deploy.manifests import CLUSTERS, KUBERNETES, WORKLOADS, build, documents, learner, of_kind, pods, policies
from tests.deploy.rules import alerts, cluster_alerts
from tests.deploy.tools import ROOT, TOOLS

PYTHON = TOOLS / "python" / "bin"
MODULES = {"chord-learner": "learner", "chord-actor": "actors", "chord-eval": "actors.evaluator"}
every_cluster = pytest.mark.parametrize("name", CLUSTERS)
OLDEST_RELEASE = "1.28"
LARGEST_GOODBYE_S = 15
"""From the end of a drain to the end of the process."""
WEIGHTS_GB = {"cpu": 0.3, "single-gpu": 3.1, "multi-node": 15.2}
"""Of the model that the overlay's chord.toml names, in bfloat16."""


def test_every_kustomization_builds() -> None:
    folders = [path.parent for path in KUBERNETES.rglob("kustomization.yaml")]
    built = [folder for folder in folders if "kind: Kustomization" in (folder / "kustomization.yaml").read_text()]
    assert len(built) >= 9
    for folder in built:
        assert build(folder)
    for component in {*folders} - {*built}:  # every one is of use to something that was built
        assert any(component.name in (folder / "kustomization.yaml").read_text() for folder in built), component


@pytest.mark.parametrize("name", [*CLUSTERS, "loader"])
def test_kubernetes_accepts_it(name: str, tmp_path: Path) -> None:
    core, custom = [], []
    for document in documents(CLUSTERS.get(name, KUBERNETES / name)):
        is_custom = document["apiVersion"].partition("/")[0] in ("monitoring.coreos.com", "keda.sh")
        (custom if is_custom else core).append(json.dumps(document))
    (tmp_path / "core.yaml").write_text("\n---\n".join(core))
    for release in (["-k", OLDEST_RELEASE], []):  # without -k, the newest that it knows
        command = [PYTHON / "kubernetes-validate", "--strict", *release, tmp_path / "core.yaml"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(custom) == (3 if name == "example" else 0)
    for document in custom:
        checked = subprocess.run(
            [PYTHON / "python", ROOT / "tests" / "deploy" / "custom_resource.py"],
            input=document, capture_output=True, text=True,
        )  # fmt: skip
        assert checked.returncode == 0, checked.stderr[-2000:]


@pytest.mark.parametrize("name", [*CLUSTERS, "loader"])
def test_checkov_finds_nothing_that_is_not_explained(name: str, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(build(CLUSTERS.get(name, KUBERNETES / name)))
    assert findings("kubernetes", tmp_path) == []


def test_the_rules_are_those_of_prometheus() -> None:
    written = KUBERNETES / "components" / "monitoring"
    code = "import write_rules, sys; sys.stdout.write(write_rules.rules())"
    done = subprocess.run([sys.executable, "-c", code], cwd=written, capture_output=True, text=True, check=True)
    assert (written / "rules.yaml").read_text() == done.stdout, "run write_rules.py"


def test_rules_lead_to_where_browsers_find_the_runbooks(tmp_path: Path) -> None:
    for folder in ("prometheus", "kubernetes/components/monitoring"):
        shutil.copytree(ROOT / "deploy" / folder, tmp_path / "deploy" / folder)
    written = tmp_path / "deploy" / "kubernetes" / "components" / "monitoring"
    url = "https://example.org/chord-rl/RUNBOOKS.md"
    subprocess.run([sys.executable, written / "write_rules.py", "--runbooks", url], check=True)
    document = yaml.safe_load((written / "rules.yaml").read_text())
    found = [rule for group in document["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
    assert len(found) == len(alerts() + cluster_alerts())
    assert {rule["annotations"]["runbook_url"] for rule in found} == {f"{url}#{r['alert'].lower()}" for r in found}


def test_the_label_that_kube_prometheus_stack_looks_for_reaches_what_it_reads(tmp_path: Path) -> None:
    handbook = (ROOT / "deploy" / "README.md").read_text()
    (lines,) = re.findall(r"```yaml\n(labels:\n.*?release:.*?)```", handbook, re.DOTALL)
    overlay = tmp_path / "deploy" / "kubernetes" / "mine"
    shutil.copytree(KUBERNETES, overlay.parent)
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [../examples/cluster]\n" + lines
    )
    plain, labelled = documents(CLUSTERS["example"]), documents(overlay)
    for document in labelled:
        assert document["metadata"]["labels"].pop("release") == "kube-prometheus-stack", document["kind"]
    assert [without_labels(document) for document in labelled] == [without_labels(document) for document in plain]


def without_labels(document: dict[str, Any]) -> dict[str, Any]:
    return document | {"metadata": {k: v for k, v in document["metadata"].items() if k != "labels"}}


@every_cluster
def test_every_container_runs_a_command_that_accepts_its_configuration(name: str) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for pod in pods(CLUSTERS[name]):
        command, *arguments = pod.command()
        assert scripts[command] == f"{MODULES[command]}.__main__:main"
        assert command == pod.labels["app.kubernetes.io/component"]
        words = [word.replace("/etc/chord", str(CLUSTERS[name])) for word in arguments]
        done = subprocess.run(
            [sys.executable, "-m", MODULES[command], *words, "--check"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@every_cluster
def test_ports_are_those_of_the_configuration(name: str) -> None:
    folder, server = CLUSTERS[name], learner(CLUSTERS[name])
    network = server.config(folder).network
    served = {"groups": network.port, "weights": network.weights_port, "announcements": network.announcements_port}
    (service,) = of_kind(folder, "Service")
    assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == served
    assert served.items() <= server.ports.items()
    for pod in pods(folder):
        config = pod.config(folder)
        own = {"chord-learner": config.learner, "chord-actor": config.actor, "chord-eval": config.eval}
        component = pod.labels["app.kubernetes.io/component"]
        assert pod.ports["metrics"] == own[component].metrics_port
        assert config.learner.metrics_host == pod.ip
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert pod.main[probe]["httpGet"]["port"] == "metrics"
        if component != "chord-learner":
            assert config.network.port == network.port
            assert config.network.host == f"{server.name}.{service['metadata']['name']}"


@every_cluster
def test_the_network_lets_through_what_is_needed_and_nothing_else(name: str) -> None:
    folder, server = CLUSTERS[name], learner(CLUSTERS[name])
    by_name = {policy["name"]: policy for policy in policies(folder)}
    deny = by_name.pop("chord-default-deny")
    assert deny == {"name": "chord-default-deny", "podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    wanted = {server.ports[port] for port in ("groups", "weights", "announcements")}
    metrics = {number for port, number in server.ports.items() if port.startswith("metrics")}
    for policy in by_name.values():
        for way, rules in (("from", policy.get("ingress", ())), ("to", policy.get("egress", ()))):
            for rule in rules:
                assert rule[way], "a rule without peers is for everybody"
                ports = {
                    number for port in rule.get("ports", ())
                    for number in range(port["port"], port.get("endPort", port["port"]) + 1)
                }  # fmt: skip
                if policy["name"] in ("chord-learner", "chord-peers"):
                    assert ports == wanted
                elif policy["name"] == "chord-metrics":
                    assert ports >= metrics
                else:
                    assert (policy["name"], ports) in (("chord-dns", {53}), ("chord-learner-nodes", set()))
    assert ("chord-learner-nodes" in by_name) == (server.workload["spec"]["replicas"] > 1)


@every_cluster
def test_whoever_is_stopped_has_time_to_end(name: str) -> None:
    for pod in pods(CLUSTERS[name]):
        grace_s = pod.spec["terminationGracePeriodSeconds"]
        if pod.labels["app.kubernetes.io/component"] == "chord-learner":
            assert grace_s > SHUTDOWN_S
            continue
        (hook_s,) = re.findall(r"sleep (\d+)$", pod.main["lifecycle"]["preStop"]["exec"]["command"][-1])
        drain_s = pod.config(CLUSTERS[name]).actor.drain_s
        assert drain_s + LARGEST_GOODBYE_S <= int(hook_s)
        assert int(hook_s) + LARGEST_GOODBYE_S <= grace_s


@every_cluster
def test_a_learner_of_several_pods_has_a_rank_for_each_of_its_gpus(name: str) -> None:
    folder, server = CLUSTERS[name], learner(CLUSTERS[name])
    config, replicas = server.config(folder).learner, server.workload["spec"]["replicas"]
    assert config.num_nodes == replicas
    ranks = config.num_ranks // config.num_nodes
    assert int(server.main["resources"]["limits"].get("nvidia.com/gpu", 1)) == ranks
    assert [number for port, number in sorted(server.ports.items()) if port.startswith("metrics")] == [
        config.metrics_port + rank for rank in range(ranks)
    ]
    if replicas > 1:
        assert (
            config.rendezvous == f"{server.name}.{server.workload['spec']['serviceName']}:{server.ports['rendezvous']}"
        )
        assert [word for word in server.command() if word.startswith("--node-index")] == ["--node-index=0"]
        assert placement(config, replicas - 1)[:4] == ["--nnodes", str(replicas), "--node-rank", str(replicas - 1)]


@every_cluster
def test_every_pod_gives_up_what_it_has_no_use_for(name: str) -> None:
    """Once more, in our own words, since a skipped check looks like a passed one."""
    for pod in pods(CLUSTERS[name]):
        spec = pod.spec
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            limits = container["resources"]["limits"]
            assert {"cpu", "memory"} <= limits.keys()


@every_cluster
def test_scripts_in_manifests_are_clean(name: str) -> None:
    commands = [
        [*container.get("command", ()), *container.get("args", ())]
        for pod in pods(CLUSTERS[name]) for container in pod.spec.get("initContainers", ())
    ]  # fmt: skip
    commands += [
        pod.main["lifecycle"]["preStop"]["exec"]["command"] for pod in pods(CLUSTERS[name]) if "lifecycle" in pod.main
    ]
    scripts = [command[-1] for command in commands if command[0] == "/bin/sh"]
    assert len(scripts) >= 3
    for script in scripts:
        done = subprocess.run(["shellcheck", "--shell=sh", "-"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@every_cluster
def test_every_key_is_mounted_where_and_as_its_user_takes_it(name: str) -> None:
    for pod in pods(CLUSTERS[name]):
        security, mounted = pod.spec["securityContext"], pod.secret["defaultMode"] | stat.S_IRGRP  # as with any fsGroup
        assert mounted & forbidden_bits(ROOT_USER, security["runAsUser"]) == 0
        config = pod.config(CLUSTERS[name])
        places = {mount["mountPath"]: mount["name"] for mount in pod.main["volumeMounts"]}
        (volume,) = [one for one in pod.spec["volumes"] if one["name"] == places[config.network.keys]]
        assert volume["secret"] == pod.secret
        key = pod.secret["secretName"].removeprefix("chord-").removesuffix("-keys")
        if pod.labels["app.kubernetes.io/component"] == "chord-learner":
            assert key == LEARNER
            assert places[config.network.allowed_keys] == "allowed"
        else:
            (peer_id,) = [word.removeprefix("--name=") for word in pod.command() if word.startswith("--name=")]
            assert key_name_of(peer_id) == key


def test_actors_are_not_scaled_down_for_want_of_a_number() -> None:
    (scaler,) = of_kind(CLUSTERS["example"], "ScaledObject")
    (trigger,) = scaler["spec"]["triggers"]
    assert trigger["metadata"]["ignoreNullValues"] == "false"


def test_whoever_samples_has_memory_for_the_weights_twice() -> None:
    """Once in the engine, and once more as they are fetched, patched and loaded."""
    for name, weights_gb in WEIGHTS_GB.items():
        for pod in pods(CLUSTERS[name], "chord-actor") + pods(CLUSTERS[name], "chord-eval"):
            limit_gib = int(pod.main["resources"]["limits"]["memory"].removesuffix("Gi"))
            assert limit_gib * 2**30 >= 2 * weights_gb * 10**9, (name, pod.name)


def test_a_change_of_configuration_starts_pods_anew() -> None:
    for name, folder in CLUSTERS.items():
        (config,) = of_kind(folder, "ConfigMap")
        for workload in of_kind(folder, *WORKLOADS):
            volumes = workload["spec"]["template"]["spec"]["volumes"]
            assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in volumes, name


def test_the_handbook_makes_what_the_manifests_ask_for() -> None:
    handbook = (ROOT / "deploy" / "README.md").read_text()
    section = handbook.partition("## A cluster, with Kubernetes")[2].partition("\n## ")[0]
    volumes = [volume for pod in pods(CLUSTERS["cpu"]) for volume in pod.spec["volumes"]]
    secrets = {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
    assert set(re.findall(r"create secret generic (\S+)", section)) == secrets
    made = set(re.findall(r"create configmap (\S+)", section))
    generated = {document["metadata"]["name"] for document in of_kind(CLUSTERS["cpu"], "ConfigMap")}
    assert {volume["configMap"]["name"] for volume in volumes if "configMap" in volume} == made | generated
    assert f"Kubernetes {OLDEST_RELEASE} or newer" in section
    for folder in re.findall(r"-k (deploy/[\w/-]+)", section):
        assert build(ROOT / folder)
    for name in re.findall(r"^\| `(\S+)` \|", section, re.MULTILINE):
        assert (KUBERNETES / name / "kustomization.yaml").exists()
    builds = re.findall(r"docker build --file (\S+) --target (\S+)", section)
    assert builds == [("deploy/docker/Dockerfile", "cpu"), ("deploy/docker/Dockerfile", "gpu")]
