"""What a sandbox is on this machine: its system, its users, its environment."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tests.support.kubernetes.images import image
from tests.support.kubernetes.knobs import Knobs as Images

Json = dict[str, Any]
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DIRECTORIES = ("etc", "var", "var/tmp", "var/log", "home", "home/user", "media", "mnt", "root", "run", "srv", "tmp", "workspace")
INIT = ["/bin/sleep", "infinity"]
#: Those of this machine that a name needs to become an address.
_NETWORK_FILES = ("etc/hosts", "etc/resolv.conf")


@dataclass(frozen=True)
class User:
    """An account in every sandbox."""

    name: str
    number: int
    home: str

    @property
    def identity(self) -> Json:
        """For the launcher."""
        return {"user": self.number, "group": self.number, "supplementary_groups": [self.number]}

    @property
    def environment(self) -> dict[str, str]:
        """Its own part."""
        return {"PATH": _PATH, "HOME": self.home, "USER": self.name, "LOGNAME": self.name}


ROOT = User("root", 0, "/root")
#: The kernel counts a user's processes over this whole machine, so each sandbox has one of its own; a microVM's is 1000.
_FIRST_USER, _MOST_USERS = 0x6000_0000, 0x0F00_0000


def users(sandbox_id: str) -> dict[str, User]:
    """The accounts in a sandbox, by name."""
    number = _FIRST_USER + int.from_bytes(hashlib.sha256(sandbox_id.encode()).digest()[:8], "big") % _MOST_USERS
    return {user.name: user for user in (ROOT, User("user", number, "/home/user"))}


def request_for(sandbox_id: str, template: str, mount_point: str, *, internet: bool, disk_bytes: int) -> Json:
    """What the launcher needs for PID 1; everything else in the sandbox starts from it."""
    variables = {"E2B_SANDBOX": "true", "E2B_SANDBOX_ID": sandbox_id, "E2B_TEMPLATE_ID": template}
    return {
        "command": INIT,
        "environment": {**ROOT.environment, **variables},
        "directory": "/",
        **ROOT.identity,
        "drop_capabilities": False,
        "no_new_privileges": False,
        "readonly_root": False,
        "root_size": str(disk_bytes),
        "hostname": "e2b.local",
        "host_network": internet,
        "image": _system(users(sandbox_id), internet=internet),
        "mounts": [],
        "shm": "",
        "mount_point": mount_point,
    }


def _system(accounts: dict[str, User], *, internet: bool) -> Json:
    system = image("debian", Images())
    files = {
        "etc/passwd": "".join(f"{u.name}:x:{u.number}:{u.number}::{u.home}:/bin/bash\n" for u in accounts.values()),
        "etc/group": "".join(f"{u.name}:x:{u.number}:\n" for u in accounts.values()),
        "etc/hostname": "e2b.local\n",
        "etc/hosts": "127.0.0.1 localhost e2b.local\n",
    }
    if internet:
        for name in _NETWORK_FILES:
            with suppress(OSError), open(f"/{name}", encoding="utf-8") as file:
                files[name] = file.read() + files.get(name, "")
    owners = dict.fromkeys(("home/user", "workspace"), accounts["user"].number)
    return {"binds": system["binds"], "directories": list(_DIRECTORIES), "files": files, "owners": owners}


def members(pid: int, groups: list[Any]) -> list[int]:
    """All processes of the sandbox whose PID 1 that is."""
    if groups:
        with suppress(OSError, ValueError), open(groups[0] / "cgroup.procs", encoding="ascii") as file:
            return [int(line) for line in file.read().split()]
    return [other for other in _all_pids() if _namespace(other) == _namespace(pid)]


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _namespace(pid: int) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""
