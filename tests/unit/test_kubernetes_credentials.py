"""Who we are to a cluster: from a service account, or from a kubeconfig in each of its forms."""

from __future__ import annotations

import http.client
import http.server
import json
import shutil
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kubernetes.config import incluster_config, kube_config

from cifixer_exec.backends.kubernetes import credentials as module
from cifixer_exec.backends.kubernetes.cluster import Cluster
from cifixer_exec.backends.kubernetes.credentials import Address, Credentials
from cifixer_exec.errors import BackendUnavailableError
from tests.support.docker_tcp import certificates
from tests.support.kubeconfigs import kubeconfig

SERVER = "https://192.0.2.7:6443"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This is no Pod, and nobody has a kubeconfig in the usual place."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for holder in (module, kube_config):
        monkeypatch.setattr(holder, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "usual"))


def loaded(path: str = "", **address: str) -> Credentials:
    return Credentials(Address(kubeconfig=path, **address), pool_size=7)


def of_user(tmp_path: Path, user: dict[str, Any]) -> Credentials:
    return loaded(kubeconfig(tmp_path / "k", SERVER, user=user))


def test_a_token_is_sent_as_it_is(tmp_path: Path) -> None:
    found = of_user(tmp_path, {"token": "t-1"})
    assert (found.host, found.namespace, found.headers()) == (SERVER, "ns", {"Authorization": "Bearer t-1"})


def test_a_password_is_sent_as_browsers_do(tmp_path: Path) -> None:
    assert of_user(tmp_path, {"username": "u", "password": "p"}).headers() == {"Authorization": "Basic dTpw"}


def test_who_has_nothing_is_anonymous(tmp_path: Path) -> None:
    assert of_user(tmp_path, {}).headers() == {}


@pytest.mark.parametrize("text", ["t-2", "t-2\n", "t-2\r\n"])
def test_a_token_file_may_end_with_a_new_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    assert of_user(tmp_path, {"tokenFile": str(tmp_path / "token")}).headers() == {"Authorization": "Bearer t-2"}


def test_the_pool_is_as_big_as_was_asked_and_urllib3_repeats_nothing(tmp_path: Path) -> None:
    made = of_user(tmp_path, {}).configuration
    assert (made.connection_pool_maxsize, made.retries) == (7, False)


def several(path: Path) -> str:
    contexts = {"a": ("one", "u1", "ns-a"), "b": ("two", "u2", None), "c": ("two", "u1", "ns-c")}
    found = {
        "current-context": "b",
        "clusters": [{"name": n, "cluster": {"server": f"https://{n}.example"}} for n in ("one", "two")],
        "users": [{"name": n, "user": {"token": f"token-{n}"}} for n in ("u1", "u2")],
        "contexts": [
            {"name": name, "context": {"cluster": cluster, "user": user, **({"namespace": ns} if ns else {})}}
            for name, (cluster, user, ns) in contexts.items()
        ],
    }
    path.write_text(json.dumps(found))
    return str(path)


@pytest.mark.parametrize(
    ("context", "host", "token", "namespace"),
    [("", "two", "u2", "default"), ("a", "one", "u1", "ns-a"), ("b", "two", "u2", "default"), ("c", "two", "u1", "ns-c")],
)
def test_the_context_chooses_cluster_user_and_namespace(tmp_path: Path, context: str, host: str, token: str, namespace: str) -> None:
    found = loaded(several(tmp_path / "k"), context=context)
    assert found.host == f"https://{host}.example"
    assert found.headers() == {"Authorization": f"Bearer token-{token}"}
    assert found.namespace == namespace


def test_a_namespace_of_the_settings_goes_before_the_contexts(tmp_path: Path) -> None:
    assert loaded(several(tmp_path / "k"), context="a", namespace="mine").namespace == "mine"


def test_without_a_path_it_is_the_usual_file(tmp_path: Path) -> None:
    several(tmp_path / "usual")
    assert loaded().host == "https://two.example"
    assert loaded(context="a").namespace == "ns-a"


PLUGIN = """#!{python}
import json, sys
from pathlib import Path
count = Path({count!r})
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
json.dump({{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
           "status": {{"token": f"token-{{number}}", "expirationTimestamp": {expires!r}}}}}, sys.stdout)
"""


