"""A certificate authority of our own and a server's certificate for the loopback, by the openssl program."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


def server_context(directory: Path) -> ssl.SSLContext:
    """Makes ``ca.pem``, ``server.pem`` and their keys in ``directory``."""
    extensions = directory / "server.ext"
    extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\n")
    usage = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    _openssl(directory, "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=stand-in-ca -keyout ca.key -out ca.pem", *usage)
    _openssl(directory, "req -newkey rsa:2048 -nodes -subj /CN=kube-apiserver -keyout server.key -out server.csr")
    _openssl(directory, "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -extfile server.ext -out server.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem", directory / "server.key")
    return context


def _openssl(directory: Path, command: str, *more: str) -> None:
    subprocess.run(["openssl", *command.split(), *more], cwd=directory, check=True, capture_output=True)
