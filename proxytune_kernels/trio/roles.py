"""The roles of a trio, and what a caller says for all of them or for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROLES = ("base", "expert", "anti")
PAIR = ROLES[1:]
"""The small models."""


def check_roles(given: Mapping[str, Any]) -> None:
    """Check that there is a base, and both of the pair or neither."""
    if "base" not in given:
        raise ValueError("base must be a model, got None")
    if ("expert" in given) != ("anti" in given):
        missing = "anti" if "expert" in given else "expert"
        raise ValueError(f"{missing} must be given with the other of the pair, got None")


def check_known(name: str, values: Mapping[str, Any]) -> None:
    """Check that the keys of a mapping are roles."""
    unknown = sorted(set(values) - set(ROLES))
    if unknown:
        raise ValueError(f"{name} must have keys among {', '.join(ROLES)}, got {unknown[0]!r}")


def per_role(name: str, value: Any, role: str) -> Any:
    """What ``value`` says for a role: itself, or its entry if it is a mapping."""
    if not isinstance(value, Mapping):
        return value
    check_known(name, value)
    if role not in value:
        raise ValueError(f"{name} must have an entry for {role}, got {', '.join(value)}")
    return value[role]