def plugin(tmp_path: Path, text: str) -> dict[str, Any]:
    program = tmp_path / "plugin"
    program.write_text(text)
    program.chmod(0o755)
    return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(program), "interactiveMode": "Never"}}


def counting(tmp_path: Path, expires: datetime) -> dict[str, Any]:
    text = PLUGIN.format(python=sys.executable, count=str(tmp_path / "count"), expires=expires.strftime("%Y-%m-%dT%H:%M:%SZ"))
    return plugin(tmp_path, text)


def test_a_plugin_is_asked_once_while_its_token_is_good(tmp_path: Path) -> None:
    found = of_user(tmp_path, counting(tmp_path, datetime.now(UTC) + timedelta(hours=1)))
    assert [found.headers()["Authorization"] for _ in range(3)] == ["Bearer token-1"] * 3
    assert (tmp_path / "count").read_text() == "1"


def test_a_plugin_is_asked_again_when_its_token_has_ended(tmp_path: Path) -> None:
    found = of_user(tmp_path, counting(tmp_path, datetime.now(UTC) - timedelta(seconds=1)))
    assert [found.headers()["Authorization"] for _ in range(3)] == [f"Bearer token-{n}" for n in (2, 3, 4)]


BAD_PLUGINS = {
    "fails": ("#!/bin/sh\necho 'log in first: aws sso login' >&2\nexit 3\n", "process returned 3. log in first: aws sso login"),
    "says nothing": ("#!/bin/sh\n", "failed to decode process output"),
    "says no credential": (
        '#!/bin/sh\necho \'{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {}}\'\n',
        "the plugin of user 'u' gives neither a token nor a certificate",
    ),
}


@pytest.mark.parametrize("how", BAD_PLUGINS)
def test_a_plugin_that_gives_nothing_does_not_make_us_anonymous(tmp_path: Path, how: str) -> None:
    text, said = BAD_PLUGINS[how]
    with pytest.raises(BackendUnavailableError, match=said):
        of_user(tmp_path, plugin(tmp_path, text))


def test_a_plugin_that_is_not_installed_is_named(tmp_path: Path) -> None:
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "/no/such/plugin"}}
    with pytest.raises(BackendUnavailableError, match="/no/such/plugin"):
        of_user(tmp_path, user)


