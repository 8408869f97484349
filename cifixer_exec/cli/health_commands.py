"""``healthy``: for the health checks of containers, which have no curl."""

from __future__ import annotations

import http.client

import click

from cifixer_exec.cli import exits
from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.settings import AppConfig, host_and_port

TIMEOUT_S = 4.0
#: Listening "everywhere" is reached from the same machine by the loopback.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
_MOST_BYTES = 1000


@click.command()
@click.option("--address", metavar="HOST:PORT", help="Left out: CIFIXER_METRICS_ADDRESS.")
def healthy(*, address: str | None) -> int:
    """Ask a worker or beat, by its metrics address, whether it is well. Exit code 0: yes; 1: no, or nobody answers."""
    wanted = address or AppConfig.from_env().metrics_address
    if not wanted:
        raise InvalidRequestError("no address is known: give --address HOST:PORT, or set CIFIXER_METRICS_ADDRESS as the worker has it")
    host, port = host_and_port(wanted)
    well, said = ask_health(_LOOPBACK.get(host, host), port)
    click.echo(said)
    return 0 if well else exits.UNHEALTHY


def ask_health(host: str, port: int) -> tuple[bool, str]:
    """Whether ``/healthz`` says that all is well, and its sentence, or why there is none."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        said = answer.read(_MOST_BYTES).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as error:
        return False, f"nobody answers at {host}:{port}: {error or type(error).__name__}"
    finally:
        connection.close()
    return answer.status == http.client.OK, said
