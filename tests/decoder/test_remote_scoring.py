"""A remote base that scores texts: with all of its tokens known, the local trio's scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("circuitbreaker", reason="a remote base needs the extra remote")

from proxytune_kernels.decoder import Decoder
from proxytune_kernels.decoder.scoring import Scorer
from proxytune_kernels.trio import RemoteBase, Trio
from tests.decoder.conftest import near_trio
from tests.server.serving import serving

REQUESTS = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([20, 21], [22, 23, 24])]


def scores(trio: Trio, alphas: Sequence[float | str] = (0.0, 1.0)) -> list[list[float]]:
    found: dict[int, list[float]] = {}
    Scorer(trio).score(
        REQUESTS, alphas, batch_size=2, max_length=64,
        scored=lambda i, each: found.update({i: [value for value, _ in each]}),
    )  # fmt: skip
    return [found[i] for i in range(len(REQUESTS))]


def test_scores_are_the_local_trios():
    tiny = near_trio()
    with serving(Decoder(Trio.from_models(tiny.base, tokenizer=tiny.tokenizer)),
                 max_prompt_logprobs=-1) as running:  # fmt: skip
        base = RemoteBase(f"{running.url}/v1", top_n=-1)
        remote = Trio.from_models(base, tiny.expert, tiny.anti, tiny.tokenizer)
        torch.testing.assert_close(scores(remote), scores(tiny), rtol=0, atol=1e-4)
        few = RemoteBase(f"{running.url}/v1", top_n=3, tail="anti")
        named = Trio.from_models(few, tiny.expert, tiny.anti, tiny.tokenizer)
        near = scores(named, ("base", 0.0, 1.0))
        # Without the anti nothing is known of most; with it all tokens have a share.
        assert all(value > -50 for _, _, value in near)
        # The base alone is the same beside a proxy.
        assert [row[:2] for row in near] == [row * 2 for row in scores(named, (0.0,))]
        assert min(row[0] for row in near) == -math.inf
