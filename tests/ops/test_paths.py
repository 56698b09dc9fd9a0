"""The ways a row takes through the launches of Triton's sample: each is taken, and each is right.

docs/gpu.md has the ways. What happened to a row is read from the workspace that the launches share.
"""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from tests.ops import oracle
from tests.ops.conftest import NEEDS_TRITON, Backend, move

pytestmark = NEEDS_TRITON

TRITON, REFERENCE = Backend("triton"), Backend("reference")
INF = torch.inf


DONE, SPREAD, SEARCHED = "done", "spread", "searched"
"""What the last launch that a row needed was."""


def sample(base: Tensor, **values: Any) -> tuple[ptk.SampleOutput, list[str]]:
    """``sample`` of base alone, and the ways of its rows."""
    from proxytune_kernels.kernels import common, workspace
    from proxytune_kernels.kernels.sample import launch_sample
    from proxytune_kernels.ops.backends import triton_operators  # noqa: F401  (corrects the interpreter)

    base = move(base, TRITON.device)
    params = ptk.RowParams.make(len(base), device=base.device, **values)
    out = workspace.Outputs(*ptk.sample(base, backend="reference")[:-2])
    logits = common.inputs(base, None, None)
    _, left = launch_sample(logits, params, out, base.shape[1], 1, 0)
    modes = {getattr(workspace, name.upper()).value: name for name in (DONE, SPREAD, SEARCHED)}
    ways = [modes[mode] for mode in left.counters[:, workspace.MODE.value].tolist()]
    return ptk.SampleOutput(*(t.cpu() for t in out)), ways


def noise(vocab_size: int, spread: float, seed: int = 1) -> Tensor:
    return torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def spikes(tiles: int) -> Tensor:
    """One high logit in each tile of 128, at another place in each."""
    row = noise(tiles * 128, 0.1).view(tiles, 128)
    row[torch.arange(tiles), torch.arange(tiles) * 37 % 128] = 9.0
    return row.view(1, -1)


def peak(vocab_size: int) -> Tensor:
    """Thirty tokens far above the others, in one tile."""
    row = noise(vocab_size, 1.0)
    row[0, 300:330] += 12
    return row


def plus_inf(vocab_size: int) -> Tensor:
    row = noise(vocab_size, 1.0)
    row[0, [3, 200, 201]] = INF
    return row


