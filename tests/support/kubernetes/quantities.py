"""Kubernetes quantities ("250m", "2Gi") as numbers. https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/"""

from __future__ import annotations

import math
import re
from decimal import Decimal

_FORM = re.compile(r"^([+-]?[0-9]+(?:\.[0-9]*)?|[+-]?\.[0-9]+)(m|u|n|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?[0-9]+)?$")
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}


def quantity(text: object) -> Decimal:
    """Its value in units. Raises ValueError."""
    match = _FORM.match(str(text))
    if match is None or isinstance(text, bool):
        raise ValueError("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")
    number, suffix = Decimal(match[1]), match[2] or ""
    if suffix in _BINARY:
        return number * Decimal(1024) ** _BINARY[suffix]
    if suffix in _DECIMAL:
        return number.scaleb(_DECIMAL[suffix])
    return number.scaleb(int(suffix[1:]))


def whole(text: object) -> int:
    """Rounded up, as bytes and counts are."""
    return math.ceil(quantity(text))


def shown(resource: str, value: Decimal) -> str:
    """As the real one prints a sum: CPU in milli-units, memory in the largest binary unit that fits, counts plain."""
    if resource.endswith("cpu"):
        return str(int(value)) if value == int(value) else f"{int(value * 1000)}m"
    if resource.endswith(("memory", "storage")):
        for suffix, power in reversed(_BINARY.items()):
            if value and value % 1024**power == 0:
                return f"{int(value / 1024**power)}{suffix}"
    return str(int(value))
