"""The Kubernetes backend: each sandbox is a Job, in whose Pod the runner is PID 1.

Everything that is known of a sandbox is in its Job (names.py), so that any process with rights in the namespace can go on with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cifixer_exec.backends.base import Backend, Owned
from cifixer_exec.backends.breaker import BreakerState
from cifixer_exec.backends.kubernetes import death, rights
from cifixer_exec.backends.kubernetes.cluster import METADATA_ONLY, Answer, Cluster, cluster_at
from cifixer_exec.backends.kubernetes.credentials import Address
from cifixer_exec.backends.kubernetes.job import BRIDGE, CONTAINER, KubernetesOptions, check_image, manifest
from cifixer_exec.backends.kubernetes.jobs import Jobs, is_over
from cifixer_exec.backends.kubernetes.names import CREATED_AT, EXPIRES_AT, SANDBOX_ID, Names, annotations_of, runner_token
from cifixer_exec.backends.kubernetes.objects import is_going, owner_of, status_of, uid_of
from cifixer_exec.backends.kubernetes.refusals import RefusedError, translate
from cifixer_exec.backends.kubernetes.stream import DIAL_TIMEOUT_S, ExecEndedError, exec_in
from cifixer_exec.backends.kubernetes.upload import open_channel
from cifixer_exec.backends.readings import number, unix_time
from cifixer_exec.backends.threads import asking
from cifixer_exec.channel.transport import Dial, Transport
from cifixer_exec.errors import BackendUnavailableError, ExecutorError, SandboxLostError
from cifixer_exec.model import Capabilities, Health, Inspection, SandboxHandle, SandboxSpec, check_id

#: In a handle's data.
JOB_UID, POD, POD_UID, CLUSTER = "job_uid", "pod", "pod_uid", "cluster"


#: Of a change that others' changes get in the way of.
_TRIES = 3


class KubernetesBackend(Backend):
    """See the module. ``namespace``: what is labelled with it is ours to reap. ``cluster_name``: for one Redis with several clusters."""

    name = "kubernetes"

    def __init__(
        self,
        *,
        address: Address,
        namespace: str,
        cluster_name: str = "",
        options: KubernetesOptions | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._address = address
        self._names = Names(namespace)
        self._cluster_name = cluster_name
        self._options = options or KubernetesOptions()
        self._clock = clock

    @property
    def placement(self) -> str:
        """The namespace of the cluster. Raises BackendUnavailableError when there are no credentials."""
        return ".".join(part for part in (self._cluster_name, self._cluster.namespace) if part)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            images=True,
            memory=True,
            cpus=True,
            disk=self._options.disk == "memory" and not self._options.volume_claim,
            max_processes=True,
            networks=self._options.networks,
        )

    @property
    def breaker_state(self) -> BreakerState:
        return self._cluster.breaker.state

    def remedy_for(self, name: str) -> str:
        if name == "readonly_paths":
            return "the nodes are other machines; put what is needed into the image, or upload it"
        if name == "disk_bytes":
            return "leave it out: with CIFIXER_KUBERNETES_DISK=node or a volume claim the size of the disk is not limited exactly"
        return super().remedy_for(name)

    def probe(self) -> Health:
        """Asks for our rights and for a Job that is checked and not made (``dryRun``); no Pod is started."""
        details: dict[str, str] = {}
        try:
            cluster = self._cluster
            details |= {"server": cluster.credentials.host, "placement": self.placement, "networks": ", ".join(self._options.networks)}
            if self._options.networks == ("cluster",):
                details["network policies"] = "nobody says that there are any: sandboxes reach whatever the cluster lets them"
                details["network policies_remedy"] = "kubectl apply -k k8s/sandboxes, and set CIFIXER_KUBERNETES_NETWORK_POLICIES=true"
            if not self._options.runner_image:
                details["runner image"] = "none: the runner is uploaded into each Pod, where commands could replace it"
                details["runner image_remedy"] = "set CIFIXER_KUBERNETES_RUNNER_IMAGE to an image that has it at /runner"
            if lacking := rights.missing(cluster):
                mend = "kubectl apply -f k8s/rbac/k8s.yaml"
                summary = f"the Kubernetes API does not let us: {', '.join(lacking)} in namespace {cluster.namespace!r}"
                return Health(ok=False, summary=summary, remedy=mend, details=details)
            self._try_out()
        except ExecutorError as error:
            return Health(ok=False, summary=str(error), remedy=error.code, details=details)
        return Health(
            ok=True,
            summary="the Kubernetes API takes the Jobs of sandboxes; none was started, so image, quota and Pod Security were not tried",
            details=details,
        )

    def _try_out(self) -> None:
        spec = SandboxSpec(backend=self.name, sandbox_id="probe", lifetime_s=60)
        self._jobs.post(self._manifest(spec), dry_run=True)

    def create(self, spec: SandboxSpec) -> SandboxHandle:
        self.check(spec)
        check_id(spec.sandbox_id, "sandbox id")
        check_image(spec.image or self._options.image)
        job_uid, pod = self._jobs.make(spec.sandbox_id, lambda: self._manifest(spec))
        data = {JOB_UID: job_uid, POD: pod["metadata"]["name"], POD_UID: uid_of(pod)}
        return self._handle(spec.sandbox_id, data)

    def _manifest(self, spec: SandboxSpec) -> dict[str, Any]:
        return manifest(spec, names=self._names, placement=self.placement, options=self._options, now_s=self._clock())

    def token(self, handle: SandboxHandle) -> str:
        return runner_token(str(handle.data[JOB_UID])) if JOB_UID in handle.data else ""

    def dial(self, handle: SandboxHandle) -> Dial:
        cluster = self._cluster

        async def dial() -> Transport:
            if cluster.breaker.state is not BreakerState.CLOSED:
                await asking(cluster.breaker.check)
            pod = str(handle.data.get(POD, "")) or await asking(self._pod_name, handle)
            for attempt in (1, 2):
                refused = cluster.known_credentials
                try:
                    if self._options.runner_image:
                        return await exec_in(cluster, pod=pod, container=CONTAINER, command=BRIDGE)
                    return await open_channel(cluster, pod)
                except RefusedError as error:
                    if error.code != 401 or attempt > 1:
                        raise await self._no_exec(handle, error) from None
                    await asking(cluster.log_in_again, refused)
                except TimeoutError:
                    # One sandbox whose execs hang must not open the breaker for all others.
                    await asking(cluster.breaker.look)
                    raise BackendUnavailableError(f"the Kubernetes API has not opened a channel within {DIAL_TIMEOUT_S:g} s") from None
                except ExecEndedError:
                    raise
                except OSError as error:
                    cluster.breaker.heard(error)
                    raise
            raise AssertionError  # the second attempt returns or raises

        return dial

    def _pod_name(self, handle: SandboxHandle) -> str:
        pod = self._pod(handle)
        if pod is None:
            raise ConnectionError("its Pod is not there")
        return str(pod["metadata"]["name"])

    def _pod(self, handle: SandboxHandle) -> dict[str, Any] | None:
        """Handles from a listing know their Job alone."""
        if POD in handle.data:
            return self._jobs.pod(str(handle.data[POD]), str(handle.data[POD_UID]))
        return next(iter(self._jobs.pods(handle.sandbox_id, str(handle.data.get(JOB_UID, "")))), None)

    async def _no_exec(self, handle: SandboxHandle, error: RefusedError) -> Exception:
        """What a refused exec means for the sandbox: gone, out of reach for now, or not ours to reach."""
        if error.code == 403 and (lacking := await asking(rights.missing, self._cluster, rights.EXEC)):
            mend = "kubectl apply -f k8s/rbac/k8s.yaml"
            return BackendUnavailableError(f"the Kubernetes API does not let us {' and '.join(lacking)}: {mend}", mend)
        if error.code in (401, 403, 429):
            return translate(error, "the exec that is the channel to the sandbox")
        if error.code >= 500 and (await asking(self.inspect, handle)).alive:
            # Its node, or the way to it, does not answer. A living sandbox must not be taken for lost, and removed, for that.
            return BackendUnavailableError(f"the API server does not reach the sandbox's node: {error}")
        return ConnectionError(str(error))

    def destroy(self, handle: SandboxHandle) -> None:
        self._check_cluster(handle)
        job_uid = str(handle.data.get(JOB_UID, ""))
        self._jobs.remove(handle.sandbox_id, job_uid=job_uid, pod_uid="" if job_uid else str(handle.data.get(POD_UID, "")))

    def _check_cluster(self, handle: SandboxHandle) -> None:
        """Two clusters under one Redis could have the same name of placement: what one does not find must not be lost for the other."""
        there = handle.data.get(CLUSTER, self._fingerprint)
        if there != self._fingerprint:
            raise BackendUnavailableError(
                f"sandbox {handle.sandbox_id!r} is in another cluster that has the same placement {self.placement!r}: "
                "give each a name of its own by CIFIXER_KUBERNETES_CLUSTER, at its workers and clients"
            )

    @property
    def _fingerprint(self) -> str:
        return f"named {self._cluster_name}" if self._cluster_name else self._cluster.credentials.fingerprint

    def inspect(self, handle: SandboxHandle) -> Inspection:
        self._check_cluster(handle)
        job, pod = self._jobs.find(handle.sandbox_id), self._pod(handle)
        if job is not None and uid_of(job) != handle.data.get(JOB_UID, uid_of(job)):
            job = None  # another one of its name
        found = death.inspected(job, pod)
        if found is not None:
            return found
        pod_uid = str(handle.data.get(POD_UID, "")) or (uid_of(pod) if pod is not None else "")
        return Inspection(alive=False, cause=death.from_events(self._cluster, pod_uid, pod))

    def extend(self, handle: SandboxHandle, expires_at_s: float) -> None:
        """The Job's deadline counts from its start by the API server's clock, so that ours does not matter."""
        for _ in range(_TRIES):
            answer = self._jobs.ask(handle.sandbox_id)
            uid = uid_of(answer.document) if answer is not None else ""
            if answer is None or is_over(answer.document) or uid != handle.data.get(JOB_UID, uid):
                raise SandboxLostError(f"the Job of sandbox {handle.sandbox_id!r} is gone, so its lifetime cannot be moved")
            if self._jobs.patch(handle.sandbox_id, self._deadline(answer, expires_at_s)) is not None:
                return
        raise BackendUnavailableError(f"the Job of sandbox {handle.sandbox_id!r} is changed by others all the time: try again")

    def _deadline(self, answer: Answer, expires_at_s: float) -> dict[str, Any]:
        """The changes of a Job, of this very one."""
        metadata = answer.document["metadata"]
        began_s = unix_time(str(status_of(answer.document).get("startTime") or metadata["creationTimestamp"]))
        deadline_s = max(1, math.ceil(answer.at_s - began_s + expires_at_s - self._clock()))
        return {
            "metadata": {"uid": metadata["uid"], "annotations": {EXPIRES_AT: f"{expires_at_s:.3f}"}},
            "spec": {"activeDeadlineSeconds": deadline_s},
        }

    def list_owned(self) -> Iterable[Owned]:
        """By pages, as they are wanted."""
        jobs: set[str] = set()
        for page in self._cluster.pages(self._cluster.path("jobs"), "listing its Jobs", selector=self._names.selector()):
            for job in page:
                jobs.add(uid_of(job))
                yield from self._owned(job, {JOB_UID: uid_of(job)}, alive=not is_over(job) or None)
        for page in self._cluster.pages(
            self._cluster.path("pods"), "listing its Pods", selector=self._names.selector(), accept=METADATA_ONLY
        ):
            for pod in page:
                if owner_of(pod) not in jobs and not is_going(pod):
                    # Its Job was deleted without it.
                    yield from self._owned(pod, {POD: pod["metadata"]["name"], POD_UID: uid_of(pod)}, alive=None)

    def _owned(self, found: dict[str, Any], data: dict[str, str], *, alive: bool | None) -> Iterator[Owned]:
        told = annotations_of(found)
        if SANDBOX_ID not in told or not self._names.has(found, told[SANDBOX_ID]):
            return  # labelled by somebody who is not us
        created_s = number(told.get(CREATED_AT), unix_time(str(found["metadata"]["creationTimestamp"])))
        expires_s = number(told.get(EXPIRES_AT), created_s)
        handle = self._handle(told[SANDBOX_ID], data)
        yield Owned(handle=handle, created_at_s=created_s, expires_at_s=expires_s, alive=alive)

    def _handle(self, sandbox_id: str, data: dict[str, str]) -> SandboxHandle:
        data = {**data, CLUSTER: self._fingerprint}
        return SandboxHandle(backend=self.name, sandbox_id=sandbox_id, placement=self.placement, data=data)

    @property
    def _cluster(self) -> Cluster:
        return cluster_at(self._address)

    @property
    def _jobs(self) -> Jobs:
        return Jobs(self._cluster, self._names, self._options)
