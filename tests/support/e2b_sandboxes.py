"""The microVMs of sandboxes, for who does something to them behind everyone's back: with a client of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from e2b import Sandbox

from cifixer_exec import AppConfig
from cifixer_exec.backends.e2b import Access
from cifixer_exec.backends.e2b.account import Account
from cifixer_exec.backends.e2b.names import Names

#: To the runner from outside of its pid namespace, as root of the machine may.
_SIGNAL = """
for p in /proc/[0-9]*; do
  case "$(tr '\\0' ' ' 2>/dev/null < $p/cmdline)" in "/proc/self/exe enclosed "*) kill -{name} "${{p#/proc/}}" && exit 0 ;; esac
done
exit 1
"""


def account_of(config: AppConfig) -> Account:
    """A way of our own, so that no breaker of a backend learns from it."""
    access = Access(api_key=config.e2b_api_key, domain=config.e2b_domain, api_url=config.e2b_api_url, sandbox_url=config.e2b_sandbox_url)
    return Account(access)


def e2b_id_of(config: AppConfig, sandbox_id: str) -> str:
    """As E2B calls it."""
    names = Names(f"{config.namespace}/direct" if config.dispatch == "direct" else config.namespace)
    (page,) = account_of(config).pages("looking", names.query(sandbox_id))
    (found,) = page
    return str(found.sandbox_id)


def signal_runner(config: AppConfig, sandbox_id: str, name: str) -> None:
    """``name``: such as KILL."""
    sandbox = account_of(config).sandbox(e2b_id_of(config, sandbox_id))
    sandbox.commands.run(_SIGNAL.format(name=name), user="root")


def end_machine(config: AppConfig, sandbox_id: str) -> None:
    """As somebody else with a key does it."""
    Sandbox.kill(e2b_id_of(config, sandbox_id), **account_of(config).options)


@contextmanager
def stopped_runner(config: AppConfig, sandbox_id: str) -> Iterator[None]:
    """It stands still for the ``with`` block."""
    signal_runner(config, sandbox_id, "STOP")
    try:
        yield
    finally:
        signal_runner(config, sandbox_id, "CONT")
