"""``pytest -p tests.ptx.plugin``: tests of the backend ``triton`` run its kernels' PTX.

They take the place of Triton's interpreter, with its sizes. The environment may say how:
``PTX_DEVICE="capability=80 seed=3 races=1"``.
"""

from __future__ import annotations

import os

from tests.ptx import build
from tests.ptx.device import Device
from tests.ptx.program import Order

_SETTINGS = {"capability": 90, "seed": 1, "in_flight": 3, "races": 0, "ulps": 0, "processors": 40}


def _device() -> Device:
    given = dict(one.split("=") for one in os.environ.get("PTX_DEVICE", "").split())
    if unknown := given.keys() - _SETTINGS.keys():
        raise ValueError(
            f"PTX_DEVICE: settings are {', '.join(_SETTINGS)}, got {', '.join(unknown)}"
        )
    s = _SETTINGS | {name: int(value) for name, value in given.items()}
    order = Order(s["seed"], s["in_flight"], bool(s["races"]), s["ulps"])
    return Device(s["capability"], order, s["processors"], poison=s["seed"])


if (reason := build.missing()) is not None:
    raise RuntimeError(reason)
_device().__enter__()
