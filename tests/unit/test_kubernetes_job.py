"""The Job of a sandbox, line by line, and what its parts are called."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifixer_exec.backends.kubernetes.job import (
    CONTAINER,
    DEFAULT_IMAGE,
    KubernetesOptions,
    check_image,
    manifest,
)
from cifixer_exec.backends.kubernetes.names import Names, runner_token
from cifixer_exec.backends.limits import user_id
from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.model import MIB, SandboxSpec

Json = dict[str, Any]
NAMES = Names("ours")
#: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/#dns-label-names, and of labels' values
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
HOSTILE_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)


def job(options: KubernetesOptions | None = None, **members: Any) -> Json:
    spec = SandboxSpec(**{"backend": "kubernetes", "sandbox_id": "one", **members})
    return manifest(spec, names=NAMES, placement="place", options=options or KubernetesOptions(), now_s=1000.5)


def pod(options: KubernetesOptions | None = None, **members: Any) -> Json:
    found: Json = job(options, **members)["spec"]["template"]["spec"]
    return found


def container(options: KubernetesOptions | None = None, **members: Any) -> Json:
    (found,) = [c for c in pod(options, **members)["containers"] if c["name"] == CONTAINER]
    return dict(found)


def mounts(options: KubernetesOptions | None = None) -> dict[str, Json]:
    return {m["mountPath"]: m for m in container(options)["volumeMounts"]}


def volume(name: str, options: KubernetesOptions | None = None, **members: Any) -> Json:
    (found,) = [v for v in pod(options, **members)["volumes"] if v["name"] == name]
    return dict(found)


def every_text(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, member in value.items():
            yield from (str(name), *every_text(member))
    elif isinstance(value, list):
        for member in value:
            yield from every_text(member)
    else:
        yield str(value)


JOB_LINES: dict[str, Any] = {
    "activeDeadlineSeconds": 500,
    "ttlSecondsAfterFinished": 300,
    "backoffLimit": 0,
    "completions": 1,
    "parallelism": 1,
    "podReplacementPolicy": "Failed",
}


@pytest.mark.parametrize("name", JOB_LINES)
def test_the_job_runs_one_pod_once_and_goes_by_itself(name: str) -> None:
    assert job(lifetime_s=500)["spec"][name] == JOB_LINES[name]


@pytest.mark.parametrize(("lifetime_s", "deadline_s"), [(0.2, 1), (1.0, 1), (1.2, 2), (3600, 3600)])
def test_a_deadline_is_whole_seconds_and_never_before_the_lifetime_ends(lifetime_s: float, deadline_s: int) -> None:
    assert job(lifetime_s=lifetime_s)["spec"]["activeDeadlineSeconds"] == deadline_s


POD_LINES: dict[str, Any] = {
    "restartPolicy": "Never",
    "serviceAccountName": "ci-fixer-sandbox",
    "automountServiceAccountToken": False,
    "enableServiceLinks": False,
    "terminationGracePeriodSeconds": 1,
}


@pytest.mark.parametrize("name", POD_LINES)
def test_the_pod_starts_once_and_has_no_way_to_the_api(name: str) -> None:
    assert pod()[name] == POD_LINES[name]


def test_the_image_and_the_sizes_are_those_that_were_promised() -> None:
    made = container()
    assert made["image"] == DEFAULT_IMAGE == "nikolaik/python-nodejs:python3.11-nodejs20-bullseye"
    assert made["resources"] == {
        "limits": {"cpu": "1", "memory": "2Gi"},
        "requests": {"cpu": "250m", "memory": "512Mi"},
    }


def test_what_a_spec_asks_for_goes_before_the_options() -> None:
    made = container(KubernetesOptions(image="of:options"), image="of:spec", cpus=2.5, memory_bytes=300 * MIB)
    assert made["image"] == "of:spec"
    assert made["resources"]["limits"] == {"cpu": "2500m", "memory": "300Mi"}
    assert container(KubernetesOptions(image="of:options"))["image"] == "of:options"


def test_nobody_requests_more_than_its_limit() -> None:
    requests = container(cpus=0.01, memory_bytes=64 * MIB)["resources"]["requests"]
    assert requests == {"cpu": "10m", "memory": "64Mi"}


def test_requests_are_the_operators() -> None:
    requests = container(KubernetesOptions(cpu_request=0.5, memory_request_bytes=MIB), cpus=4)["resources"]["requests"]
    assert requests == {"cpu": "500m", "memory": "1Mi"}


def hardened(containers: list[Json], *, read_only: bool) -> bool:
    wanted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": read_only}
    return all(wanted.items() <= c["securityContext"].items() for c in containers)


@pytest.mark.parametrize("writable", [False, True])
def test_the_pod_keeps_to_the_level_restricted(writable: bool) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    made = pod(KubernetesOptions(writable_root=writable, runner_image="runner:1"))
    context = made["securityContext"]
    assert (context["runAsNonRoot"], context["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
    assert 0 < context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] < 2**31 - 1
    assert hardened(made["containers"], read_only=not writable)
    assert hardened(made["initContainers"], read_only=True)
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(made)
    kinds = {kind for v in made["volumes"] for kind in v if kind != "name"}
    assert kinds <= {"emptyDir", "downwardAPI", "persistentVolumeClaim"}


def test_two_sandboxes_have_two_users_and_a_repeated_create_the_same() -> None:
    users = [pod(sandbox_id=name)["securityContext"]["runAsUser"] for name in ("one", "two", "one")]
    assert users[0] == users[2] != users[1]


def test_in_a_user_namespace_the_users_are_among_its_65536() -> None:
    options = KubernetesOptions(pod_template={"spec": {"hostUsers": False}})
    assert 10_000 <= pod(options)["securityContext"]["runAsUser"] < 60_000


@given(st.text(max_size=60), st.booleans())
def test_no_user_is_root_or_beyond_what_kernels_take(what: str, few_ids: bool) -> None:
    assert 10_000 <= user_id(what, few_ids=few_ids) < (65_000 if few_ids else 2**31 - 2)


def test_a_claims_files_belong_to_one_user_whichever_sandbox_comes() -> None:
    options = KubernetesOptions(volume_claim="work")
    assert pod(options, sandbox_id="a")["securityContext"] == pod(options, sandbox_id="b")["securityContext"]


def test_labels_say_whose_it_is_on_the_job_and_on_its_pod() -> None:
    made = job()
    labels = made["metadata"]["labels"]
    assert labels["app"] == "ci-fixer-sandbox"
    assert set(labels) == {"app", "cifixer.dev/instance", "cifixer.dev/sandbox", "cifixer.dev/network"}
    assert labels == made["spec"]["template"]["metadata"]["labels"]
    told = made["metadata"]["annotations"]
    assert (told["cifixer.dev/sandbox-id"], told["cifixer.dev/namespace"], told["cifixer.dev/placement"]) == ("one", "ours", "place")


def test_times_and_labels_of_the_caller_are_in_the_annotations() -> None:
    told = job(lifetime_s=20, labels={"team": "ünïcode / anything"})["metadata"]["annotations"]
    assert (told["cifixer.dev/created-at"], told["cifixer.dev/expires-at"]) == ("1000.500", "1020.500")
    assert json.loads(told["cifixer.dev/labels"]) == {"team": "ünïcode / anything"}


def test_no_secret_and_no_environment_of_the_caller_is_in_the_job() -> None:
    made = job(env={"SECRET_NAME": "secret-value-19c1"})
    texts = list(every_text(made))
    assert not [t for t in texts if "secret-value-19c1" in t or "SECRET_NAME" in t]
    assert not [t for t in texts if runner_token("a-uid") in t]
    assert {e["name"] for e in container()["env"]} == {"HOME", "USER", "LOGNAME", "SHELL", "TERM", "CI"}


def test_the_runner_waits_for_its_secret_and_serves_the_workspace() -> None:
    made = container(lifetime_s=77, max_processes=9)
    arguments = made["args"]
    assert arguments[:4] == ["serve", "--socket", "/run/cifixer/channel/socket", "--learn-token"]
    assert arguments[arguments.index("--workspace") + 1] == "/workspace"
    assert arguments[arguments.index("--expires-in") + 1] == "77.000"
    assert arguments[arguments.index("--max-processes") + 1] == "9"


def test_without_a_runner_image_the_pod_waits_for_an_upload() -> None:
    assert "initContainers" not in pod()
    assert container()["command"][:2] == ["/bin/sh", "-c"]
    assert "readOnly" not in mounts()["/run/cifixer/bin"]


def test_with_a_runner_image_it_comes_before_the_sandbox_and_as_another_user() -> None:
    options = KubernetesOptions(runner_image="runner:1")
    made = pod(options)
    (installer,) = made["initContainers"]
    assert (installer["image"], installer["command"]) == ("runner:1", ["/runner", "install", "/run/cifixer/bin/runner"])
    assert installer["securityContext"]["runAsUser"] not in (0, made["securityContext"]["runAsUser"])
    assert container(options)["command"] == ["/run/cifixer/bin/runner"]
    assert mounts(options)["/run/cifixer/bin"]["readOnly"]


def test_one_disk_of_a_true_size_is_behind_all_that_can_be_written() -> None:
    assert volume("disk", disk_bytes=100 * MIB)["emptyDir"] == {"medium": "Memory", "sizeLimit": "100Mi"}
    assert volume("disk")["emptyDir"]["sizeLimit"] == "1536Mi"
    on_disk = {path for path, m in mounts().items() if m["name"] == "disk"}
    assert on_disk == {"/workspace", "/home/sandbox", "/tmp", "/var/tmp"}
    assert mounts()["/tmp"]["subPath"] == mounts()["/var/tmp"]["subPath"]


def test_a_disk_that_does_not_fit_into_the_memory_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="does not fit into memory_bytes"):
        job(memory_bytes=64 * MIB, disk_bytes=64 * MIB)


def test_the_nodes_disk_has_a_wide_limit_and_the_runners_stays_in_memory() -> None:
    options = KubernetesOptions(disk="node")
    assert volume("disk", options)["emptyDir"] == {"sizeLimit": "16Gi"}
    assert volume("cifixer", options)["emptyDir"]["medium"] == "Memory"


def test_a_claim_is_the_workspace_and_nothing_else() -> None:
    options = KubernetesOptions(volume_claim="work")
    assert volume("workspace", options)["persistentVolumeClaim"] == {"claimName": "work"}
    assert [path for path, m in mounts(options).items() if m["name"] == "workspace"] == ["/workspace"]
    assert "workspace" not in {v["name"] for v in pod()["volumes"]}


def test_the_user_has_a_name_in_files_that_commands_cannot_change() -> None:
    made = job()["spec"]["template"]
    uid = made["spec"]["securityContext"]["runAsUser"]
    assert f"sandbox:x:{uid}:{uid}:sandbox:/home/sandbox:/bin/sh\n" in made["metadata"]["annotations"]["cifixer.dev/passwd"]
    assert f"sandbox:x:{uid}:\n" in made["metadata"]["annotations"]["cifixer.dev/group"]
    assert mounts()["/etc/passwd"]["readOnly"]
    assert mounts()["/etc/group"]["readOnly"]


def test_without_policies_the_network_is_the_clusters_with_its_dns() -> None:
    assert KubernetesOptions().networks == ("cluster",)
    assert "dnsPolicy" not in pod()
    assert job()["metadata"]["labels"]["cifixer.dev/network"] == "cluster"


def test_with_policies_there_is_no_network_unless_egress_is_asked_for() -> None:
    options = KubernetesOptions(network_policies=True)
    none, egress = job(options), job(options, network="egress")
    assert none["metadata"]["labels"]["cifixer.dev/network"] == "none"
    assert none["spec"]["template"]["spec"]["dnsPolicy"] == "None"
    assert none["spec"]["template"]["spec"]["dnsConfig"] == {"nameservers": ["192.0.2.1"]}
    assert egress["metadata"]["labels"]["cifixer.dev/network"] == "egress"
    assert "dnsPolicy" not in egress["spec"]["template"]["spec"]


OPTIONAL = {
    "runtimeClassName": KubernetesOptions(runtime_class="named"),
    "priorityClassName": KubernetesOptions(priority_class="named"),
}


@pytest.mark.parametrize("member", OPTIONAL)
def test_classes_are_there_only_when_they_are_named(member: str) -> None:
    assert member not in pod()
    assert pod(OPTIONAL[member])[member] == "named"


@pytest.mark.parametrize("image", ["", "with space", "tab\there", "nul\0", "newline\n"])
def test_an_image_that_no_registry_could_have_is_refused(image: str) -> None:
    with pytest.raises(InvalidRequestError, match="give a reference such as"):
        check_image(image)


@given(HOSTILE_IDS, st.text(min_size=1, max_size=80))
def test_names_and_labels_fit_whatever_the_ids_are(sandbox_id: str, namespace: str) -> None:
    names = Names(namespace)
    made = names.job(sandbox_id)
    assert DNS_LABEL.fullmatch(made), made
    assert len(made) + len("-abcde") <= 63  # its Pod's host name
    for value in names.labels(sandbox_id, "none").values():
        assert LABEL_VALUE.fullmatch(value)


DIFFERENT: dict[str, tuple[Callable[[], str], Callable[[], str]]] = {
    "case": (lambda: NAMES.job("ABC"), lambda: NAMES.job("abc")),
    "signs": (lambda: NAMES.job("a.b"), lambda: NAMES.job("a_b")),
    "the end": (lambda: NAMES.job("x" * 60 + "1"), lambda: NAMES.job("x" * 60 + "2")),
    "namespaces": (lambda: Names("n").job("a"), lambda: Names("m").job("a")),
    "the border between both": (lambda: Names("ab").seal("c"), lambda: Names("a").seal("bc")),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_two_sandboxes_never_share_a_name(what: str) -> None:
    one, other = DIFFERENT[what]
    assert one() != other()
    assert one() == one()


def test_an_object_is_ours_by_its_annotations_and_not_by_its_name() -> None:
    made = job()
    assert NAMES.has(made, "one")
    assert not NAMES.has(made, "two")
    assert not Names("theirs").has(made, "one")
    assert not NAMES.has({"metadata": {"name": NAMES.job("one")}}, "one")


def test_the_secret_follows_from_the_uid_and_does_not_show_it() -> None:
    uid = "0b6f2c1e-0d6c-4a51-9f0f-6d0d4d3bb0aa"
    assert runner_token(uid) == runner_token(uid) != runner_token(uid[:-1] + "b")
    assert uid not in runner_token(uid)
    assert len(runner_token(uid)) == 64
