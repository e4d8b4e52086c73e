"""The manifests of deploy/kubernetes as kubectl makes them, and what their containers would run."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from common.config.load import resolve_config
from common.config.schema import Config
from tests.deploy.tools import ROOT, TOOLS

KUBERNETES = ROOT / "deploy" / "kubernetes"
KUBECTL = TOOLS / "kubectl" / "kubectl"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
CLUSTERS = {
    **{name: KUBERNETES / "overlays" / name for name in OVERLAYS},
    "example": KUBERNETES / "examples" / "cluster",
}
"""What can be applied to a cluster, by name."""
WORKLOADS = ("StatefulSet", "Deployment")


@cache
def build(folder: Path) -> str:
    """What `kubectl apply -k` would send."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), folder
    return done.stdout


def documents(folder: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(build(folder)))


def of_kind(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    return [document for document in documents(folder) if document["kind"] in kinds]


@dataclass(frozen=True)
class Pod:
    """The pod that a workload makes, with what Kubernetes would fill in."""

    workload: dict[str, Any]
    ip: str = "10.0.0.1"

    @property
    def name(self) -> str:
        return f"{self.workload['metadata']['name']}-0"

    @property
    def labels(self) -> dict[str, str]:
        return self.workload["spec"]["template"]["metadata"]["labels"]

    @property
    def spec(self) -> dict[str, Any]:
        return self.workload["spec"]["template"]["spec"]

    @property
    def main(self) -> dict[str, Any]:
        """Its one container that stays."""
        (container,) = self.spec["containers"]
        return container

    @property
    def secret(self) -> dict[str, Any]:
        """The one that its keys are in."""
        (volume,) = [one for one in self.spec["volumes"] if "secret" in one]
        return volume["secret"]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.main["ports"]}

    def fill_in(self, container: dict[str, Any], words: list[str]) -> list[str]:
        """`words` with every $(NAME) of the container's environment."""
        fields = {"status.podIP": self.ip, "metadata.name": self.name}
        fields |= {f"metadata.labels['{key}']": value for key, value in self.labels.items()}
        fields["metadata.labels['apps.kubernetes.io/pod-index']"] = "0"
        for entry in container.get("env", ()):
            value = entry["value"] if "value" in entry else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
            words = [word.replace(f"$({entry['name']})", value) for word in words]
        assert not any("$(" in word for word in words), words
        return words

    def command(self) -> list[str]:
        """What its main container runs, after the image's entry point."""
        return self.fill_in(self.main, self.main["args"])

    def config(self, folder: Path) -> Config:
        """The configuration that it runs with."""
        overrides = [word for word in self.command()[1:] if not word.startswith("--")]
        return resolve_config(configuration(folder), overrides).config


def pods(folder: Path, component: str = "") -> list[Pod]:
    """Of every workload, or of those of a component (chord-learner, chord-actor, chord-eval)."""
    found = [Pod(workload) for workload in of_kind(folder, *WORKLOADS)]
    return [pod for pod in found if component in ("", pod.labels["app.kubernetes.io/component"])]


def learner(folder: Path) -> Pod:
    (pod,) = pods(folder, "chord-learner")
    return pod


def configuration(folder: Path) -> Path:
    """The file that the folder's ConfigMap is made of; that it is that one is checked."""
    path = folder / "chord.toml"
    (found,) = [one for one in of_kind(folder, "ConfigMap") if one["metadata"]["name"].startswith("chord-config-")]
    assert found["data"] == {"chord.toml": path.read_text()}
    return path


def policies(folder: Path) -> Iterator[dict[str, Any]]:
    for document in of_kind(folder, "NetworkPolicy"):
        yield {"name": document["metadata"]["name"], **document["spec"]}
