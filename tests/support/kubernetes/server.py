"""The API server: from an HTTP request to an answer."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

from aiohttp import web

from tests.support.kubernetes import discovery, objects, schema
from tests.support.kubernetes.addresses import Address, address_of
from tests.support.kubernetes.authorization import Attributes, User, access_review, check, rules_review
from tests.support.kubernetes.cluster import Cluster
from tests.support.kubernetes.deletion import delete
from tests.support.kubernetes.exec_stream import ExecStream, failure, new_socket
from tests.support.kubernetes.faults import Fault, cut, reset
from tests.support.kubernetes.kinds import NAMESPACES, PODS, Kind, kind_of
from tests.support.kubernetes.lists import Lists
from tests.support.kubernetes.pod_worker import HOST_ADDRESS
from tests.support.kubernetes.problems import ApiError, bad_request, no_such_path, unavailable
from tests.support.kubernetes.selection import Test, field_test, label_test
from tests.support.kubernetes.watches import Watch

Json = dict[str, Any]
_PATCHES = ("application/merge-patch+json", "application/strategic-merge-patch+json")
_MAX_BODY_BYTES = 3 << 20


class ApiServer:
    """Handles requests; what is connected for long is known, so that it can be cut."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._lists = Lists(cluster.store, cluster.knobs)
        self.requests: Counter[str] = Counter()
        self.unknown: list[str] = []
        self.watches: list[Watch] = []
        self.execs: list[tuple[str, web.Request]] = []
        self.connections: set[asyncio.Transport] = set()
        #: For the next exec: see ExecStream.
        self.cut_after_frames = 0

    def application(self) -> web.Application:
        """To be served anew after each restart."""
        application = web.Application(client_max_size=_MAX_BODY_BYTES)
        application.router.add_route("*", "/{path:.*}", self.handle)
        return application

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request."""
        self._remember(request.transport)
        await self._cluster.faults.thawed.wait()
        address = address_of(request.method, request.path, request.query)
        try:
            user = self._cluster.users.by_header(request.headers.get("Authorization", ""))
            self.requests[_label(address)] += 1
            fault = self._cluster.faults.take(address)
            if fault is not None:
                await self._cluster.faults.before(fault, request)
            check(user, address.attributes)
            answer = await self._answer(request, address, user)
            if fault is not None:
                self._lose(fault, request)
            return answer
        except ApiError as error:
            return web.json_response(error.body, status=error.code, headers=error.headers)
        except ValueError as error:
            return web.json_response(bad_request(str(error)).body, status=400)

    def _remember(self, transport: asyncio.Transport | None) -> None:
        if transport is not None and transport not in self.connections:
            self.connections = {t for t in self.connections if not t.is_closing()} | {transport}

    def _lose(self, fault: Fault, request: web.Request) -> None:
        if fault.kind == "lost_reply":
            cut(request)

    async def _answer(self, request: web.Request, address: Address, user: User) -> web.StreamResponse:
        if not address.resource:
            return self._plain(request, address)
        kind = kind_of(address.group, address.version, address.resource)
        if address.group == "authorization.k8s.io" and address.verb == "create":
            return await self._review(request, address, user)
        if kind is None or (kind.namespaced and not address.namespace and address.verb not in ("list", "watch")):
            raise self._not_here(request)
        if address.subresource:
            return await self._subresource(request, address, user, kind)
        if address.verb == "watch":
            return await self._watch(request, address, kind)
        return await self._rest(request, address, kind)

    def _plain(self, request: web.Request, address: Address) -> web.StreamResponse:
        if address.path.rstrip("/") in ("/readyz", "/livez", "/healthz"):
            return web.Response(text="ok")
        body = discovery.document(address.path)
        if body is None or request.method != "GET":
            raise self._not_here(request)
        return web.json_response(body)

    def _not_here(self, request: web.Request) -> ApiError:
        self.unknown.append(f"{request.method} {request.path_qs}")
        return no_such_path()

    async def _review(self, request: web.Request, address: Address, user: User) -> web.StreamResponse:
        body = await _body(request)
        if address.resource == "selfsubjectaccessreviews":
            body["status"] = access_review(user, body)
        elif address.resource == "selfsubjectrulesreviews":
            body["status"] = rules_review(user, (body.get("spec") or {}).get("namespace", ""))
        else:
            raise self._not_here(request)
        kind = {"selfsubjectaccessreviews": "SelfSubjectAccessReview"}.get(address.resource, "SelfSubjectRulesReview")
        return web.json_response({"metadata": {}, **body, "kind": kind, "apiVersion": "authorization.k8s.io/v1"}, status=201)

    async def _rest(self, request: web.Request, address: Address, kind: Kind) -> web.StreamResponse:
        store, namespace = self._cluster.store, address.namespace if kind.namespaced else ""
        dry = request.query.get("dryRun") == "All"
        if address.verb == "get":
            return web.json_response(_as_wanted(request, store.get(kind, namespace, address.name)))
        if address.verb == "list":
            return self._list(request, kind, namespace)
        if address.verb == "create":
            body, warnings = self._strict(request, kind, await _body(request))
            made = objects.create(store, kind, namespace, body, dry_run=dry)
            return web.json_response(made, status=201, headers=_warned(warnings))
        if address.verb == "patch" and kind.patchable:
            if request.content_type not in _PATCHES:
                raise ApiError(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {', '.join(_PATCHES)}")
            body = await _body(request)
            if request.content_type == _PATCHES[1] and _has_list(body):
                self.unknown.append(f"{request.method} {request.path_qs}")
                raise bad_request("this stand-in merges no lists: send a merge patch")
            return web.json_response(objects.patch(store, kind, namespace, address.name, body, dry_run=dry))
        if address.verb == "delete":
            return await self._delete(request, address, kind, namespace)
        if kind is NAMESPACES or address.verb in ("patch", "update", "deletecollection"):
            self.unknown.append(f"{request.method} {request.path_qs}")
        raise ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource", {})

    def _strict(self, request: web.Request, kind: Kind, body: Json) -> tuple[Json, list[str]]:
        cleaned, warnings = schema.cleaned(kind.resource, body)
        if warnings and request.query.get("fieldValidation") == "Strict":
            raise bad_request(f"strict decoding error: {', '.join(warnings)}")
        return cleaned, warnings

    def _list(self, request: web.Request, kind: Kind, namespace: str) -> web.StreamResponse:
        query = request.query
        selective = bool(query.get("labelSelector") or query.get("fieldSelector"))
        limit = 0 if query.get("resourceVersion") == "0" else int(query.get("limit", "0") or "0")
        test = _test(kind, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        items, metadata = self._lists.page(kind, namespace, test, limit, query.get("continue", ""), selective=selective)
        if _partial(request):
            head = {"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1"}
            return web.json_response({**head, "metadata": metadata, "items": [_metadata_of(i) for i in items]})
        bare = [{k: v for k, v in item.items() if k not in ("kind", "apiVersion")} for item in items]
        return web.json_response({"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": metadata, "items": bare})

    async def _delete(self, request: web.Request, address: Address, kind: Kind, namespace: str) -> web.StreamResponse:
        """With a body the query counts for nothing."""
        options: Json
        if request.can_read_body and (text := await request.text()):
            options = schema.delete_options(json.loads(text))
        else:
            options = {k: v for k, v in request.query.items() if k in ("propagationPolicy",)}
            if "gracePeriodSeconds" in request.query:
                options["gracePeriodSeconds"] = int(request.query["gracePeriodSeconds"])
        item, gone = delete(self._cluster.store, kind, namespace, address.name, options)
        if not gone or kind is PODS:
            return web.json_response(item)
        details = {"name": address.name, "group": kind.group, "kind": kind.resource, "uid": item["metadata"]["uid"]}
        details = {k: v for k, v in details.items() if v}
        return web.json_response({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})

    async def _watch(self, request: web.Request, address: Address, kind: Kind) -> web.StreamResponse:
        query = request.query
        fields = query.get("fieldSelector", "") + (f",metadata.name={address.name}" if address.name else "")
        test = _test(kind, query.get("labelSelector", ""), fields)
        timeout_s = float(query.get("timeoutSeconds") or random.uniform(1800, 3600))
        bookmarks = query.get("allowWatchBookmarks", "").lower() in ("1", "t", "true")
        pause_s = self._cluster.knobs.bookmark_s if bookmarks else 0
        namespace = address.namespace if kind.namespaced else ""
        watch = Watch(self._cluster.store, kind, namespace, test, query.get("resourceVersion", ""), pause_s)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        self.watches.append(watch)
        try:
            await response.prepare(request)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._feed(request, response, watch)
            except TimeoutError:
                if bookmarks:
                    await self._send(request, response, watch.bookmark())
            await response.write_eof()
        finally:
            self.watches.remove(watch)
            watch.close()
        return response

    async def _feed(self, request: web.Request, response: web.StreamResponse, watch: Watch) -> None:
        async for event in watch.events():
            await self._send(request, response, event)

    async def _send(self, request: web.Request, response: web.StreamResponse, event: Json) -> None:
        await self._cluster.faults.thawed.wait()
        if _partial(request) and event["type"] not in ("ERROR", "BOOKMARK"):
            event = {**event, "object": _metadata_of(event["object"])}
        await response.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")

    async def _subresource(self, request: web.Request, address: Address, user: User, kind: Kind) -> web.StreamResponse:
        if kind is PODS and address.subresource == "log" and address.verb == "get":
            return self._log(request, address)
        if kind is PODS and address.subresource == "exec" and address.verb in ("get", "create"):
            return await self._exec(request, address, user)
        raise self._not_here(request)

    def _log(self, request: web.Request, address: Address) -> web.StreamResponse:
        pod = self._cluster.store.get(PODS, address.namespace, address.name)
        container = _container(pod, request.query.get("container", ""))
        worker = self._cluster.kubelet.worker(address.namespace, address.name)
        if worker is None or worker.container(container) is None:
            raise bad_request(f'container "{container}" in pod "{address.name}" is waiting to start: ContainerCreating')
        if worker.lost:
            raise unavailable(_no_route())
        lines, limit = request.query.get("tailLines"), request.query.get("limitBytes")
        text = worker.logs[container].text(tail_lines=int(lines) if lines else None, limit_bytes=int(limit) if limit else None)
        return web.Response(body=text, content_type="text/plain")

    async def _exec(self, request: web.Request, address: Address, user: User) -> web.StreamResponse:
        """WebSocket upgrades need ``create`` besides the ``get`` of their method, since 1.35."""
        check(user, Attributes(verb="create", resource="pods", subresource="exec", namespace=address.namespace, name=address.name))
        pod = self._cluster.store.get(PODS, address.namespace, address.name)
        container = _container(pod, request.query.get("container", ""))
        if not pod["spec"].get("nodeName"):
            raise bad_request(f"pod {address.name} does not have a host assigned")
        command = request.query.getall("command", [])
        wanted = {name: request.query.get(name, "").lower() in ("1", "t", "true") for name in ("stdin", "stdout", "stderr")}
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise bad_request("Upgrade request required")
        if not any(wanted.values()) or not command:
            return web.Response(status=400, text="you must specify at least 1 of stdin, stdout, stderr")
        if request.query.get("tty", "").lower() in ("1", "t", "true"):
            self.unknown.append(f"{request.method} {request.path_qs}")
            raise bad_request("this stand-in has no terminals")
        return await self._stream(request, address, container, command, wanted)

    async def _stream(
        self, request: web.Request, address: Address, container: str, command: list[str], wanted: dict[str, bool]
    ) -> web.StreamResponse:
        knobs = self._cluster.knobs
        offered = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if p.strip()]
        if not any(p in knobs.protocols for p in offered):
            return web.Response(status=403)
        worker = self._cluster.kubelet.worker(address.namespace, address.name)
        if worker is not None and worker.lost:
            raise ApiError(500, "", f"error dialing backend: {_no_route()}")
        process = worker.container(container) if worker is not None else None
        words = f'container not found ("{container}")' if process is None else ""
        if process is not None and process.status.done():
            words = "rpc error: code = Unknown desc = failed to exec in container: container is in CONTAINER_EXITED state"
        by_frame = words and not knobs.kubelet_websockets and offered[0].startswith("v5")
        if words and not by_frame:
            return web.Response(status=500, text=words)
        socket = new_socket(knobs.protocols)
        await socket.prepare(request)
        stream = ExecStream(socket, wanted, self._thawed, lambda: reset(request))
        stream.cut_after_frames, self.cut_after_frames = self.cut_after_frames, 0
        entry = (address.name, request)
        self.execs.append(entry)
        try:
            if by_frame:
                await stream.finish(failure(f"unable to upgrade connection: {words}"))
            else:
                assert process is not None
                await stream.connected()
                await stream.run(self._cluster.runtime, process, command)
        except ConnectionError:
            pass
        finally:
            self.execs.remove(entry)
        return socket

    async def _thawed(self) -> None:
        await self._cluster.faults.thawed.wait()

    def cut_execs(self, pod: str = "") -> int:
        """No status frame, no close: as when a load balancer or an API server goes away. Returns how many."""
        cut_ones = [request for name, request in self.execs if pod in ("", name)]
        for request in cut_ones:
            reset(request)
        return len(cut_ones)

    def freeze(self) -> None:
        """Nothing is read from any connection, so that not even a ping is answered."""
        self._cluster.faults.thawed.clear()
        for transport in self.connections:
            if not transport.is_closing():
                transport.pause_reading()

    def thaw(self) -> None:
        """It goes on where it was."""
        self._cluster.faults.thawed.set()
        for transport in self.connections:
            if not transport.is_closing():
                transport.resume_reading()

    def drop_watches(self) -> int:
        """Ends them as a timeout does."""
        for watch in list(self.watches):
            watch.close()
        return len(self.watches)


def _has_list(body: Any) -> bool:
    return isinstance(body, list) or (isinstance(body, dict) and any(_has_list(value) for value in body.values()))


def _no_route() -> str:
    return f"dial tcp {HOST_ADDRESS}:10250: connect: no route to host"


def _label(address: Address) -> str:
    what = address.attributes.full_resource or address.path
    return f"{address.verb} {what}"


async def _body(request: web.Request) -> Json:
    try:
        body = json.loads(await request.text())
    except ValueError as error:
        raise bad_request(f"couldn't get version/kind; json parse error: {error}") from None
    if not isinstance(body, dict):
        raise bad_request("couldn't get version/kind; json parse error: json: cannot unmarshal into Go value")
    return body


def _warned(warnings: list[str]) -> dict[str, str]:
    return {"Warning": ", ".join(f'299 - "{w}"'.replace('""', '"') for w in warnings)} if warnings else {}


def _test(kind: Kind, labels: str, fields: str) -> Test:
    by_label, by_field = label_test(labels), field_test(kind.resource, fields)
    return lambda item: by_label(item) and by_field(item)


def _partial(request: web.Request) -> bool:
    return "as=PartialObjectMetadata" in request.headers.get("Accept", "").partition(",")[0]


def _metadata_of(item: Json) -> Json:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]}


def _as_wanted(request: web.Request, item: Json) -> Json:
    return _metadata_of(item) if _partial(request) else item


def _container(pod: Json, name: str) -> str:
    """Raises ApiError 400."""
    everyone = [c["name"] for c in (*pod["spec"]["containers"], *(pod["spec"].get("initContainers") or []))]
    if name and name not in everyone:
        raise bad_request(f"container {name} is not valid for pod {pod['metadata']['name']}")
    if name or len(pod["spec"]["containers"]) == 1:
        return str(name or everyone[0])
    choices = ", ".join(c["name"] for c in pod["spec"]["containers"])
    raise bad_request(f"a container name must be specified for pod {pod['metadata']['name']}, choose one of: [{choices}]")
