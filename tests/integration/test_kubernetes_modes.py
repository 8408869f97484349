"""The ways to run sandboxes in a cluster: where the runner and the disk come from, with which rights, and through which faults."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from cifixer_exec import AppConfig, SandboxEnvironment, create_sandbox
from cifixer_exec.backends.kubernetes.job import BRIDGE, RUNNER
from cifixer_exec.backends.kubernetes.rights import NEEDED
from cifixer_exec.channel.frames import FrameType, encode_document, encode_frame
from cifixer_exec.errors import BackendUnavailableError, ExecutorError, InvalidRequestError
from tests.support.kubeconfigs import kubeconfig
from tests.support.kubernetes.images import NO_SHELL_IMAGE, RUNNER_IMAGE
from tests.support.kubernetes_admin import (
    admin,
    admin_kubeconfig,
    backend_of,
    found,
    job_path,
    left_of,
    listed,
    pods_path,
    sandboxes_of,
    spec_of,
    user_with,
    wait_for,
)
from tests.support.kubernetes_cluster import RUNNER as RUNNER_VARIABLE
from tests.support.kubernetes_cluster import is_real, role_rules, stand_in
from tests.support.kubernetes_pods import delete_job, names_of, pod_of
from tests.support.redis_proxy import RedisProxy

CLAIM = "CIFIXER_TEST_KUBERNETES_VOLUME_CLAIM"


@pytest.fixture
def config(namespace: str) -> Iterator[AppConfig]:
    with sandboxes_of(namespace) as made_here:
        yield made_here


@pytest.fixture(params=["image", "upload"])
def either(config: AppConfig, request: pytest.FixtureRequest) -> AppConfig:
    """Both ways of the runner into a Pod."""
    if request.param == "upload":
        return config.with_(kubernetes_runner_image="")
    if is_real() and not os.environ.get(RUNNER_VARIABLE):
        pytest.skip(f"no image has the runner: name one in {RUNNER_VARIABLE}")
    return config.with_(kubernetes_runner_image=os.environ[RUNNER_VARIABLE] if is_real() else RUNNER_IMAGE)


def lives(sandbox: SandboxEnvironment) -> None:
    """Commands, files and output of some size go through."""
    data = bytes(range(256)) * 8000
    sandbox.write_file("file", data)
    assert sandbox.read_file("file") == data
    assert sandbox.run_command("cat; exit 3", stdin=b"in").stdout == b"in"
    assert len(sandbox.run_command("head -c 3000000 /dev/zero").stdout) == 3_000_000


class TestTheRunner:
    def test_a_sandbox_lives_whichever_way_its_runner_came(self, either: AppConfig) -> None:
        with create_sandbox(either) as sandbox:
            lives(sandbox)
            assert sandbox.run_command("cat /proc/1/cmdline | tr '\\0' ' '").text.startswith(f"{RUNNER} serve ")

    def test_who_has_not_the_secret_is_not_answered_by_it(self, either: AppConfig) -> None:
        """Not even a command with the user and the socket of the runner itself."""
        backend = backend_of(either)
        with create_sandbox(either) as sandbox:
            (owned,) = backend.list_owned()
            answers = []
            for token in ("0" * 64, "", backend.token(owned.handle)):
                hello = {"protocol": 1, "epoch": 0, "client": "thief", "token": token}
                sandbox.write_file("hello", encode_frame(FrameType.HELLO, 0, encode_document(hello)))
                tried = sandbox.run_command(f"(cat hello; sleep 0.5) | {' '.join(BRIDGE)}", timeout_s=20)
                answers.append(b"boot_id" in tried.stdout)
            assert answers == [False, False, True]
            assert sandbox.run_command("echo alive").text == "alive\n"

    def test_of_an_image_it_can_be_neither_read_nor_replaced(self, config: AppConfig) -> None:
        if not config.kubernetes_runner_image:
            pytest.skip(f"no image has the runner: name one in {RUNNER_VARIABLE}")
        with create_sandbox(config) as sandbox:
            for tried in (f"cat {RUNNER}", f"echo > {RUNNER}", f"mv {RUNNER} /tmp/x", f"rm -f {RUNNER}", f"chmod 777 {RUNNER}"):
                assert not sandbox.run_command(tried).ok, tried

    def test_an_image_without_a_shell_is_told_to_take_a_runner_image(self, config: AppConfig) -> None:
        if is_real():
            pytest.skip("only the stand-in has an image without a shell: unset CIFIXER_TEST_KUBECONFIG")
        with pytest.raises(ExecutorError, match="/bin/sh"):
            create_sandbox(config, image=NO_SHELL_IMAGE, kubernetes_runner_image="").init()
        wait_for(lambda: not left_of(config))


ATTACH = """
import sys
from cifixer_exec import AppConfig, attach
sandbox = attach(sys.argv[1], AppConfig.from_env())
print(sandbox.run_command("cat file; echo from-outside >> file").text, end="")
sandbox.close()
"""


def test_another_process_goes_on_with_a_sandbox(config: AppConfig) -> None:
    with create_sandbox(config, sandbox_id="one") as sandbox:
        sandbox.write_file("file", "from inside\n")
        command = [sys.executable, "-c", ATTACH, "one"]
        done = subprocess.run(command, env={**os.environ, **config.to_env()}, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (0, "from inside\n"), done.stderr
        assert sandbox.read_text("file") == "from inside\nfrom-outside\n"


def root_options(sandbox: SandboxEnvironment) -> set[str]:
    lines = sandbox.run_command("cat /proc/self/mounts").text.splitlines()
    return set(next(line.split()[3] for line in reversed(lines) if line.split()[1] == "/").split(","))


class TestDisks:
    def test_the_root_is_read_only_and_there_is_no_token(self, config: AppConfig) -> None:
        with create_sandbox(config) as sandbox:
            assert "ro" in root_options(sandbox)
            assert not sandbox.run_command("ls /var/run/secrets/kubernetes.io").ok
            assert sandbox.run_command("id -u; whoami").text.split()[1] == "sandbox"
            assert sandbox.run_command("echo x > /var/tmp/f && cat /tmp/f && cd && pwd").text == "x\n/home/sandbox\n"

    def test_the_root_may_be_let_be_written(self, config: AppConfig) -> None:
        with create_sandbox(config, kubernetes_writable_root=True) as sandbox:
            assert "rw" in root_options(sandbox)

    def test_the_nodes_disk_does_as_well_and_promises_no_size(self, config: AppConfig) -> None:
        on_node = config.with_(kubernetes_disk="node")
        assert not backend_of(on_node).capabilities.disk
        with pytest.raises(InvalidRequestError, match="CIFIXER_KUBERNETES_DISK=node"):
            backend_of(on_node).create(spec_of(disk_bytes=1 << 20))
        with create_sandbox(on_node) as sandbox:
            lives(sandbox)

    def test_a_claim_keeps_the_workspace_from_one_sandbox_to_the_next(self, config: AppConfig) -> None:
        claim = os.environ.get(CLAIM, "")
        if is_real() and not claim:
            pytest.skip(f"name a bound claim of the namespace in {CLAIM}")
        if not is_real():
            claim = "kept"
            stand_in().order("add_claim", namespace=config.kubernetes_namespace, name=claim)
        kept = config.with_(kubernetes_volume_claim=claim)
        with create_sandbox(kept, sandbox_id="first") as sandbox:
            sandbox.write_file("kept", config.namespace)
            sandbox.run_command("echo gone > ~/gone; chmod 600 kept")
        with create_sandbox(kept, sandbox_id="second") as sandbox:
            assert sandbox.read_text("kept") == config.namespace
            assert not sandbox.exists("/home/sandbox/gone")
            sandbox.remove("kept")


class TestNetworks:
    def test_none_is_labelled_for_the_policies_and_looks_nothing_up(self, config: AppConfig) -> None:
        with create_sandbox(config, sandbox_id="one", kubernetes_network_policies=True) as sandbox:
            pod = pod_of(config, "one")
            assert pod["metadata"]["labels"]["cifixer.dev/network"] == "none"
            assert (pod["spec"]["dnsPolicy"], pod["spec"]["dnsConfig"]) == ("None", {"nameservers": ["192.0.2.1"]})
            if is_real():
                assert sandbox.run_command("cat /etc/resolv.conf").text.split() == ["nameserver", "192.0.2.1"]

    def test_egress_is_labelled_and_has_the_clusters_names(self, config: AppConfig) -> None:
        with create_sandbox(config, sandbox_id="one", kubernetes_network_policies=True, network="egress"):
            pod = pod_of(config, "one")
            assert (pod["metadata"]["labels"]["cifixer.dev/network"], pod["spec"]["dnsPolicy"]) == ("egress", "ClusterFirst")


def whole_life(config: AppConfig, everybody: AppConfig) -> None:
    """Each verb of the backend once. ``everybody``: of somebody else, who deletes the Job without its Pod."""
    backend = backend_of(config)
    handle = backend.create(spec_of())
    asyncio.run(dialled(backend, handle))
    with create_sandbox(config, sandbox_id="one") as sandbox:  # the same one
        assert sandbox.run_command("echo lives").text == "lives\n"
        sandbox.extend(600)
        assert backend.inspect(handle).alive
        assert [o.handle.sandbox_id for o in backend.list_owned()] == ["one"]
    backend.create(spec_of())
    delete_job(everybody, "one", propagation="Orphan")
    wait_for(lambda: found(job_path(everybody)) is None)
    (orphan,) = backend.list_owned()
    backend.destroy(orphan.handle)
    wait_for(lambda: not left_of(everybody))


#: Without these a cause of death, or why a container ended, is told with fewer words; probe and doctor still name them.
SILENT = {("events", "list"), ("pods/log", "get")}
EACH = [(group, resource, verb) for group, resource, verbs in NEEDED for verb in verbs]


def rules_without(resource: str = "", verb: str = "") -> list[dict[str, Any]]:
    rules = [{**rule, "verbs": [v for v in rule["verbs"] if (rule["resources"][0], v) != (resource, verb)]} for rule in role_rules()]
    return [rule for rule in rules if rule["verbs"]]


class TestRights:
    def test_those_of_the_role_are_enough_for_a_whole_life(self, config: AppConfig, tmp_path: Path) -> None:
        with user_with(rules_without(), tmp_path) as theirs:
            lord = config.with_(kubernetes_kubeconfig=admin_kubeconfig())
            limited = config.with_(kubernetes_kubeconfig=theirs)
            health = backend_of(limited).probe()
            assert health.ok, health.summary
            whole_life(limited, lord)

    @pytest.mark.parametrize(("resource", "verb"), [(r, v) for _, r, v in EACH], ids=[f"{v}-{r}" for _, r, v in EACH])
    def test_each_that_is_missing_is_named(self, config: AppConfig, tmp_path: Path, resource: str, verb: str) -> None:
        with user_with(rules_without(resource, verb), tmp_path) as theirs:
            lord = config.with_(kubernetes_kubeconfig=admin_kubeconfig())
            limited = config.with_(kubernetes_kubeconfig=theirs)
            health = backend_of(limited).probe()
            assert not health.ok
            assert f"does not let us: {verb} {resource} in namespace '{config.kubernetes_namespace}'" in health.summary
            assert health.remedy == "kubectl apply -f k8s/rbac/k8s.yaml"
            if (resource, verb) in SILENT:
                whole_life(limited, lord)
                return
            with pytest.raises(BackendUnavailableError, match=named(resource, verb)) as caught:
                whole_life(limited, lord)
            assert "kubectl apply -f k8s/rbac/k8s.yaml" in caught.value.code

    def test_the_role_of_the_manifests_is_what_is_asked_for(self) -> None:
        role = yaml.safe_load((Path(__file__).parents[2] / "k8s" / "rbac" / "role.yaml").read_text())
        granted = {(g, r, v) for rule in role["rules"] for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}
        assert granted == set(EACH)

    def test_who_is_nobody_is_told_to_log_in(self, config: AppConfig, tmp_path: Path) -> None:
        cluster = admin().credentials
        authority = {"certificate-authority": str(cluster.configuration.ssl_ca_cert)}
        path = kubeconfig(tmp_path / "k", cluster.host, user={"token": "no-such-token"}, **authority)
        health = backend_of(config, kubernetes_kubeconfig=path).probe()
        assert not health.ok
        assert "log in again, or check the token" in health.summary


def named(resource: str, verb: str) -> str:
    """As the API server words a refusal, or we for an exec, whose refusal has no words."""
    group = {"jobs": "batch"}.get(resource, "")
    by_server = f'cannot {verb} resource "{resource}" in API group "{group}" in the namespace'
    return f"{by_server}|does not let us {verb} {resource}"


@pytest.mark.parametrize("context", ["no-such-context", ""])
def test_a_worker_without_its_cluster_ends_with_one_line(tmp_path: Path, context: str) -> None:
    variables = {
        "CIFIXER_KUBERNETES_KUBECONFIG": "/no/such/kubeconfig",
        "CIFIXER_KUBERNETES_CONTEXT": context,
        "CIFIXER_REDIS_URL": f"unix://{tmp_path}/redis.sock",
    }
    command = [str(Path(sys.executable).with_name("cifixer-exec")), "worker", "--backend", "kubernetes"]
    ended = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False)
    critical = [line for line in ended.stderr.splitlines() if "CRITICAL" in line]
    assert (ended.returncode, len(critical), "Traceback" in ended.stderr) == (os.EX_CONFIG, 1, False), ended.stderr
    assert "CIFIXER_KUBERNETES_KUBECONFIG" in critical[0]


COUNTED = "echo ran >> count; for i in $(seq 40); do echo line $i; sleep 0.05; done"
LINES = "".join(f"line {i}\n" for i in range(1, 41))


@pytest.mark.parametrize(("fault", "seconds"), [("reset", ()), ("refuse", (2.0,)), ("stall", (2.0,))])
def test_a_way_to_the_api_server_that_breaks_within_a_command_is_not_noticed(
    config: AppConfig, tmp_path: Path, fault: str, seconds: tuple[float, ...]
) -> None:
    """As when it restarts, or a load balancer does."""
    host = urlsplit(admin().credentials.host)
    if host.hostname != "127.0.0.1" or host.port is None:
        pytest.skip("the API server is elsewhere, and its certificate may not fit to a port of ours")
    with closing(RedisProxy(host.port)) as proxy:
        port = proxy.port()
        way = yaml.safe_load(Path(config.kubernetes_kubeconfig).read_text())
        way["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{port.number}"
        (tmp_path / "k").write_text(yaml.safe_dump(way))
        with create_sandbox(config, kubernetes_kubeconfig=str(tmp_path / "k")) as sandbox:
            running = sandbox.start_command(COUNTED)
            time.sleep(0.5)
            asyncio.run(proxy.do(getattr(port, fault), *seconds))
            result = running.wait()
            assert (result.text, result.exit_code) == (LINES, 0)
            assert sandbox.read_text("count") == "ran\n"


@pytest.fixture
def faulty(config: AppConfig) -> Iterator[AppConfig]:
    """A cluster that can be told to be at its worst, and is at its best again behind the test."""
    if is_real():
        pytest.skip("only the stand-in can be told to fail: unset CIFIXER_TEST_KUBECONFIG")
    yield config
    stand_in().order("clear_faults")
    stand_in().order("set", protocols=["v5.channel.k8s.io", "v4.channel.k8s.io"], kubelet_websockets=True)


class TestFaults:
    @pytest.mark.parametrize("how", [{"down_s": 0.0}, {"down_s": 1.5}], ids=["at once", "a while"])
    def test_an_api_server_that_restarts_within_a_command_is_not_noticed(self, faulty: AppConfig, how: dict[str, Any]) -> None:
        with create_sandbox(faulty) as sandbox:
            running = sandbox.start_command(COUNTED)
            time.sleep(0.5)
            stand_in().order("restart", **how)
            result = running.wait()
            assert (result.text, result.exit_code) == (LINES, 0)
            assert sandbox.read_text("count") == "ran\n"

    def test_channels_that_are_cut_again_and_again_lose_nothing(self, faulty: AppConfig) -> None:
        with create_sandbox(faulty) as sandbox:
            running = sandbox.start_command(COUNTED)
            for _ in range(5):
                time.sleep(0.25)
                assert stand_in().order("cut_execs") >= 0
            assert running.wait().text.count("line") == 40
            assert sandbox.read_text("count") == "ran\n"

    @pytest.mark.parametrize("newer", [True, False], ids=["kubelet", "api server"])
    def test_servers_with_the_older_protocol_do_as_well(self, faulty: AppConfig, newer: bool) -> None:
        stand_in().order("set", protocols=["v4.channel.k8s.io"], kubelet_websockets=newer)
        for runner_image in ("", RUNNER_IMAGE):
            with create_sandbox(faulty, kubernetes_runner_image=runner_image) as sandbox:
                lives(sandbox)

    @pytest.mark.parametrize("kind", ["lost_reply", "500", "429", "reset"])
    def test_a_creation_whose_answer_is_lost_makes_one_job(self, faulty: AppConfig, kind: str) -> None:
        stand_in().order("fault", kind=kind, verb="create", path="/jobs$", times=2, seconds=1)
        handle = backend_of(faulty).create(spec_of())
        selector = names_of(faulty).selector()
        assert [pod["metadata"]["name"] for pod in listed(pods_path(), selector)] == [handle.data["pod"]]

    def test_watches_that_end_and_listings_that_expire_delay_and_nothing_more(self, faulty: AppConfig) -> None:
        stand_in().order("fault", kind="500", verb="watch", path="/pods", times=2)
        stand_in().order("fault", kind="reset", verb="list", path="/pods", times=1)
        with create_sandbox(faulty) as sandbox:
            stand_in().order("compact")
            assert sandbox.run_command("echo lives").text == "lives\n"
            assert [o.alive for o in backend_of(faulty).list_owned()] == [True]

    def test_a_deletion_whose_answer_is_lost_is_a_deletion(self, faulty: AppConfig) -> None:
        backend = backend_of(faulty)
        handle = backend.create(spec_of())
        stand_in().order("fault", kind="lost_reply", verb="delete", path="/jobs/", times=1)
        backend.destroy(handle)
        assert not backend.inspect(handle).alive

    def test_a_server_that_does_not_answer_is_unavailability_and_no_death(self, faulty: AppConfig) -> None:
        backend = backend_of(faulty)
        handle = backend.create(spec_of())
        stand_in().order("stop_api")
        try:
            for ask in (lambda: backend.inspect(handle), lambda: list(backend.list_owned()), lambda: backend.destroy(handle)):
                with pytest.raises(BackendUnavailableError):
                    ask()
            with pytest.raises((BackendUnavailableError, OSError)):
                asyncio.run(dialled(backend, handle))
        finally:
            stand_in().order("start_api")
        wait_for(lambda: alive_again(backend, handle))


async def dialled(backend: Any, handle: Any) -> None:
    (await backend.dial(handle)()).close()


def alive_again(backend: Any, handle: Any) -> bool:
    try:
        return bool(backend.inspect(handle).alive)
    except BackendUnavailableError:
        return False


def test_every_request_of_all_this_is_one_that_the_server_knows(config: AppConfig) -> None:
    """Nothing was asked for that the stand-in only guesses."""
    if is_real():
        pytest.skip("an API server knows all requests")
    assert admin().credentials.host == stand_in().url
    assert stand_in().order("asked")["unknown"] == []