def unlike(vocab_size: int) -> Tensor:
    """The evenly spaced tokens that pivots are chosen from are all below the others."""
    row = noise(vocab_size, 0.1)
    row[0, torch.arange(1024) * vocab_size // 1024] -= 9.0
    return row


def together(vocab_size: int) -> Tensor:
    """All likely tokens in one tile, as where ids are in the order of frequency."""
    row = noise(vocab_size, 1.0)
    row[0, 256:384] += torch.linspace(15, 10, 128)
    return row


def far(vocab_size: int) -> Tensor:
    """One tile at the highest numbers, the others at the lowest: the difference is past fp32."""
    row = noise(vocab_size, 1e38) - 2.4e38
    row[0, 128:256] = torch.linspace(1e38, 3e38, 128)
    return row.clamp(-3.4e38, 3.4e38)


CASES: dict[str, tuple[Tensor, dict[str, Any], str]] = {
    "greedy": (noise(1030, 2.0), dict(temperature=0.0), DONE),
    "no filter": (noise(1030, 2.0), dict(), DONE),
    "no filter, another temperature": (noise(1030, 2.0), dict(temperature=0.6), DONE),
    "a list of the whole row": (noise(500, 4.0), dict(top_p=0.9), DONE),
    "one list, top_p": (peak(2100), dict(top_p=0.9), DONE),
    "one list, top_p of what top_k leaves": (noise(2100, 3.0), dict(top_k=12, top_p=0.8), DONE),
    "one list, min_p": (noise(2100, 3.0), dict(min_p=0.05), DONE),
    "nothing left": (torch.full((1, 140), -INF), dict(top_p=0.5), DONE),
    "bad parameter": (noise(140, 1.0), dict(top_p=torch.tensor([2.0])), DONE),
    "top_p, many tokens": (noise(2100, 1.0), dict(top_p=0.9), SPREAD),
    "top_p in joint, many tokens": (
        noise(2100, 0.5), dict(top_k=900, top_p=0.6, filter_order="joint"), SPREAD,
    ),
    "top_k, many tokens": (noise(2100, 1.0), dict(top_k=800, temperature=0.7), SPREAD),
    "more tiles than a list of tiles": (spikes(66), dict(top_k=80), SPREAD),
    "a cut within the tiles' error": (torch.zeros(1, 4), dict(top_p=0.5), SPREAD),
    "thousands of ties": (torch.zeros(1, 8300), dict(top_p=0.5), SPREAD),
    "min_p, many tokens": (noise(700, 0.1), dict(min_p=0.5), SPREAD),
    "two filters, many tokens": (
        noise(700, 0.1), dict(top_k=600, top_p=0.9, filter_order="hf"), SPREAD,
    ),
    "two filters in order vllm": (noise(700, 0.1), dict(min_p=0.6, top_p=0.9), SPREAD),
    "three filters in order joint": (
        noise(700, 0.1), dict(top_k=650, min_p=0.6, top_p=0.9, filter_order="joint"), SPREAD,
    ),
    "+inf": (plus_inf(300), dict(top_p=0.9), SPREAD),
    "+inf, no filter": (plus_inf(300), dict(), SPREAD),
    "more tokens between pivots than a list holds": (
        unlike(12_288), dict(top_k=11_000, top_p=0.5, filter_order="hf"), SEARCHED,
    ),
    "likely tokens together": (together(2100), dict(top_k=60, top_p=0.95), DONE),
    "tiles further below than fp32 reaches": (far(500), dict(top_k=200), DONE),
    "+inf, greedy": (plus_inf(300), dict(temperature=0.0), SPREAD),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_row_goes_its_way_to_the_references_token(case):
    base, values, way = CASES[case]
    out, ways = sample(base, seed=5, position=11, **values)
    assert ways == [way]
    wanted = REFERENCE.sample(base, seed=5, position=11, **values)
    for name in ("token_ids", "num_kept", "status"):
        assert torch.equal(getattr(out, name), getattr(wanted, name)), name
    for name in ("logprobs", "raw_logprobs"):
        found, true = getattr(out, name), getattr(wanted, name)
        bound = 2.0**-22 * (1 + float(true.abs().nan_to_num().max())) + TRITON.tile_error
        torch.testing.assert_close(found, true, rtol=0, atol=bound, equal_nan=True)


@pytest.mark.parametrize(
    ("base", "values"),
    [
        (noise(4200, 1.0), dict(top_p=0.9)),
        (noise(4200, 1.0).mul(4).round().div(4), dict(top_k=1500)),  # ties at the cut
        (noise(4200, 0.1), dict(min_p=0.5)),
    ],
)
def test_the_number_of_programs_a_row_does_not_show(base, values, monkeypatch):
    """As it was alone over five programs, a row is over two; and neighbours go other ways."""
    from proxytune_kernels.kernels import common
    from proxytune_kernels.kernels import sample as launches

    assert common.splits_of(1, 4200, move(base, TRITON.device).device) == 5
    alone, way = sample(base, position=3, **values)
    peaked = base.sign() * 40
    position = torch.tensor([9, 3, 3, 4, 3])
    batch = torch.cat([peaked, base, base, base, base])
    monkeypatch.setattr(launches, "splits_of", lambda *shape: 2)
    out, ways = sample(batch, position=position, **values)
    assert ways[1:] == way * 4
    for row in (1, 2, 4):
        oracle.assert_same(alone, oracle.each(operator.itemgetter(slice(row, row + 1)), out))


@pytest.mark.parametrize("after", [dict(), dict(top_p=0.9), dict(top_k=5, min_p=0.5)])
def test_parameters_that_change_between_launches_look_up_no_token_past_the_row(after):
    """As where another stream overwrites them meanwhile: any token will do, but one of the row."""
    from proxytune_kernels.kernels import common, sample, workspace
    from proxytune_kernels.ops.backends import triton_operators  # noqa: F401  (corrects the interpreter)

    base = move(noise(300, 1.0), TRITON.device)
    logits, device = common.inputs(base, None, None), base.device
    tiles = workspace.tiles_of(1, 300, device)
    tiles.score_bound.fill_(torch.nan)  # as unwritten memory may be
    before = ptk.RowParams.make(1, device=device, top_k=3)
    sample.launch_scan(logits, before, tiles, 300, 1, 0)
    out, params = workspace.outputs_of(1, device), ptk.RowParams.make(1, device=device, **after)
    if after:  # and the logits: every tile lies above the tokens it holds
        base.fill_(-INF)
    sample.launch_selection(logits, params, tiles, out, 300, 1, 0)
    assert 0 <= int(out.token_ids) < 300


def test_a_residual_over_several_programs():
    """The draft is rejected in a flat row: target less drafter, drawn over all blocks."""
    target = noise(2100, 0.5).expand(5, -1)[:, None].expand(-1, 2, -1)
    drafter = target[:, :1].clone()
    drafter[:, :, ::2] += 2.0  # what the residual holds is elsewhere
    drafts = torch.full((5, 1), 2)
    position = torch.arange(5) * 10
    for values in (dict(), dict(top_p=0.8)):
        out, wanted = (
            backend.verify(target, None, None, drafts, mode="rejection", draft_logits=drafter,
                           position=position, **values)
            for backend in (TRITON, REFERENCE)
        )  # fmt: skip
        assert out.token_ids.tolist() == wanted.token_ids.tolist()
        assert out.num_accepted.tolist() == wanted.num_accepted.tolist()
        assert (out.num_accepted == 0).sum() > 1 and (out.token_ids[:, 0] % 2 == 1).any()
