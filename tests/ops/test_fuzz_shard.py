"""The operators on shards with odd parts, values and parameters; and what no rank would send.

Run under AddressSanitizer and UBSan by `make asan`, as test_fuzz.py is.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels import rng
from proxytune_kernels.ops.sharded.candidates import first_keys
from proxytune_kernels.ops.table import Finished
from tests.ops import test_fuzz as fuzz
from tests.ops.conftest import KERNELS, Backend
from tests.ops.test_shard import good, same_draws

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KERNELS, reason="needs a kernel, only the reference runs here"),
]


@pytest.fixture(autouse=True, scope="module")
def widest_after():
    yield
    for kernel in KERNELS:  # the widest comes last
        kernel.use()


@st.composite
def parts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Bounds of the ranks' tokens, parts of one and of none among them."""
    inner = draw(st.lists(st.integers(0, size), max_size=4))
    return list(pairwise(sorted((0, *inner, size))))


def finished(
    kernel: Backend, x: Tensor, params: ptk.RowParams, bounds: list[tuple[int, int]], length: int
) -> Finished:
    own = [(a, x[:, a:b].contiguous()) for a, b in bounds]
    summaries = torch.stack([kernel.operator("shard_scan")(part) for _, part in own])
    words, lists = [], []
    for start, part in own:
        words.append(kernel.operator("shard_draw")(part, summaries, *params, None, None, start, 0))
        keys = kernel.operator("shard_keys")(part, summaries, start)
        lists.append(first_keys(keys, length))
    finish = kernel.operator("shard_finish")
    stacked = torch.stack(words), torch.stack(lists)
    return Finished(*finish(summaries, *stacked, *params, None, rng.STREAMS["sample"]))


@fuzz.each_kernel
@fuzz.few(7)
@given(st.data(), fuzz.choices, st.integers(1, 40))
def test_parts_draw_as_the_whole_row(name, data, choice, length):
    kernel = choice.put_to_work(name)
    case = data.draw(fuzz.cases())
    x = kernel.combine(**case.inputs(), alpha=case.params.alpha, **case.constraints)
    bounds = data.draw(parts(x.shape[-1]))
    found = finished(kernel, x, case.params, bounds, length)
    wanted = kernel.sample(x, params=case.params)
    decided = found.undecided == 0
    assert (found.token_ids[~decided] == -1).all()
    kept = Finished(*(column[decided] for column in found))
    same_draws(kept, ptk.SampleOutput(*(column[decided] for column in wanted[:-2])), kernel)
    # All candidates leave nothing open.
    found = finished(kernel, x, case.params, bounds, x.shape[-1])
    assert not found.undecided.any()
    same_draws(found, wanted, kernel)


def longs(generator: np.random.Generator, *shape: int) -> Tensor:
    """Words of any bits, small ones and keys among them."""
    words = generator.integers(-(2**63), 2**63 - 1, shape, np.int64, endpoint=True)
    words >>= generator.choice((0, 12, 44, 63), shape)
    return fuzz.fresh(words)


@fuzz.each_kernel
@fuzz.few(8)
@given(st.data(), fuzz.choices)
def test_words_that_no_rank_would_send(name, data, choice):
    """Nothing is read or written out of bounds, and no call hangs, whatever the exchange held."""
    kernel = choice.put_to_work(name)
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, size = data.draw(st.sampled_from((0, 1, 2))), data.draw(st.sampled_from((0, 1, 130, 300)))
    world, length = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((0, 1, 9)))
    drafts = data.draw(st.integers(1, 2))
    start = data.draw(st.sampled_from((0, 1, 127, 2**19 - size)))
    params, _ = data.draw(fuzz.row_params(rows))
    many = rows * (drafts + 1)

    def logits(number: int) -> Tensor:
        return data.draw(fuzz.logits((number, size), generator))

    def run(op: str, *arguments: Any) -> Any:
        return kernel.operator(op)(*arguments)

    x, summaries = logits(rows), longs(generator, world, rows)
    keys = run("shard_keys", x, summaries, start)
    assert keys.shape == (rows, size)
    wanted = longs(generator, rows)
    run("shard_draw", x, summaries, *params, longs(generator, rows), wanted, start, 0)
    edges = longs(generator, rows, 5)
    run("shard_histogram", longs(generator, rows, 40), summaries, params.temperature, edges)
    width = data.draw(st.sampled_from((2, 5, 6)))
    kept = longs(generator, rows, 4) if width == 2 else None
    words, lists = longs(generator, world, rows, width), longs(generator, world, rows, length)
    out = Finished(*run("shard_finish", summaries, words, lists, *params, kept, 1))
    assert ((out.token_ids >= -1) & (out.token_ids < 2**19)).all()
    steps = longs(generator, rows)
    args = (logits(many), longs(generator, world, many), longs(generator, many),
            longs(generator, many), logits(rows * drafts), longs(generator, world, rows * drafts),
            longs(generator, rows * drafts), longs(generator, rows * drafts))  # fmt: skip
    run("shard_residual", *args, steps, *params, start)
    number = generator.choice((math.nan, -1.0, 0.0, -math.inf), (rows, 2 * drafts + 1))
    logprobs = fuzz.fresh(number).float()
    target, draft = logprobs[:, : drafts + 1].contiguous(), logprobs[:, drafts + 1 :].contiguous()
    status = longs(generator, rows, drafts + 1).int()
    ids = longs(generator, rows, drafts)
    accepted, _ = run("shard_accept", target, status, draft, ids, params.seed, params.position)
    assert ((accepted >= 0) & (accepted <= drafts)).all()


WRONG = {
    "shard_scan": ({0: "double"}, {0: "flat"}, {0: "strided"}),
    "shard_keys": ({0: "double"}, {1: "short"}, {2: -1}, {2: 2**19}),
    "shard_draw": ({1: "short"}, {2: "short"}, {10: "short"}, {11: "short"}, {12: 2**19}, {13: 9}),
    "shard_histogram": ({1: "short"}, {2: "short"}, {3: "flat"}, {0: "double"}),
    "shard_finish": ({0: "short"}, {1: "flat"}, {2: "flat"}, {3: "short"}, {11: "short"}, {12: 5}),
    "shard_accept": ({0: "short"}, {1: "double"}, {2: "short"}, {3: "flat"}, {4: "short"}),
    "shard_residual": ({1: "short"}, {2: "short"}, {4: "short"}, {8: "short"}, {9: "short"}),
}


@pytest.mark.parametrize(
    ("op", "at", "how"), [(op, at, how) for op, all_of in WRONG.items() for one in all_of
                          for at, how in one.items()], ids=str
)  # fmt: skip
def test_direct_callers_stay_in_bounds(widest, op, at, how):
    arguments = list(good(widest, op))
    widest.operator(op)(*arguments)
    value = arguments[at]
    if isinstance(how, int):
        arguments[at] = how
    elif how == "double":
        arguments[at] = value.double()
    elif how == "flat":
        arguments[at] = value.flatten()
    elif how == "strided":
        arguments[at] = torch.stack((value, value), -1)[..., 0]
    else:
        arguments[at] = value[..., :-1].contiguous()
    with pytest.raises((RuntimeError, ValueError), match="proxytune|shard_"):
        widest.operator(op)(*arguments)