BROKEN = {
    "no YAML": ("a: [", "while parsing"),
    "a list": ("[1]", "list"),
    "a text": ("hello", "str"),
    "empty": ("", "file is empty"),
    "no text": ("\0", "unacceptable character"),
    "no contexts": ('{"current-context": "c"}', "Expected object with name c"),
    "no server": ('{"server": ""}', "has no server"),
    "a server that is a number": ('{"server": 5}', "int"),
    "a certificate that is missing": ('{"server": "https://x", "certificate-authority": "/no/such/ca"}', "/no/such/ca"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kubeconfig_gives_one_line_that_names_it(tmp_path: Path, what: str) -> None:
    text, said = BROKEN[what]
    path = tmp_path / "broken"
    if "server" in text:
        kubeconfig(path, **json.loads(text) if "certificate" in text else {"server": json.loads(text)["server"]})
    else:
        path.write_text(text)
    with pytest.raises(BackendUnavailableError) as caught:
        loaded(str(path))
    assert said in str(caught.value)
    assert f"in kubeconfig {str(path)!r}" in str(caught.value)
    assert "set CIFIXER_KUBERNETES_KUBECONFIG" in caught.value.code
    assert "\n" not in str(caught.value)


def test_what_is_shown_of_a_broken_kubeconfig_is_no_token(tmp_path: Path) -> None:
    path = tmp_path / "k"
    kubeconfig(path, SERVER)
    path.write_text(path.read_text().replace('"user": {', '"usr": {').replace("a-token", "secret-9d1f"))
    with pytest.raises(BackendUnavailableError) as caught:
        loaded(str(path))
    assert "secret-9d1f" not in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/kubeconfig", "/", ""])
def test_without_any_kubeconfig_there_is_one_line_that_says_what_to_set(path: str) -> None:
    with pytest.raises(
        BackendUnavailableError, match=r"no credentials for a Kubernetes cluster.*set CIFIXER_KUBERNETES_KUBECONFIG"
    ) as caught:
        loaded(path)
    assert path in str(caught.value)


def test_a_context_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="no-such-context"):
        loaded(several(tmp_path / "k"), context="no-such-context")


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The service account of a Pod, elsewhere than where Pods have it."""
    for name, text in (("token", "sa-1"), ("ca.crt", "certificate"), ("namespace", "of-the-pod\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(module, "_ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    return tmp_path


def test_in_a_pod_it_is_the_service_account(account: Path) -> None:
    found = loaded()
    assert (found.host, found.namespace) == ("https://10.0.0.1:443", "of-the-pod")
    assert found.headers()["Authorization"].lower() == "bearer sa-1"
    assert found.configuration.ssl_ca_cert == str(account / "ca.crt")


def test_a_kubeconfig_or_a_context_goes_before_the_service_account(account: Path) -> None:
    assert loaded(kubeconfig(account / "k", SERVER)).host == SERVER
    several(account / "usual")
    assert loaded(context="a").host == "https://one.example"


@pytest.fixture
def soon_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read from a token's file is to be read again at once, and not a minute later."""
    loader = incluster_config.InClusterConfigLoader
    read: Callable[[Any], None] = loader._read_token_file

    def read_old(self: Any) -> None:
        self._token_refresh_period = timedelta(minutes=-1)
        read(self)

    monkeypatch.setattr(loader, "_read_token_file", read_old)


@pytest.mark.usefixtures("soon_old")
def test_a_token_of_a_service_account_that_was_renewed_is_read_anew(account: Path) -> None:
    """Kubelets renew them in place; the old one is good for a while."""
    found = loaded()
    (account / "token").write_text("sa-2")
    assert found.headers()["Authorization"].lower() == "bearer sa-2"


@pytest.mark.usefixtures("soon_old")
def test_a_token_that_has_vanished_is_unavailability_and_no_crash(account: Path) -> None:
    found = loaded()
    (account / "token").unlink()
    with pytest.raises(BackendUnavailableError, match="cannot be renewed"):
        found.headers()


def test_plain_http_needs_no_certificates(tmp_path: Path) -> None:
    assert loaded(kubeconfig(tmp_path / "k", "http://127.0.0.1:8001")).ssl_context is None


def test_a_certificate_may_be_left_unchecked_by_whoever_says_so(tmp_path: Path) -> None:
    unchecked: dict[str, Any] = {"insecure-skip-tls-verify": True}
    context = loaded(kubeconfig(tmp_path / "k", SERVER, **unchecked)).ssl_context
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)


@pytest.fixture
def secure_server(tmp_path: Path) -> Iterator[str]:
    """It wants a certificate of its clients; their authority is in ``ca.pem`` of ``tmp_path``."""
    if shutil.which("openssl") is None:
        pytest.skip("certificates are made with openssl, which is not installed")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"answer": 1}')

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    server.socket = certificates(tmp_path).wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_client_certificate_opens_both_ways(secure_server: str, tmp_path: Path) -> None:
    user = {"client-certificate": str(tmp_path / "cert.pem"), "client-key": str(tmp_path / "key.pem")}
    path = kubeconfig(tmp_path / "k", secure_server, user=user, **{"certificate-authority": str(tmp_path / "ca.pem")})
    cluster = Cluster(Address(kubeconfig=path))
    assert cluster.ask("GET", "/version", "asking").document == {"answer": 1}
    context = cluster.credentials.ssl_context
    assert context is not None
    host, port = secure_server.removeprefix("https://").split(":")
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=10)
    connection.request("GET", "/")
    assert connection.getresponse().read() == b'{"answer": 1}'
    connection.close()
    cluster.log_in_again(cluster.known_credentials)


def test_an_authority_that_is_not_the_servers_is_said(secure_server: str, tmp_path: Path) -> None:
    cluster = Cluster(Address(kubeconfig=kubeconfig(tmp_path / "k", secure_server)), sleep=lambda _: None)
    with pytest.raises(BackendUnavailableError, match="check the certificate authority and the server name in the kubeconfig"):
        cluster.ask("GET", "/version", "asking")
