"""Peers of ``python -m benchmarks.gpu``, ours beside them, and the checks, on a CPU."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import proxytune_kernels as ptk
from benchmarks.gpu import checks, peers
from benchmarks.gpu.cases import Case, make_inputs
from benchmarks.gpu.checks import Sampler, check_draws, check_sampler
from benchmarks.gpu.peers import Providers, combine, eager_distribution, eager_peer
from benchmarks.harness.logits import (
    FILTERS,
    KINDS,
    Candidates,
    Filters,
    OpCase,
    contract_distribution,
    dense,
    transformers_peer,
)  # fmt: skip
from proxytune_kernels import reference

BACKEND = "cpu" if ptk.backends()["cpu"] is None else "reference"
PROVIDERS = Providers(lambda call: 1.0, {"ours": BACKEND})


def rows_of(filters="top_p", kind="peaked", vocab_size=600, batch_size=4):
    return OpCase(kind, "bfloat16", filters, vocab_size, batch_size)


def sampler_of(peer, *, halves=True):
    return Sampler("x", peer.sample, torch.manual_seed, peer if halves else None)


def inputs_of(case, count=1):
    return make_inputs(case, count, "cpu", BACKEND)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_transformers_are_the_contract(kind, filters):
    """Flat bf16 rows have ties at the 50th token, which transformers all keeps."""
    case = rows_of(filters, kind)
    logits = case.logits()
    check_sampler(case, sampler_of(eager_peer(FILTERS[filters])), logits)
    check_sampler(case, sampler_of(eager_peer(FILTERS[filters]), halves=False), logits)
    check_sampler(case, sampler_of(transformers_peer(FILTERS[filters])), logits)


def test_eager_keeps_exactly_the_kept_set():
    """fp32 logits have no ties: the set is the contract's, not only its mass."""
    case = replace(rows_of("top_k+top_p", "flat"), dtype="float32")
    logits = case.logits()
    target = contract_distribution(case, logits, 4)
    kept = dense(eager_distribution(logits, FILTERS["top_k+top_p"]), 600) > 0
    assert torch.equal(kept, target.kept)
    assert (target.kept.sum(-1) > 1).all()


def test_exponentials_draw_by_mass():
    """20,000 draws: each frequency within 5 standard deviations; what has no mass is not drawn."""
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    torch.manual_seed(0)
    ids = torch.tensor([7, 8, 9, 3])
    draws = peers.draw_by_exponentials(Candidates(p.expand(20_000, -1), ids.expand(20_000, -1)))
    frequency = torch.stack([(draws == i).float().mean() for i in ids])
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt()).all()


@pytest.mark.parametrize(
    "wrong",
    [
        Filters(),  # no filter
        Filters(top_p=0.95),
        Filters(top_p=0.85),
        Filters(top_p=0.9, temperature=1.0),
        Filters(top_p=0.9, temperature=0.5),
        Filters(top_p=0.9, top_k=50),
    ],
)
def test_draws_of_another_filter_are_caught(wrong):
    """By draws alone, of flat rows, where nearly all tokens are kept."""
    case = rows_of("top_p", "flat", batch_size=32)
    logits = tuple(3 * role for role in case.logits())
    target = contract_distribution(case, logits, 32)
    with pytest.raises(AssertionError, match="parts of the kept set|not in the kept set"):
        check_draws(case, sampler_of(eager_peer(wrong)), logits, target)
    check_draws(case, sampler_of(eager_peer(FILTERS["top_p"])), logits, target)


def test_greedy_and_tokens_outside_the_vocabulary_are_caught():
    case = rows_of("none")
    greedy = Sampler("x", lambda rows: combine(rows).argmax(-1), lambda n: None)
    with pytest.raises(AssertionError, match="x draws .* parts of the kept set"):
        check_sampler(case, greedy, case.logits())
    for token in (-1, 600):
        outside = replace(greedy, sample=lambda rows: torch.full((4,), token))  # noqa: B023
        with pytest.raises(AssertionError, match=f"x draws token {token} in row 0"):
            check_sampler(case, outside, case.logits())


def test_ties_at_the_cut_may_be_drawn():
    """Of 40 equal tokens top_p 0.9 keeps 36, but any may be drawn."""
    case = rows_of(vocab_size=40, batch_size=2)
    logits = (torch.zeros(2, 40, dtype=torch.bfloat16),) * 3
    target = contract_distribution(case, logits, 2)
    assert target.kept.sum(-1).tolist() == [36, 36]
    any_of_them = Sampler("x", lambda rows: torch.randint(40, (2,)), torch.manual_seed)
    check_draws(case, any_of_them, logits, target)


