"""docker-py's and requests' errors as this package's: the one table of this boundary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import requests
import urllib3
from docker.errors import APIError, DockerException, StreamParseError

from cifixer_exec.errors import BackendError, BackendUnavailableError, CapacityError, ExecutorError, InvalidRequestError, SandboxLostError

#: What the daemon's answer means (https://docs.docker.com/reference/api/engine/); 304 is no error there.
_BY_STATUS: dict[int, type[ExecutorError]] = {
    400: InvalidRequestError,
    401: BackendUnavailableError,
    403: BackendUnavailableError,
    404: SandboxLostError,
    429: CapacityError,
    503: BackendUnavailableError,
}
_START = "start the Docker daemon, or set CIFIXER_DOCKER_HOST or DOCKER_HOST to where it listens"
_CERTIFICATES = "check ca.pem, cert.pem and key.pem in the directory that CIFIXER_DOCKER_CERT_PATH or DOCKER_CERT_PATH names"
#: What is wrong on the way to the daemon: (what the text has, what to do).
_ON_THE_WAY = (
    ("permission denied", "let this user use the daemon's socket (usermod -aG docker USER, and log in again), or use a rootless daemon"),
    ("no such file", _START),
    ("connection refused", _START),
    ("certificate", _CERTIFICATES),
    ("connection aborted", "it ended the connection at once; over ssh, see that `ssh HOST docker version` works and asks nothing"),
    ("name or service not known", "check the host name in CIFIXER_DOCKER_HOST or DOCKER_HOST"),
)
#: What the daemon itself says.
_SAID = (
    ("http request to an https server", "the daemon wants TLS: set CIFIXER_DOCKER_CERT_PATH or DOCKER_CERT_PATH"),
    ("no space left", "free room on the daemon's disk (docker system df shows what takes it)"),
    ("toomanyrequests", "the registry limits pulls: log in (docker login), or pull the image before"),
)

#: The last two come out of answers that are read piece by piece (pull, events).
VENDOR_ERRORS = (DockerException, requests.RequestException, urllib3.exceptions.HTTPError, StreamParseError)


def remedy(said: str) -> str:
    """The mend for what the daemon said; empty when nothing is known of it."""
    return _look_up(_SAID, said)


def _look_up(table: tuple[tuple[str, str], ...], said: str) -> str:
    text = said.lower()
    return next((mend for sign, mend in table if sign in text), "")


def explanation(error: Exception) -> str:
    """What the daemon said, without the URL that docker-py puts around it."""
    return str(getattr(error, "explanation", None) or error).strip()


def translate(error: Exception, doing: str) -> ExecutorError:
    """``error`` of docker-py or requests as one of ours; ``doing`` completes "while …"."""
    said = explanation(error)
    if isinstance(error, APIError):
        mend = remedy(said)
        kind = _BY_STATUS.get(error.status_code or 0, BackendError)
        return kind(f"the Docker daemon refused {doing}: {said}" + (f": {mend}" if mend else ""), mend)
    mend = _look_up(_ON_THE_WAY, said)
    return BackendUnavailableError(f"the Docker daemon does not answer while {doing}: {said}" + (f": {mend}" if mend else ""), mend)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Only errors of this package come out of the ``with`` block."""
    try:
        yield
    except VENDOR_ERRORS as error:
        raise translate(error, doing) from None
