"""A sandbox sees and reaches nothing of its host, and cannot harm what watches over it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifixer_exec import SandboxEnvironment
from tests.contract.conftest import Make
from tests.support.contract_probes import command_lines, need_program
from tests.support.contract_stack import Stack
from tests.support.kubernetes_cluster import is_real

CONNECT = """
import socket, sys
kind, where = sys.argv[1:]
s = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
s.settimeout(5)
s.connect(where if kind == "unix" else (where.rpartition(":")[0], int(where.rpartition(":")[2])))
"""
PTRACE = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
sys.exit(0 if libc.ptrace(16, 1, 0, 0) == 0 else 1)
"""

#: ``call`` prints the name of the error that the system call of that number gives (x86-64, aarch64).
CALLS = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(numbers, *arguments):
    number = numbers[os.uname().machine == "aarch64"]
    print("done" if libc.syscall(number, *(ctypes.c_ulong(a) for a in arguments)) != -1 else errno.errorcode[ctypes.get_errno()])
"""
REFUSED_CALLS = {
    "the session's keys": ("call((250, 219), 11, 2**64 - 3, 0, 0)", "EPERM"),
    "a new keyring": ("call((250, 219), 1, 0)", "EPERM"),
    "io_uring": ("call((425, 425), 1, 0)", "EPERM"),
    "bpf": ("call((321, 280), 0, 0, 0)", "EPERM"),
    "perf": ("call((298, 241), 0, 0, 0, 0, 0)", "EPERM"),
    "userfaultfd": ("call((323, 282), 1)", "EPERM"),
    "a mount tree": ("call((428, 428), 2**64 - 100, 0, 1)", "EPERM"),
    "another namespace": ("call((308, 268), os.open('/proc/self/ns/uts', os.O_RDONLY), 0)", "EPERM"),
    "a new user namespace": ("call((272, 97), 0x10000000)", "EPERM"),
    "a child in a new namespace": ("call((56, 220), 0x10000011, 0, 0, 0, 0)", "EPERM"),
    "flags that cannot be seen": ("call((435, 435), 0, 0)", "ENOSYS"),
    "a file by its handle": ("call((304, 265), 2**64 - 100, 0, 0)", "EPERM"),
    "the hypervisor": ("call((41, 198), 40, 1, 0)", "EPERM"),
    "the kernel's ciphers": ("call((41, 198), 38, 5, 0)", "EPERM"),
    "the kernel's log": ("call((103, 116), 10, 0, 0)", "EPERM"),
}


@pytest.fixture
def host_port() -> Iterator[int]:
    """A port of this host that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_user_is_not_root(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("id -u; id -g; id -G").text.split()[0] != "0"
    assert "0" not in sandbox.run_command("id -u; id -g; id -G").text.split()


def test_no_capability_is_held(sandbox: SandboxEnvironment) -> None:
    status = sandbox.run_command("grep -E 'Cap(Inh|Prm|Eff|Amb)' /proc/self/status").text
    assert {line.split()[1] for line in status.splitlines()} == {"0" * 16}


def test_new_privileges_cannot_be_gained(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("grep NoNewPrivs /proc/self/status").text.split() == ["NoNewPrivs:", "1"]


def test_host_files_are_not_visible(stack: Stack, sandbox: SandboxEnvironment, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("host only")
    places = [str(tmp_path / "secret"), str(Path(__file__)), str(Path.home() / ".ssh"), "/var/run/docker.sock", "/work"]
    if stack.backend.name != "e2b":  # a machine has one of its own
        places.append("/var/log")
    assert sandbox.run_command(["sh", "-c", 'for p; do test -e "$p" && echo "$p"; done; true', "sh", *places]).text == ""


@pytest.mark.parametrize("path", ["/root", "/etc/shadow", "/etc/gshadow", "/etc/ssh", "/boot", "/var/lib"])
def test_a_place_of_the_host_cannot_be_read(stack: Stack, sandbox: SandboxEnvironment, path: str) -> None:
    if stack.backend.name == "e2b" and path == "/var/lib":
        pytest.skip("a machine has one of its own")
    result = sandbox.run_command(["sh", "-c", f"ls -A {path} && cat {path}/* {path}"])
    assert (result.exit_code != 0, result.stdout) in ((True, b""), (True, path.encode() + b"\n"))


def test_the_state_directory_is_not_visible(sandbox: SandboxEnvironment, stack: Stack) -> None:
    assert not sandbox.run_command(["test", "-e", str(stack.config.state_dir)]).ok


SYSTEM = ["/usr", "/usr/bin", "/etc", "/", "/bin/", "/lib/", "/opt", "/dev", "/run", "/run/cifixer", "/proc", "/sys"]


@pytest.mark.parametrize("directory", SYSTEM)
def test_the_system_cannot_be_written(sandbox: SandboxEnvironment, directory: str) -> None:
    assert not sandbox.run_command(["touch", f"{directory}/evil"]).ok


def test_the_runner_binary_cannot_be_replaced(stack: Stack, sandbox: SandboxEnvironment) -> None:
    path = "/run/cifixer/runner"
    if stack.backend.name == "kubernetes":
        if not stack.config.kubernetes_runner_image:
            pytest.skip("without a runner image the runner is uploaded, as a file of the sandbox's own user")
        path = "/run/cifixer/bin/runner"
    assert sandbox.run_command(["test", "-x", path]).ok
    assert not sandbox.run_command(f"echo evil > {path} || mv {path} /tmp/x || rm -f {path}").ok


def test_host_processes_are_not_visible(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command(["test", "-e", f"/proc/{os.getpid()}"]).ok in (False, os.getpid() < 500)
    assert not [line for line in command_lines(sandbox) if "pytest" in line or "celery" in line or "redis" in line]


def test_no_socket_of_the_host_is_visible(sandbox: SandboxEnvironment) -> None:
    lines = sandbox.run_command("cat /proc/net/unix").text
    assert "redis" not in lines
    assert "docker.sock" not in lines


def test_nested_user_namespaces_cannot_be_made(stack: Stack, sandbox: SandboxEnvironment) -> None:
    if stack.backend.name == "kubernetes" and not is_real():
        pytest.skip("the stand-in of a cluster has no seccomp filter; container runtimes do, by RuntimeDefault")
    need_program(sandbox, "unshare")
    assert not sandbox.run_command(["unshare", "-U", "true"]).ok
    assert not sandbox.run_command(["unshare", "-Ur", "true"]).ok


def test_every_process_is_under_a_filter_of_system_calls(sandbox: SandboxEnvironment, stack: Stack) -> None:
    if stack.backend.name != "local":
        pytest.skip("the container engine's own filter is its user's choice")
    assert set(sandbox.run_command("cat /proc/[0-9]*/status | grep ^Seccomp:").text.split()) == {"Seccomp:", "2"}


@pytest.mark.parametrize("what", REFUSED_CALLS)
def test_a_dangerous_system_call_is_refused(sandbox: SandboxEnvironment, stack: Stack, what: str) -> None:
    if stack.backend.name != "local":
        pytest.skip("the container engine's own filter is its user's choice")
    need_program(sandbox, "python3")
    line, wanted = REFUSED_CALLS[what]
    result = sandbox.run_command(["python3", "-c", CALLS + line])
    assert (result.text, result.stderr_text) == (wanted + "\n", "")


#: By the program that is needed; each is what such programs do that a filter could break.
ORDINARY = {
    "python3": "import multiprocessing as m, threading, asyncio, tempfile, socket\n"
    "if __name__ == '__main__':\n"
    "    print(sum(m.get_context('fork').Pool(3).map(abs, range(-9, 1))))\n"
    "    t = threading.Thread(target=print); t.start(); t.join()\n"
    "    socket.socketpair(); socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\n"
    "    asyncio.run(asyncio.create_subprocess_exec('true'))\n",
    "git": "git init -q r && cd r && echo x > f && git add f && git -c user.name=a -c user.email=a@b commit -qm m"
    " && git gc -q && git log --oneline",
    "gcc": "printf '#include <pthread.h>\nvoid *f(void *p) { return p; }\n"
    "int main() { pthread_t t; return pthread_create(&t, 0, f, 0); }' > p.c"
    " && gcc -pthread p.c -o p && ./p",
    "make": "printf 'all: a b\\na b:\\n\\ttrue $@\\n' > Makefile && make -j2",
    "node": "node -e \"const {Worker} = require('worker_threads'), fs = require('fs');"
    " fs.promises.writeFile('n', 'x').then(() => new Worker('require(\\'child_process\\').execSync(\\'true\\')', {eval: true}))\"",
    "npm": "npm --version && mkdir pkg && cd pkg && npm init -y",
    "java": "java -version",
    "go": "printf 'package main\\nfunc main() {}\\n' > main.go && go run main.go",
    "setsid": "setsid -w nice ionice -c3 taskset -c 0 true; setsid -w timeout 5 true",
}


@pytest.mark.parametrize("program", ORDINARY)
def test_ordinary_work_is_not_hindered(fresh: SandboxEnvironment, program: str) -> None:
    need_program(fresh, program)
    line = ORDINARY[program]
    fresh.write_file("work.py", line)
    result = fresh.run_command("python3 work.py" if program == "python3" else line, timeout_s=60)
    assert (result.exit_code, result.signal) == (0, None), result.stderr_text


def test_no_private_key_of_the_host_is_shown(sandbox: SandboxEnvironment) -> None:
    line = "for d in /etc/ssl/private /etc/pki/tls/private; do ls -A $d 2>/dev/null; test -w $d && echo $d; done; true"
    assert sandbox.run_command(line).text == ""


def test_nothing_can_be_mounted(sandbox: SandboxEnvironment) -> None:
    assert not sandbox.run_command("mkdir -p m; mount -t tmpfs none m || unshare -m true").ok


def test_without_network_only_the_loopback_is_there(stack: Stack, make: Make) -> None:
    if "none" not in stack.backend.capabilities.networks:
        pytest.skip("this backend cannot switch the network off")
    interfaces = make(network="none").run_command("tail -n +3 /proc/net/dev | cut -d: -f1").text.split()
    assert interfaces == ["lo"]


def test_without_network_the_hosts_ports_cannot_be_reached(stack: Stack, make: Make, host_port: int) -> None:
    if "none" not in stack.backend.capabilities.networks:
        pytest.skip("this backend cannot switch the network off")
    sandbox = make(network="none")
    need_program(sandbox, "python3")
    assert not sandbox.run_command(["python3", "-c", CONNECT, "tcp", f"127.0.0.1:{host_port}"]).ok
    assert b"unreachable" in sandbox.run_command(["python3", "-c", CONNECT, "tcp", "192.0.2.1:80"]).stderr


def test_the_network_is_off_unless_asked_for(sandbox: SandboxEnvironment, stack: Stack, host_port: int) -> None:
    if stack.backend.name != "local":
        pytest.skip("a default of the local backend")
    need_program(sandbox, "python3")
    assert not sandbox.run_command(["python3", "-c", CONNECT, "tcp", f"127.0.0.1:{host_port}"]).ok


def test_with_the_hosts_network_its_ports_can_be_reached(stack: Stack, make: Make, host_port: int) -> None:
    if "host" not in stack.backend.capabilities.networks:
        pytest.skip("this backend does not give the host's network")
    sandbox = make(network="host")
    need_program(sandbox, "python3")
    assert sandbox.run_command(["python3", "-c", CONNECT, "tcp", f"127.0.0.1:{host_port}"]).ok


@pytest.mark.parametrize("network", ["none", "host"])
def test_the_redis_socket_cannot_be_reached(stack: Stack, make: Make, network: str) -> None:
    if network not in stack.backend.capabilities.networks or not stack.config.redis_url.startswith("unix://"):
        pytest.skip("not possible here")
    sandbox = make(network=network)
    need_program(sandbox, "python3")
    path = stack.config.redis_url.removeprefix("unix://")
    assert not sandbox.run_command(["python3", "-c", CONNECT, "unix", path]).ok


ATTACKS = ["-9 -1", "-STOP -1", "-9 1", "-STOP 1", "-TERM 1", "-INT 1", "-SEGV 1", "-QUIT 1", "-HUP 1", "-PIPE 1", "-ABRT 1", "-USR1 1"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_sandbox_outlives_an_attack_on_its_init(fresh: SandboxEnvironment, attack: str) -> None:
    result = fresh.run_command(["sh", "-c", f"kill {attack}; exit 3"], timeout_s=10)
    assert not result.ok
    after = fresh.run_command("echo alive", timeout_s=20)
    assert (after.exit_code, after.stdout) == (0, b"alive\n")


def test_a_command_whose_watcher_was_killed_is_not_a_success(fresh: SandboxEnvironment) -> None:
    result = fresh.run_command("kill -9 $PPID; sleep 1; exit 0", timeout_s=20)
    assert not result.ok
    assert result.status != "exited"
    assert result.cause


def test_processes_of_a_killed_watcher_are_killed_too(fresh: SandboxEnvironment, marker: str) -> None:
    fresh.run_command(f"setsid sleep {marker} & kill -9 $PPID; sleep {marker}", timeout_s=20)
    assert f"sleep {marker}" not in command_lines(fresh)


@pytest.mark.parametrize("file", ["environ", "mem", "fd", "cwd", "root", "map_files"])
def test_the_runner_cannot_be_read(sandbox: SandboxEnvironment, file: str) -> None:
    result = sandbox.run_command(["sh", "-c", f"head -c 1 /proc/1/{file} || ls /proc/1/{file}/"])
    assert not result.ok
    assert result.stdout == b""


def test_the_runner_cannot_be_traced(sandbox: SandboxEnvironment) -> None:
    need_program(sandbox, "python3")
    assert sandbox.run_command(["python3", "-c", PTRACE]).exit_code == 1


def test_a_forged_record_in_the_spool_does_not_change_a_result(fresh: SandboxEnvironment) -> None:
    forged = '{"state":"finished","status":"exited","exit_code":0}'
    forge = f"for d in /run/cifixer/spool/*/; do echo '{forged}' > $d/record.json; done 2>/dev/null; exit 5"
    result = fresh.run_command(forge, timeout_s=20)
    assert result.exit_code == 5


def test_the_output_of_one_command_cannot_be_emptied_by_another(fresh: SandboxEnvironment) -> None:
    handle = fresh.start_command("echo kept; read x; exit 5", stdin_open=True)
    next(iter(handle.output()))
    fresh.run_command("rm -rf /run/cifixer/spool/* 2>/dev/null; true")
    handle.send_stdin("go\n")
    assert handle.wait().exit_code == 5
    assert fresh.run_command("echo alive").stdout == b"alive\n"
