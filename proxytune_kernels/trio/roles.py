"""The roles of a trio, and what a caller says for all of them or for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_
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


def kind_of(role: str) -> str:
    """Expert or anti of a further pair's role, such as ``"expert_2"``; others are their own."""
    return role.partition("_")[0]


def pair_roles(
    known: Mapping[str, Any], pairs: Any, same: Callable[[Any, Any], bool] = is_
) -> tuple[tuple[tuple[str, str], ...], dict[str, Any]]:
    """The roles of each further pair, and by role those of its members that are not known yet.

    Args:
        known: role -> member, of the base and the first pair.
        pairs: (expert, anti) of each further pair.
        same: whether two members are one, which then has one role.

    Raises:
        ValueError: pairs without a first one, or what is no pair.
    """
    members, named = dict(known), []
    for number, pair in enumerate(pairs, 2):
        if "expert" not in known:
            raise ValueError("pairs must come behind expert and anti, got a base alone")
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or None in pair:
            raise ValueError(
                f"pairs must be (expert, anti) for each further pair, got {pair!r:.80}"
            )
        roles = []
        for kind, member in zip(PAIR, pair, strict=True):
            found = (r for r, m in members.items() if kind_of(r) == kind and same(m, member))
            roles.append(next(found, f"{kind}_{number}"))
            members.setdefault(roles[-1], member)
        named.append((roles[0], roles[1]))
    return tuple(named), {role: m for role, m in members.items() if role not in known}


def per_role(name: str, value: Any, role: str) -> Any:
    """What ``value`` says for a role: itself, or its entry if it is a mapping."""
    if not isinstance(value, Mapping):
        return value
    check_known(name, value)
    if role not in value:
        raise ValueError(f"{name} must have an entry for {role}, got {', '.join(value)}")
    return value[role]
