"""The bubblewrap command line says what it must, and no secret is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cifixer_exec.backends.local.isolation import (
    Identity,
    Memory,
    base_environment,
    bwrap_arguments,
    identity_for,
    launch_arguments,
    memory_for,
)
from cifixer_exec.errors import CapacityError
from cifixer_exec.model import MIB, SandboxSpec

ROOT = Identity(host_uid=1_900_000_007)
MEMORY = Memory(disk_bytes=16 * MIB, spool_bytes=8 * MIB, shm_bytes=4 * MIB)
USER = Identity(host_uid=None)
WHOLE = "         0          0 4294967295\n"
CONTAINER = "         0     100000      65536\n"
TINY = "         0       1000          1\n"


def arguments(tmp_path: Path, identity: Identity = ROOT, memory_group: Path | None = None, **members: Any) -> list[str]:
    spec = SandboxSpec(**{"backend": "local", "sandbox_id": "s", **members})
    return bwrap_arguments(Path("/bwrap"), Path("/runner"), tmp_path, spec, identity, MEMORY, memory_group)


def pairs(argv: list[str], option: str, count: int = 1) -> list[tuple[str, ...]]:
    """The values behind each ``option``."""
    return [tuple(argv[n + 1 : n + 1 + count]) for n, word in enumerate(argv[: argv.index("--")]) if word == option]


@pytest.mark.parametrize("uid_map", [WHOLE, CONTAINER, TINY, ""])
def test_an_ordinary_user_maps_nobody(uid_map: str) -> None:
    assert identity_for("s", euid=1000, uid_map=uid_map) == USER


def test_root_gives_each_sandbox_a_uid_far_from_everyone() -> None:
    assert 0x7000_0000 <= (identity_for("s", euid=0, uid_map=WHOLE).host_uid or 0) < 0x7F00_0000


def test_root_in_a_container_stays_within_its_uids() -> None:
    assert 1000 < (identity_for("s", euid=0, uid_map=CONTAINER).host_uid or 0) < 65_536


@pytest.mark.parametrize("uid_map", [TINY, "", "0 1000 1\n1 100000 1000\n"])
def test_root_with_too_few_uids_maps_nobody(uid_map: str) -> None:
    assert identity_for("s", euid=0, uid_map=uid_map) == USER


def test_a_map_of_several_lines_counts_to_its_end() -> None:
    host_uid = identity_for("s", euid=0, uid_map="0 1000 1\n1 100000 65536\n").host_uid
    assert host_uid is not None
    assert 1000 < host_uid < 65_537


@pytest.mark.parametrize("uid_map", [WHOLE, CONTAINER, "0 100000 200000\n"])
def test_no_uid_is_given_twice(uid_map: str) -> None:
    taken: set[int] = set()
    for n in range(1000):
        uid = identity_for(f"s{n}", euid=0, uid_map=uid_map, taken=taken).host_uid
        assert uid is not None
        assert uid not in taken
        taken.add(uid)


def test_sandboxes_of_other_stacks_have_most_probably_other_uids() -> None:
    assert len({identity_for(f"s{n}", euid=0, uid_map=WHOLE).host_uid for n in range(2000)}) >= 1999


def test_without_a_free_uid_there_is_no_capacity() -> None:
    with pytest.raises(CapacityError, match="5000 user ids"):
        identity_for("s", euid=0, uid_map=CONTAINER, taken=range(1 << 20))


@pytest.mark.parametrize("identity", [ROOT, USER])
def test_every_namespace_is_new(tmp_path: Path, identity: Identity) -> None:
    argv = arguments(tmp_path, identity)
    assert {"--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net", "--as-pid-1", "--new-session", "--clearenv"} <= set(argv)


def test_an_ordinary_user_gets_a_user_namespace_without_nesting(tmp_path: Path) -> None:
    assert {"--unshare-user", "--disable-userns"} <= set(arguments(tmp_path, USER))


def test_as_root_only_what_is_needed_to_become_the_user_is_kept(tmp_path: Path) -> None:
    argv = arguments(tmp_path, ROOT)
    assert pairs(argv, "--cap-drop") == [("ALL",)]
    assert {c for (c,) in pairs(argv, "--cap-add")} == {"CAP_SETUID", "CAP_SETGID", "CAP_CHOWN"}
    assert argv[argv.index("--user") + 1] == "1000:1000"


def test_the_hosts_network_is_only_there_when_asked_for(tmp_path: Path) -> None:
    assert "--unshare-net" not in arguments(tmp_path, network="host")
    assert "--unshare-net" in arguments(tmp_path, network="none")


def test_no_secret_is_in_the_command_line(tmp_path: Path) -> None:
    argv = arguments(tmp_path, env={"TOKEN": "hunter2"}, labels={"secret": "hunter2"})
    assert not [word for word in argv if "hunter2" in word or "TOKEN" in word]


def test_nothing_of_the_host_is_writable(tmp_path: Path) -> None:
    argv = arguments(tmp_path, readonly_paths=(str(tmp_path),))
    assert not {"--dev-bind", "--bind-try", "--dev-bind-try"} & set(argv)
    disk = tmp_path / "disk"  # on the host an empty directory: `runner launch` mounts memory there, for the sandbox alone
    assert pairs(argv, "--bind", 2) == [
        (str(disk / "workspace"), "/workspace"),
        (str(disk / "home"), "/home/sandbox"),
        (str(disk / "tmp"), "/tmp"),
    ]
    assert ("/",) in pairs(argv, "--remount-ro")


def test_the_filter_of_system_calls_is_given_to_bubblewrap(tmp_path: Path) -> None:
    assert pairs(arguments(tmp_path), "--seccomp") == pairs(arguments(tmp_path, USER), "--seccomp") == [("4",)]
    assert "--seccomp" in launch_arguments(tmp_path, USER, [], MEMORY)


def test_only_known_places_of_the_host_are_shown(tmp_path: Path) -> None:
    shown = [target for _, target in pairs(arguments(tmp_path), "--ro-bind", 2)]
    roots = ("/usr", "/bin", "/sbin", "/lib", "/opt", "/etc/", "/run/cifixer/runner")
    assert [t for t in shown if not t.startswith(roots)] == []
    assert not {"/etc/shadow", "/etc/gshadow", "/etc/hostname", "/etc/ssh"} & set(shown)


def test_the_sandboxs_users_are_not_the_hosts(tmp_path: Path) -> None:
    shown = pairs(arguments(tmp_path), "--ro-bind", 2)
    assert (str(tmp_path / "etc" / "passwd"), "/etc/passwd") in shown
    assert (str(tmp_path / "etc" / "group"), "/etc/group") in shown


def test_every_readonly_path_is_shown_where_it_is(tmp_path: Path) -> None:
    paths = (str(tmp_path), "/srv/tools")
    shown = pairs(arguments(tmp_path, readonly_paths=paths), "--ro-bind", 2)
    assert [(p, p) for p in paths] == [s for s in shown if s[0] in paths]


def test_a_shown_tool_directory_comes_first_in_path(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    assert base_environment((str(tmp_path), "/srv/none"))["PATH"].split(":")[:2] == [f"{tmp_path}/bin", "/usr/local/sbin"]


def test_the_disk_limit_is_one_for_all_writable_places(tmp_path: Path) -> None:
    argv = launch_arguments(tmp_path, ROOT, [], MEMORY)
    assert argv[argv.index("--disk") + 1] == f"{tmp_path}/disk:{16 * MIB}"


@pytest.mark.parametrize(
    ("disk_bytes", "limited", "wanted"),
    [
        (None, True, (4096, 512, 256)),
        (None, False, (1024, 512, 64)),
        (16 * MIB, True, (16, 128, 256)),
        (512 * MIB, False, (512, 256, 64)),
        (8192 * MIB, False, (8192, 512, 64)),
    ],
)
def test_all_that_is_memory_is_in_relation(disk_bytes: int | None, limited: bool, wanted: tuple[int, int, int]) -> None:
    spec = SandboxSpec(backend="local", sandbox_id="s", disk_bytes=disk_bytes, memory_bytes=8192 * MIB)
    memory = memory_for(spec, limited=limited)
    assert (memory.disk_bytes, memory.spool_bytes, memory.shm_bytes) == tuple(n * MIB for n in wanted)


def test_the_sizes_of_spool_and_shared_memory_are_set(tmp_path: Path) -> None:
    argv = arguments(tmp_path)
    sizes = {argv[n + 3]: argv[n + 1] for n, word in enumerate(argv) if word == "--size" and not argv[n + 3].startswith("/etc/")}
    assert sizes == {"/run/cifixer/spool": str(8 * MIB), "/dev/shm": str(4 * MIB)}


def test_directories_of_private_keys_are_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.isdir", lambda _path: True)
    monkeypatch.setattr("os.path.realpath", str)
    argv = arguments(tmp_path)
    covered = {t for (t,) in pairs(argv, "--tmpfs")} & {t for (t,) in pairs(argv, "--remount-ro")}
    assert {"/etc/ssl/private", "/etc/pki/tls/private"} <= covered
    assert max(argv.index("/etc/ssl"), argv.index("/etc/pki") if "/etc/pki" in argv else 0) < argv.index("/etc/ssl/private")


def test_no_writable_place_is_without_a_limit(tmp_path: Path) -> None:
    argv = arguments(tmp_path)
    for n, word in enumerate(argv):
        if word == "--tmpfs":
            assert argv[n - 2] == "--size"


def test_the_lifetime_is_the_runners_lease(tmp_path: Path) -> None:
    argv = arguments(tmp_path, lifetime_s=12.5)
    assert argv[argv.index("--expires-in") + 1] == "12.500"


def test_the_process_limit_reaches_the_runner(tmp_path: Path) -> None:
    argv = arguments(tmp_path, max_processes=40)
    assert argv[argv.index("--max-processes") + 1] == "40"


@pytest.mark.parametrize(("file", "inside"), [("memory.events", "/sys/fs/cgroup"), ("memory.oom_control", "/sys/fs/cgroup/memory")])
def test_the_memory_counter_is_shown_where_the_runner_looks(tmp_path: Path, file: str, inside: str) -> None:
    group = tmp_path / "group"
    group.mkdir()
    (group / file).touch()
    assert (str(group), inside) in pairs(arguments(tmp_path, memory_group=group), "--ro-bind", 2)


def test_launch_maps_the_user_and_joins_every_group(tmp_path: Path) -> None:
    argv = launch_arguments(tmp_path, ROOT, [Path("/cg/a"), Path("/cg/b")], MEMORY)
    assert [argv[n + 1] for n, w in enumerate(argv) if w == "--cgroup"] == ["/cg/a", "/cg/b"]
    assert argv[argv.index("--map-user") + 1] == argv[argv.index("--map-group") + 1] == "1000:1900000007"


def test_launch_maps_nobody_for_an_ordinary_user(tmp_path: Path) -> None:
    assert "--map-user" not in launch_arguments(tmp_path, USER, [], None)
