"""Who may reach whom by the NetworkPolicies among some documents, as a CNI that enforces them decides.

https://kubernetes.io/docs/concepts/services-networking/network-policies/: a Pod that no policy of a direction selects is open in that
direction; else what any of them allows is allowed. Both ends must allow a connection.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.manifests import Document, of_kind


@dataclass(frozen=True, kw_only=True)
class End:
    """A Pod (labels and namespace), or something outside the cluster's Pods (address)."""

    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = ""


def reaches(
    documents: tuple[Document, ...],
    source: End,
    target: End,
    port: int | str,
    protocol: str = "TCP",
    *,
    namespaces: Mapping[str, Mapping[str, str]] = {},  # it is read only
) -> bool:
    """Whether a connection from ``source`` to ``target`` is let through. ``namespaces``: labels of those that have more than their name."""

    def allowed(end: End, peer: End, direction: str) -> bool:
        if end.address:
            return True
        there = [p for p in of_kind(documents, "NetworkPolicy") if _selects(p, end) and direction in p["spec"]["policyTypes"]]
        rules = [rule for policy in there for rule in policy["spec"].get(direction.lower()) or []]
        key = "from" if direction == "Ingress" else "to"
        return not there or any(
            _has_port(rule, port, protocol) and any(_is(peer, p, end.namespace, namespaces) for p in rule[key]) for rule in rules
        )

    return allowed(source, target, "Egress") and allowed(target, source, "Ingress")


def _selects(policy: Document, end: End) -> bool:
    return policy["metadata"]["namespace"] == end.namespace and fits(policy["spec"]["podSelector"], end.labels)


def fits(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels; an empty one takes all."""
    exact = all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items())
    return exact and all(_expressed(each, labels) for each in selector.get("matchExpressions") or [])


def _expressed(each: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value = labels.get(each["key"])
    return {
        "In": value in each.get("values", []),
        "NotIn": value not in each.get("values", []),
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[each["operator"]]


def _has_port(rule: Mapping[str, Any], port: int | str, protocol: str) -> bool:
    ports: Sequence[Mapping[str, Any]] | None = rule.get("ports")
    return ports is None or any((p.get("port", port), p.get("protocol", "TCP")) == (port, protocol) for p in ports)


def _is(end: End, peer: Mapping[str, Any], here: str, namespaces: Mapping[str, Mapping[str, str]]) -> bool:
    if "ipBlock" in peer:
        return bool(end.address) and _within(end.address, peer["ipBlock"])
    if end.address:
        return False
    of_namespace = {"kubernetes.io/metadata.name": end.namespace, **namespaces.get(end.namespace, {})}
    in_namespace = fits(peer["namespaceSelector"], of_namespace) if "namespaceSelector" in peer else end.namespace == here
    return in_namespace and fits(peer.get("podSelector") or {}, end.labels)


def _within(address: str, block: Mapping[str, Any]) -> bool:
    ip = ipaddress.ip_address(address)
    return ip in ipaddress.ip_network(block["cidr"]) and not any(ip in ipaddress.ip_network(each) for each in block.get("except") or [])