def test_accept_is_coupled_verification():
    """On our own draws at every position it is what ``verify`` says."""
    case = Case("verify", vocab_size=300, batch_size=6, positions=4)
    [inputs] = inputs_of(case)
    base, expert, anti = map(case.shaped, inputs.logits)
    params = case.params("cpu")
    at = [params._replace(position=params.position + j) for j in range(4)]
    drawn = torch.stack(
        [ptk.sample(base[:, j], expert[:, j], anti[:, j], at[j]).token_ids for j in range(4)], dim=1
    )
    drafts = inputs.token_ids.clone()
    drafts[:3] = drawn[:3, :-1]  # some are accepted to the end
    wanted = ptk.verify(base, expert, anti, drafts, params)
    tokens, accepted = peers.accept(drawn.flatten(), drafts)
    assert torch.equal(tokens, wanted.token_ids)
    assert torch.equal(accepted.int(), wanted.num_accepted)
    assert max(accepted.tolist()) == 3 > min(accepted.tolist())


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("op", ["sample", "verify", "verify-rejection", "score", "combine"])
def test_ours_and_eager_pass_their_checks(op, filters):
    case = Case(op, "flat", filters, 500, 3, 1 if op in ("sample", "combine") else 4)
    inputs, other = inputs_of(case, 2)
    ours = PROVIDERS.prepare(case, "ours", inputs)
    before = ours.call(inputs)
    before = before.clone() if op in ("score", "combine") else before.token_ids.clone()
    for given in (inputs, other):
        ours.check(given)
        if op != "verify-rejection":
            PROVIDERS.prepare(case, "eager", inputs).check(given)
    after = ours.call(inputs)  # checks leave positions where they were
    assert torch.equal(after if op in ("score", "combine") else after.token_ids, before)


def test_heads():
    case = Case("sample_hidden", "random", vocab_size=300, batch_size=2)
    [inputs] = inputs_of(case)
    for name in ("ours", "eager"):
        prepared = PROVIDERS.prepare(case, name, inputs)
        prepared.check(inputs)
        out, params = prepared.call(inputs), case.params("cpu")
        wrong = out._replace(raw_logprobs=out.raw_logprobs + 3.0)
        with pytest.raises(AssertionError, match=f"{name} has raw logprobs off by"):
            checks.check_heads(case, name, inputs, params, wrong)


@pytest.mark.parametrize(
    ("field", "message"),
    [("token_ids", "has token_ids"), ("num_accepted", "num_accepted"), ("status", "status"),
     ("logprobs", "logprobs off")],
)  # fmt: skip
def test_a_wrong_verify_is_caught(field, message):
    case = Case("verify", vocab_size=300, batch_size=3, positions=3)
    [inputs] = inputs_of(case)
    base, expert, anti = map(case.shaped, inputs.logits)
    out = ptk.verify(base, expert, anti, inputs.token_ids, case.params("cpu"))
    checks.check_verify(case, inputs, out)
    values = getattr(out, field).clone()
    values[1] += 1
    with pytest.raises(AssertionError, match=message):
        checks.check_verify(case, inputs, out._replace(**{field: values}))


def test_a_wrong_sample_score_and_combination_are_caught():
    case = Case("sample", "flat", vocab_size=300, batch_size=4)
    [inputs] = inputs_of(case)
    ours = sampler_of(eager_peer(FILTERS["none"]), halves=False)
    with pytest.raises(AssertionError, match="not in the kept set|parts of the kept set"):
        check_sampler(case.as_rows, ours, inputs.logits, BACKEND)
    case = Case("score", vocab_size=300, batch_size=3, positions=3)
    [inputs] = inputs_of(case)
    scores = peers.torch_score(inputs.logits, inputs.token_ids)
    scores[1, 1] += 2e-4
    with pytest.raises(AssertionError, match="logprobs off by 0.0002"):
        checks.check_dense(case, "eager", inputs, scores)
    case, x = Case("combine", vocab_size=300, batch_size=3), combine(inputs.logits)
    x[2, 7] = x[2, 7].nextafter(torch.tensor(99.0))
    with pytest.raises(AssertionError, match="eager differs"):
        checks.check_dense(case, "eager", inputs, x)


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
@pytest.mark.skipif(BACKEND != "cpu", reason="needs the C++ extension")
def test_sharded_draws(monkeypatch):
    assert checks.check_sharded("cpu", BACKEND, rows=4, vocab_size=999) == 4 * 2 * 3
    whole = ptk.sample

    def shifted(*args, **kwargs):
        out = whole(*args, **kwargs)
        out.token_ids[3] += 1
        return out

    monkeypatch.setattr(ptk, "sample", shifted)
    with pytest.raises(AssertionError, match="sharded token_ids differ"):
        checks.check_sharded("cpu", BACKEND, rows=4, vocab_size=999)
    assert not dist.is_initialized()


def test_the_faster_mode_of_torch_compile_is_kept(monkeypatch):
    """Decided once for each kind of function; the chain is what runs."""
    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: function)
    seconds = iter((2e-6, 1e-6))
    providers = Providers(lambda call: next(seconds), {})
    case = Case("sample", vocab_size=600, batch_size=8)
    [inputs] = inputs_of(case)
    for _ in range(2):
        prepared = providers.prepare(case, "torch.compile", inputs)
        prepared.check(inputs)
        tried = dict(zip(peers.COMPILE_MODES, (2.0, 1.0), strict=True))
        assert prepared.config == {"mode": peers.COMPILE_MODES[1], "mode_microseconds": tried}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_the_compiled_chain_is_the_contract():
    """What torch.compile makes of the chain, whole: one graph."""
    case = Case("sample", vocab_size=600, batch_size=8)
    [inputs] = inputs_of(case)
    torch.compiler.reset()
    PROVIDERS.prepare(case, "torch.compile", inputs).check(inputs)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_combination_is_the_contracts():
    base, expert, anti = rows_of().logits()
    wanted = reference.combine(base, expert, anti, torch.ones(len(base)))
    assert torch.equal(combine((base, expert, anti)), wanted)
