"""The operator's Pod template over ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cifixer_exec.backends.kubernetes.job import KubernetesOptions, manifest
from cifixer_exec.backends.kubernetes.names import Names
from cifixer_exec.backends.kubernetes.template import merged, read
from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.model import SandboxSpec

Json = dict[str, Any]


def template(theirs: Json, **options: Any) -> Json:
    made = manifest(
        SandboxSpec(backend="kubernetes", sandbox_id="one"),
        names=Names("ours"),
        placement="place",
        options=KubernetesOptions(pod_template=theirs, **options),
        now_s=0,
    )
    found: Json = made["spec"]["template"]
    return found


def named(members: list[Json], name: str) -> Json:
    (found,) = [m for m in members if m["name"] == name]
    return found


def test_what_we_did_not_think_of_is_added() -> None:
    theirs = {
        "nodeSelector": {"pool": "sandboxes"},
        "tolerations": [{"key": "sandboxes", "operator": "Exists"}],
        "imagePullSecrets": [{"name": "registry"}],
        "runtimeClassName": "gvisor",
        "affinity": {"nodeAffinity": {}},
    }
    made = template({"spec": theirs})["spec"]
    assert {name: made[name] for name in theirs} == theirs
    assert made["automountServiceAccountToken"] is False


def test_our_container_is_changed_by_its_name_and_theirs_stand_beside_it() -> None:
    theirs = {"containers": [{"name": "sandbox", "imagePullPolicy": "Never"}, {"name": "proxy", "image": "proxy:1"}]}
    containers = template({"spec": theirs})["spec"]["containers"]
    assert [c["name"] for c in containers] == ["sandbox", "proxy"]
    assert containers[0]["imagePullPolicy"] == "Never"
    assert containers[0]["command"][0] == "/bin/sh"
    assert containers[1] == {"name": "proxy", "image": "proxy:1"}


def test_lists_with_names_are_merged_by_them_down_to_the_mounts() -> None:
    theirs = {
        "containers": [
            {
                "name": "sandbox",
                "env": [{"name": "TERM", "value": "xterm"}, {"name": "MORE", "value": "1"}],
                "volumeMounts": [{"name": "cache", "mountPath": "/cache"}, {"name": "cache", "subPath": "t", "mountPath": "/tmp"}],
            }
        ],
        "volumes": [{"name": "cache", "emptyDir": {}}, {"name": "disk", "emptyDir": {"medium": None}}],
    }
    made = template({"spec": theirs})["spec"]
    sandbox = made["containers"][0]
    assert named(sandbox["env"], "TERM")["value"] == "xterm"
    assert named(sandbox["env"], "MORE")["value"] == "1"
    assert named(sandbox["env"], "CI")["value"] == "true"
    mounts = {m["mountPath"]: m for m in sandbox["volumeMounts"]}
    assert mounts["/cache"]["name"] == "cache"
    assert (mounts["/tmp"]["name"], mounts["/tmp"]["subPath"]) == ("cache", "t")
    assert mounts["/workspace"]["name"] == "disk"
    assert "medium" not in named(made["volumes"], "disk")["emptyDir"]
    assert "sizeLimit" in named(made["volumes"], "disk")["emptyDir"]
    assert named(made["volumes"], "cache") == {"name": "cache", "emptyDir": {}}


def test_null_removes_and_other_lists_replace() -> None:
    theirs = {"securityContext": {"seccompProfile": None, "fsGroup": None}, "dnsConfig": {"nameservers": ["10.0.0.1"]}}
    made = template({"spec": theirs}, network_policies=True)["spec"]
    assert not {"seccompProfile", "fsGroup"} & set(made["securityContext"])
    assert made["securityContext"]["runAsNonRoot"] is True
    assert made["dnsConfig"] == {"nameservers": ["10.0.0.1"]}


def test_what_would_break_a_sandbox_stays_ours() -> None:
    theirs = {
        "metadata": {
            "labels": {"app": "theirs", "team": "x", "cifixer.dev/sandbox": "another"},
            "annotations": {"cifixer.dev/sandbox-id": "another", "note": "kept"},
        },
        "spec": {"restartPolicy": "Always"},
    }
    made = template(theirs)
    assert made["spec"]["restartPolicy"] == "Never"
    assert made["metadata"]["labels"]["app"] == "ci-fixer-sandbox"
    assert made["metadata"]["labels"]["team"] == "x"
    assert made["metadata"]["labels"]["cifixer.dev/sandbox"] == Names("ours").seal("one")
    assert made["metadata"]["annotations"]["cifixer.dev/sandbox-id"] == "one"
    assert made["metadata"]["annotations"]["note"] == "kept"


@pytest.mark.parametrize("metadata", [{"labels": None}, {"annotations": None}, {}])
def test_our_labels_are_there_even_when_theirs_are_null(metadata: Json) -> None:
    made = template({"metadata": metadata})["metadata"]
    assert made["labels"]["app"] == "ci-fixer-sandbox"
    assert made["annotations"]["cifixer.dev/sandbox-id"] == "one"


def test_another_user_of_theirs_has_the_name_too() -> None:
    made = template({"spec": {"securityContext": {"runAsUser": 4711, "runAsGroup": 4712}}})
    assert "sandbox:x:4711:4712:" in made["metadata"]["annotations"]["cifixer.dev/passwd"]
    assert "sandbox:x:4712:" in made["metadata"]["annotations"]["cifixer.dev/group"]


def test_a_user_that_is_left_to_the_cluster_has_none() -> None:
    made = template({"spec": {"securityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}}})
    assert "sandbox" not in made["metadata"]["annotations"]["cifixer.dev/passwd"]


def test_neither_of_both_is_changed() -> None:
    ours, theirs = {"a": {"b": 1}, "env": [{"name": "x", "value": "1"}]}, {"a": {"c": 2}, "env": [{"name": "x", "value": "2"}]}
    assert merged(ours, theirs) == {"a": {"b": 1, "c": 2}, "env": [{"name": "x", "value": "2"}]}
    assert ours == {"a": {"b": 1}, "env": [{"name": "x", "value": "1"}]}
    assert theirs == {"a": {"c": 2}, "env": [{"name": "x", "value": "2"}]}


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", '{"spec": {"hostUsers": false}}', "spec:\n  hostUsers: false\n"])
def test_files_may_be_yaml_or_json_or_empty(tmp_path: Path, text: str) -> None:
    path = tmp_path / "template"
    path.write_text(text)
    assert read(str(path)) == ({"spec": {"hostUsers": False}} if "spec" in text else {})


def test_no_path_is_no_template() -> None:
    assert read("") == {}


BAD = {
    "a list": "[1, 2]",
    "a text": "just words",
    "a whole Pod": "apiVersion: v1\nkind: Pod\nspec: {}\n",
    "a spec that is a list": "spec: []",
    "no YAML": "spec: [unclosed",
    "tabs": "spec:\n\t- x",
    "an object that is to be made": "!!python/object/apply:os.getpid []",
    "two documents": "spec: {}\n---\nspec: {}\n",
    "no text": "\udcff\udcfe",
    "containers that are none": "spec: {containers: sandbox}",
    "a container without a name": "spec: {containers: [{image: x}]}",
    "a mount without a path": "spec: {containers: [{name: sandbox, volumeMounts: [{name: disk}]}]}",
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_no_template_gives_one_line_that_names_it(tmp_path: Path, what: str) -> None:
    path = tmp_path / "template.yaml"
    path.write_bytes(BAD[what].encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidRequestError) as caught:
        read(str(path))
    assert str(caught.value).startswith(f"kubernetes_pod_template={str(path)!r} ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/template.yaml", "/"])
def test_a_file_that_cannot_be_read_is_named(path: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"kubernetes_pod_template='/.*' cannot be read: .*: give the path"):
        read(path)
