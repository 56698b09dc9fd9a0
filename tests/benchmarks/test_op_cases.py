from dataclasses import replace

import pytest
import torch

import proxytune_kernels as ptk
from benchmarks.logits import KINDS, make_logits
from benchmarks.op_cases import (
    ALL_CASES,
    DEFAULT_CASES,
    DTYPES,
    FILTERS,
    OURS,
    OpCase,
    check_peer,
    contract_distribution,
    make_calls,
)
from benchmarks.peers import (
    Candidates,
    numpy_peer,
    torch_peer,
    transformers_peer,
)

EAGER_PEERS = [transformers_peer, torch_peer, numpy_peer]


def small(**axes) -> OpCase:
    return OpCase(**{"vocab_size": 3000, "batch_size": 3, **axes})


@pytest.mark.parametrize("make_peer", EAGER_PEERS)
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_peers_agree_with_the_contract(make_peer, kind, dtype, filters):
    case = small(kind=kind, dtype=dtype, filters=filters)
    logits = case.logits()
    peer = make_peer(FILTERS[filters])
    check_peer(case, peer, logits, contract_distribution(case, logits))
    tokens = torch.as_tensor(peer.sample(logits))
    assert tokens.shape == (3,)
    assert contract_distribution(case, logits).kept.gather(-1, tokens[:2, None]).all()


@pytest.mark.parametrize("make_peer", EAGER_PEERS)
def test_draws_follow_the_distribution(make_peer):
    """20,000 draws of one row: each frequency within 5 standard deviations of its probability."""
    case = small(vocab_size=40, batch_size=1)
    logits = tuple(x.expand(20_000, -1) for x in case.logits())
    torch.manual_seed(0)
    tokens = torch.as_tensor(make_peer(FILTERS["top_p"]).sample(logits))
    p = contract_distribution(case, case.logits()).logprobs().exp()[0]
    frequency = torch.bincount(tokens, minlength=40) / len(tokens)
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / len(tokens)).sqrt()).all()


@pytest.mark.parametrize("wrong", [{"filters": "none"}, {"filters": "top_k+top_p"}])
@pytest.mark.parametrize("make_peer", EAGER_PEERS)
def test_wrong_filter_is_caught(make_peer, wrong):
    case = small(kind="flat")
    logits = case.logits()
    peer = make_peer(FILTERS[wrong["filters"]])
    with pytest.raises(AssertionError, match=f"{peer.name} differs from the contract"):
        check_peer(case, peer, logits, contract_distribution(case, logits))


def test_swapped_small_models_are_caught():
    case = small()
    base, expert, anti = case.logits()
    with pytest.raises(AssertionError, match="differs from the contract"):
        check_peer(
            case,
            torch_peer(FILTERS["top_p"]),
            (base, anti, expert),
            contract_distribution(case, case.logits()),
        )


def test_one_token_too_few_is_caught():
    case = small()
    logits = case.logits()
    peer = torch_peer(FILTERS["top_p"])

    def shorter(rows):
        mass, ids = peer.distribution(rows)
        last = (mass > 0).sum(-1, keepdim=True) - 1
        return Candidates(mass.scatter(-1, last, 0.0), ids)

    with pytest.raises(AssertionError, match="differs from the contract"):
        check_peer(
            case, replace(peer, distribution=shorter), logits, contract_distribution(case, logits)
        )


def test_wrong_ours_is_caught(monkeypatch):
    case = small()
    right = ptk.sample

    def unfiltered(base, expert, anti, params, **options):
        return right(base, expert, anti, params._replace(top_p=torch.ones(len(base))), **options)

    make_calls(case, [OURS], buffers=2)[OURS]()
    monkeypatch.setattr("benchmarks.op_cases.ptk.sample", unfiltered)
    with pytest.raises(AssertionError, match="ours keeps"):
        make_calls(case, [OURS], buffers=1)


def test_buffers_take_turns(monkeypatch):
    seen = []
    monkeypatch.setattr("benchmarks.op_cases.softmax_only", lambda logits: seen.append(logits[0]))
    call = make_calls(small(batch_size=1), ["softmax only"], buffers=2)["softmax only"]
    for _ in range(3):
        call()
    assert seen[0] is seen[2]
    assert not torch.equal(seen[0], seen[1])


def test_peaked_rows_are_like_the_real_trio():
    """Loosely: the entropy and kept set that the generator was fitted to, 2.2 nats and 3 tokens."""
    case = OpCase(vocab_size=151_936, batch_size=48)
    base, expert, anti = case.logits()
    x = base + (expert - anti)
    logprobs = x.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    # The entropy's spread over rows is about 1.3 nats, so the median of 48 is good to about 0.25.
    assert 1.4 < entropy.median() < 2.9
    assert base.isfinite().all()


def test_logits_bytes():
    assert OpCase(vocab_size=1000, batch_size=4).logits_bytes == 48_000
    assert OpCase(dtype="bfloat16", vocab_size=1000, batch_size=4).logits_bytes == 24_000


def test_cases():
    assert set(DEFAULT_CASES) <= set(ALL_CASES)
    assert len(ALL_CASES) == 2 * 2 * 3 * 3 * 3


def test_seeds_give_other_rows():
    one, other = (make_logits("flat", 1, 100, torch.float32, seed)[0] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind must be one of"):
        make_logits("round", 1, 10, torch.float32)
