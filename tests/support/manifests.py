"""The manifests of ``k8s/`` as documents: file by file, and as kustomize renders them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.support.contract_stack import required_backends

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
#: In CIFIXER_TEST_REQUIRE: that there is nothing to render with is a failure then.
TOOL = "kustomize"
OVERLAYS = sorted(path.parent.relative_to(K8S / "overlays").as_posix() for path in (K8S / "overlays").glob("*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml"))
#: The base alone, each overlay, and the base with each component alone.
VARIANTS = ["deployment", *(f"overlays/{name}" for name in OVERLAYS), *(f"components/{name}" for name in COMPONENTS)]
#: Read by kustomize or by the worker, and no objects of a cluster.
NO_MANIFESTS = ("kustomization.yaml", "pod-template.yaml")
WORKLOADS = ("Deployment", "StatefulSet")

Document = Mapping[str, Any]


def files() -> list[Path]:
    """Every file with objects for a cluster."""
    return sorted(path for path in K8S.rglob("*.yaml") if path.name not in NO_MANIFESTS)


def read(path: Path) -> list[Document]:
    """The documents of one file."""
    return [document for document in YAML(typ="safe").load_all(path.read_text()) if document is not None]


@functools.cache
def rendered(variant: str) -> tuple[Document, ...]:
    """The documents of one of :data:`VARIANTS`. Skips, or fails where that is required, when there is no kustomize."""
    if not variant.startswith("components/"):
        return tuple(_built(K8S / variant))
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory).resolve()
        base, component = (os.path.relpath(K8S / name, at) for name in ("deployment", variant))
        (at / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [{component}]\n")
        return tuple(_built(at))


def _built(directory: Path) -> list[Document]:
    done = subprocess.run([*_tool(), str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return [document for document in YAML(typ="safe").load_all(done.stdout) if document is not None]


def _tool() -> list[str]:
    for name, verb in (("kubectl", "kustomize"), ("kustomize", "build")):
        if shutil.which(name):
            return [name, verb]
    said = "neither kubectl nor kustomize is installed: .ci/run shows where to have one from"
    if TOOL in required_backends():
        pytest.fail(said)
    pytest.skip(said)


def of_kind(documents: tuple[Document, ...], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def named(documents: tuple[Document, ...], kind: str, name: str, namespace: str | None = None) -> Document:
    """The one object of this kind and name. Raises ValueError when there is none, or more than one."""
    (found,) = [d for d in of_kind(documents, kind) if d["metadata"]["name"] == name and d["metadata"].get("namespace") == namespace]
    return found


def pod_of(workload: Document) -> Document:
    """Its Pod template, with the namespace that its Pods will have."""
    template = workload["spec"]["template"]
    return {**template, "metadata": {**template["metadata"], "namespace": workload["metadata"]["namespace"]}}


def containers(pod: Document) -> list[Document]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def environment(container: Document, documents: tuple[Document, ...]) -> dict[str, str]:
    """As the container gets it, with ``secret`` for what comes from a Secret, and references to earlier variables resolved."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= named(documents, "ConfigMap", source["configMapRef"]["name"], "ci-fixer")["data"]
    for variable in container.get("env", []):
        value = "secret" if "valueFrom" in variable else variable.get("value", "")
        for name, known in found.items():
            value = value.replace(f"$({name})", known)
        found[variable["name"]] = value
    return found


def ours(documents: tuple[Document, ...]) -> Iterator[tuple[Document, Document]]:
    """The workloads that run this package's image, each with its one container."""
    for workload in of_kind(documents, *WORKLOADS):
        (container,) = containers(pod_of(workload))
        if "cifixer-exec:" in container["image"]:
            yield workload, container
