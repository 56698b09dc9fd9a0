"""Is a missing barrier seen, or an atomic without order? ``python -m tests.ptx.mutate [KERNEL]``.

Leaves out each ``bar.sync`` of select, pivots or draw in turn, then makes each atomic a relaxed
one, then all of them. docs/ptx.md has what came out.
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import torch

import proxytune_kernels as ptk
from tests.ops import oracle
from tests.ptx.device import Device, Launched, Race
from tests.ptx.instructions import NUMBER
from tests.ptx.program import Fault, Order


def main(kernel: str = "select") -> None:
    made = oracle.random_rows(100, 12, 2085, torch.bfloat16)
    for i, deviation in enumerate((0.3, 0.5, 0.7)):
        made.base[i] = torch.randn(made.base.shape[1]) * deviation
    flat = dict(top_p=0.9, top_k=0, min_p=0.0, temperature=1.0)
    for name, value in flat.items():
        made.params[name][:3] = value
    made.base[3, 5] = torch.inf
    params = ptk.RowParams(**made.params)
    programs = {}

    def note(one: Launched) -> None:
        programs[one.name] = one.program

    with Device(90, Order(3, in_flight=2, races=True), processors=40, on_launch=[note]) as device:

        def run() -> dict[str, torch.Tensor]:
            device.launches = 0  # the same order again
            roles = made.base, made.expert, made.anti
            return oracle.tensors(ptk.sample(*roles, params, vocab_size=2085, backend="triton"))

        wanted = run()
        words = programs[kernel].words
        mutations = {"barrier": ("bar.sync", 0, NUMBER["nop"]), "atomic's order": ("atom", 3, 0)}
        for what, (instruction, word, value) in mutations.items():
            found: Counter[str] = Counter()
            places = np.nonzero(words[:, 0] == NUMBER[instruction])[0]
            everywhere = [places] if instruction == "atom" and len(places) else []
            for at in [*places, *everywhere]:
                before = words[at, word].copy()
                words[at, word] = value
                try:
                    got = run()
                    same = all(
                        torch.equal(oracle.bits(x), oracle.bits(wanted[n])) for n, x in got.items()
                    )
                    found["nothing: not reached, or not needed" if same else "other results"] += 1
                except Race:
                    found["a race"] += 1
                except Fault:
                    found["a fault"] += 1
                words[at, word] = before
            print(f"{kernel}: {found.total()} times without a {what}: {dict(found)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
