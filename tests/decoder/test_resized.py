"""Runners of one set of modules, and slots that are copied, permuted and moved as a whole."""

from __future__ import annotations

import pytest
import torch

from proxytune_kernels.decoder.runner import Runner

ROLES = ("base", "expert", "anti")
PROMPTS = [[5, 9, 13], [7], [11, 4]]


@pytest.fixture(params=["batched", "separate"])
def runner(trio, request):
    made = Runner(trio.models, 3, 8, pair=request.param)
    made.prefill(range(3), dict.fromkeys(ROLES, PROMPTS))
    for slot in range(3):
        made.start(slot, ROLES)
    return made


def alone(trio, prompt):
    with torch.no_grad():
        return {r: m(torch.tensor([prompt])).logits[:, -1:].float() for r, m in trio.models.items()}


def check_next(runner, trio, prompts):
    """One more token in each slot gives what the whole prompts give, run alone."""
    logits = runner.forward(ROLES, torch.tensor([[3]] * len(prompts)))
    for slot, prompt in enumerate(prompts):
        for role, wanted in alone(trio, [*prompt, 3]).items():
            # fp64 forwards of two shapes, each rounded to fp32.
            got = logits[role][slot : slot + 1]
            assert torch.allclose(got, wanted, rtol=2**-22, atol=2**-22), (slot, role)


def test_a_resized_runner_is_empty_and_leaves_the_first_alone(runner, trio):
    other = runner.resized(1, 4)
    assert (other.capacity, other.lengths("anti")) == (4, [0])
    other.prefill([0], {role: [[6, 6]] for role in ROLES})
    check_next(other, trio, [[6, 6]])
    check_next(runner, trio, PROMPTS)
    assert runner.lengths("expert") == [3, 1, 2]


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [0, 2, 2]])
def test_slots_take_each_other_s_place(runner, trio, order):
    runner.take(runner, order)
    check_next(runner, trio, [PROMPTS[slot] for slot in order])


def test_a_longer_runner_takes_what_a_shorter_holds(runner, trio):
    other = runner.resized(4, 64)
    other.take(runner, [1, 0, 0, 2])
    assert other.active["anti"].tolist() == [1, 1, 1, 1]
    check_next(other, trio, [PROMPTS[slot] for slot in (1, 0, 0, 2)])


def test_all_slots_move_at_once(runner, trio):
    runner.forward(ROLES, torch.tensor([[3]] * 3))
    runner.shift(ROLES, 1)
    check_next(runner, trio, [[*prompt, 3] for prompt in PROMPTS])
    runner.shift(ROLES, -1)
    assert runner.lengths("base") == [3, 1, 2]
    check_next(runner, trio, PROMPTS)


def test_the_base_moves_alone(runner):
    runner.shift(("base",), 1)
    assert runner.lengths("base") == [4, 2, 3]
    assert runner.lengths("expert") == runner.lengths("anti") == [3, 1, 2]
