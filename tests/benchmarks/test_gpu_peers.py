"""Peers of ``python -m benchmarks.gpu``, and the checks that they pass, on a CPU."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

import proxytune_kernels as ptk
from benchmarks.gpu import checks, flashinfer_peer
from benchmarks.gpu.cases import (
    COMBINE,
    COMPILED,
    EAGER,
    FLASHINFER,
    OURS,
    REJECTION,
    SAMPLE,
    SCORE,
    VERIFY,
    Case,
    make_inputs,
)
from benchmarks.gpu.checks import check_draws, check_sampler
from benchmarks.gpu.providers import Providers, accept, torch_score
from benchmarks.gpu.samplers import (
    MODES,
    Compiler,
    Sampler,
    combine,
    compiled_combination,
    eager_distribution,
    eager_sampler,
    race,
    transformers_sampler,
)
from benchmarks.logits import KINDS
from benchmarks.op_cases import FILTERS, OpCase, contract_distribution, dense
from benchmarks.peers import Candidates, Filters
from proxytune_kernels import reference
from tests.benchmarks.gpu_device import CpuDevice


def rows_of(filters="top_p", kind="peaked", vocab_size=600, batch_size=4):
    return OpCase(kind, "bfloat16", filters, vocab_size, batch_size)


def combined(logits):
    base, expert, anti = logits
    return reference.combine(base, expert, anti, torch.ones(len(base)))


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 40])
def test_eager_is_the_contract(kind, filters, batch_size):
    case = rows_of(filters, kind, batch_size=batch_size)
    logits = case.logits()
    check_sampler(case, eager_sampler(FILTERS[filters]), logits)
    without_halves = replace(eager_sampler(FILTERS[filters]), peer=None)
    check_sampler(case, without_halves, logits)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_is_the_contract(kind, filters):
    """Flat bf16 rows have ties at the 50th token, which transformers all keeps."""
    pytest.importorskip("transformers")
    case = rows_of(filters, kind)
    check_sampler(case, transformers_sampler(FILTERS[filters]), case.logits())


def test_combinations_are_the_contracts():
    logits = rows_of().logits()
    assert torch.equal(combine(logits), combined(logits))
    assert combine(logits).dtype == torch.float32


def test_compiled_combination(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    logits = rows_of().logits()
    assert torch.equal(compiled_combination(0.7)(logits), combined(logits) / 0.7)


def test_eager_keeps_exactly_the_kept_set():
    """fp32 logits have no ties: the set is the contract's, not only its mass."""
    case = replace(rows_of("top_k+top_p", "flat"), dtype="float32")
    logits = case.logits()
    target = contract_distribution(case, logits, 4)
    kept = dense(eager_distribution(logits, FILTERS["top_k+top_p"]), 600) > 0
    assert torch.equal(kept, target.kept)
    assert (target.kept.sum(-1) > 1).all()


def test_race_draws_by_mass():
    """20,000 draws: each frequency within 5 standard deviations; what has no mass is not drawn."""
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    torch.manual_seed(0)
    ids = torch.tensor([7, 8, 9, 3])
    draws = race(Candidates(p.expand(20_000, -1), ids.expand(20_000, -1)))
    frequency = torch.stack([(draws == i).float().mean() for i in ids])
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt()).all()
    assert set(race(Candidates(p.expand(100, -1), None)).tolist()) <= {0, 2, 3}


@pytest.mark.parametrize(
    "wrong",
    [
        Filters(),  # no filter
        Filters(top_p=0.95),
        Filters(top_p=0.9, temperature=1.0),
        Filters(top_p=0.9, temperature=0.5),
        Filters(top_p=0.85),
        Filters(top_p=0.9, top_k=50),
    ],
)
def test_draws_of_another_filter_are_caught(wrong):
    """By draws alone, of flat rows, where nearly all tokens are kept."""
    case = rows_of("top_p", "flat", batch_size=32)
    logits = tuple(3 * role for role in case.logits())
    target = contract_distribution(case, logits, 32)
    sampler = replace(eager_sampler(wrong), peer=None)
    with pytest.raises(AssertionError, match="parts of the kept set|not in the kept set"):
        check_draws(case, sampler, logits, target)
    check_draws(case, eager_sampler(FILTERS["top_p"]), logits, target)


def test_greedy_is_caught():
    case = rows_of()
    logits = case.logits()
    greedy = Sampler("x", lambda rows: combine(rows).argmax(-1), lambda n: None)
    with pytest.raises(AssertionError, match="x draws .* parts of the kept set"):
        check_sampler(case, greedy, logits)


@pytest.mark.parametrize("token", [-1, 600])
def test_tokens_outside_the_vocabulary_are_caught(token):
    case = rows_of("none")
    outside = Sampler("x", lambda rows: torch.full((4,), token), lambda n: None)
    with pytest.raises(AssertionError, match=f"x draws token {token} in row 0"):
        check_sampler(case, outside, case.logits())


def test_ties_at_the_cut_may_be_drawn():
    """Four equal tokens and top_p 0.9 keep all; of 40 equal ones, 36, but any may be drawn."""
    case = rows_of(vocab_size=40, batch_size=2)
    logits = (torch.zeros(2, 40, dtype=torch.bfloat16),) * 3
    target = contract_distribution(case, logits, 2)
    assert target.kept.sum(-1).tolist() == [36, 36]
    any_of_them = Sampler("x", lambda rows: torch.randint(40, (2,)), torch.manual_seed)
    check_draws(case, any_of_them, logits, target)


def test_accept():
    drawn = torch.tensor([[1, 2, 3], [1, 9, 3], [8, 2, 3]])
    drafts = torch.tensor([[1, 2], [1, 2], [1, 2]])
    tokens, accepted = accept(drawn.flatten(), drafts)
    assert tokens.tolist() == [[1, 2, 3], [1, 9, -1], [8, -1, -1]]
    assert accepted.tolist() == [2, 1, 0]


def test_accept_is_coupled_verification():
    """On our own draws at every position it is what ``verify`` says."""
    case = Case(VERIFY, vocab_size=300, batch_size=6, positions=4)
    [inputs] = make_inputs(case, 1, "cpu", CpuDevice.backend)
    base, expert, anti = (role.view(6, 4, 300) for role in inputs.logits)
    params = case.params("cpu")
    at = [params._replace(position=params.position + j) for j in range(4)]
    drawn = torch.stack(
        [ptk.sample(base[:, j], expert[:, j], anti[:, j], at[j]).token_ids for j in range(4)], dim=1
    )
    drafts = inputs.token_ids.clone()
    drafts[:3] = drawn[:3, :-1]  # some are accepted to the end
    wanted = ptk.verify(base, expert, anti, drafts, params)
    tokens, accepted = accept(drawn.flatten(), drafts)
    assert torch.equal(tokens, wanted.token_ids)
    assert torch.equal(accepted.int(), wanted.num_accepted)
    assert 3 in accepted.tolist()
    assert min(accepted.tolist()) < 3


class TestOurs:
    """Ours passes its checks, and each check fails where ours is wrong."""

    @pytest.mark.parametrize("filters", FILTERS)
    @pytest.mark.parametrize("op", [SAMPLE, VERIFY, REJECTION, SCORE, COMBINE])
    def test_passes(self, op, filters):
        case = Case(op, "flat", filters, 500, 3, 1 if op in (SAMPLE, COMBINE) else 4)
        inputs, other = make_inputs(case, 2, "cpu", CpuDevice.backend)
        prepared = Providers(CpuDevice()).prepare(case, OURS, inputs)
        prepared.check(inputs)
        prepared.check(other)

    def test_position_is_left_at_zero(self):
        case = Case(SAMPLE, "flat", "none", vocab_size=500, batch_size=3)
        [inputs] = make_inputs(case, 1, "cpu", CpuDevice.backend)
        prepared = Providers(CpuDevice()).prepare(case, OURS, inputs)
        before = prepared.call(inputs).clone()
        prepared.check(inputs)
        assert torch.equal(prepared.call(inputs), before)

    @pytest.mark.parametrize(
        ("field", "message"), [("token_ids", "has token_ids"), ("num_accepted", "num_accepted"),
                               ("logprobs", "logprobs off"), ("status", "status")]
    )  # fmt: skip
    def test_wrong_verify(self, field, message):
        case = Case(VERIFY, vocab_size=300, batch_size=3, positions=3)
        [inputs] = make_inputs(case, 1, "cpu", CpuDevice.backend)
        base, expert, anti = (role.view(3, 3, 300) for role in inputs.logits)
        out = ptk.verify(base, expert, anti, inputs.token_ids, case.params("cpu"))
        checks.check_verify(case, inputs, out)
        values = getattr(out, field).clone()
        values[1] += 1
        with pytest.raises(AssertionError, match=message):
            checks.check_verify(case, inputs, out._replace(**{field: values}))

    def test_wrong_score_and_combine(self):
        case = Case(SCORE, vocab_size=300, batch_size=3, positions=3)
        [inputs] = make_inputs(case, 1, "cpu", CpuDevice.backend)
        scores = torch_score(inputs.logits, inputs.token_ids)
        checks.check_score(case, OURS, inputs, scores, ours=False)
        scores[1, 1] += 2e-4
        with pytest.raises(AssertionError, match="logprobs off by 0.0002"):
            checks.check_score(case, EAGER, inputs, scores, ours=False)
        case = Case(COMBINE, vocab_size=300, batch_size=3)
        x = combine(inputs.logits)
        x[2, 7] = x[2, 7].nextafter(torch.tensor(99.0))
        with pytest.raises(AssertionError, match="eager differs"):
            checks.check_combine(case, EAGER, inputs, x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_compiled_chain_is_the_contract():
    """What torch.compile makes of the chain, whole: one graph."""
    case = Case(SAMPLE, vocab_size=600, batch_size=8)
    [inputs] = make_inputs(case, 1, "cpu", CpuDevice.backend)
    torch.compiler.reset()
    prepared = Providers(CpuDevice()).prepare(case, COMPILED, inputs)
    prepared.check(inputs)
    assert prepared.config["mode"] in MODES
    assert not torch._dynamo.utils.counters["graph_break"]


class TestCompiler:
    def test_the_faster_mode_is_kept(self, monkeypatch):
        compiled = []

        def fake(function, mode, dynamic):
            compiled.append(mode)
            return lambda: mode

        monkeypatch.setattr(torch, "compile", fake)
        times = dict(zip(MODES, (2.0, 1.0), strict=True))
        compiler = Compiler()
        function, config = compiler.compile("a", lambda: None, lambda f: times[f()])
        assert function() == MODES[1]
        assert config == {
            "mode": MODES[1],
            "mode_microseconds": {MODES[0]: 2e6, MODES[1]: 1e6},
        }
        assert compiled == [*MODES, MODES[1]]
        times[MODES[1]] = 99.0
        assert compiler.compile("a", lambda: None, lambda f: times[f()])[0]() == MODES[1]
        assert compiler.compile("b", lambda: None, lambda f: times[f()])[0]() == MODES[0]


class TestFlashInfer:
    """Against a stand-in with the signatures of 0.7.2's ``flashinfer/sampling.py``."""

    @pytest.fixture
    def sampling(self, monkeypatch):
        calls: list[tuple[Any, ...]] = []
        module: Any = ModuleType("flashinfer.sampling")

        def softmax(logits, temperature=None, enable_pdl=None):
            calls.append(("softmax", temperature))
            return logits.softmax(-1)

        def sampling_from_logits(
            logits, indices=None, deterministic=True, generator=None, check_nan=False,
            seed=None, offset=None,
        ):  # fmt: skip
            calls.append(("sampling_from_logits", logits, int(seed), int(offset)))
            return logits.argmax(-1).int()

        def top_p_sampling_from_probs(
            probs, top_p, indices=None, deterministic=True, generator=None, check_nan=False,
            seed=None, offset=None, return_valid=False,
        ):  # fmt: skip
            calls.append(("top_p_sampling_from_probs", probs, top_p, int(seed)))
            return probs.argmax(-1).int()

        def top_k_top_p_sampling_from_logits(
            logits, top_k, top_p, indices=None, filter_apply_order="top_k_first",
            deterministic=True, generator=None, check_nan=False, seed=None, offset=None,
        ):  # fmt: skip
            order = filter_apply_order
            calls.append(("top_k_top_p_sampling_from_logits", logits, top_k, top_p, order))
            return logits.argmax(-1).int()

        for function in (softmax, sampling_from_logits, top_p_sampling_from_probs,
                         top_k_top_p_sampling_from_logits):  # fmt: skip
            setattr(module, function.__name__, function)
        module.calls = calls
        monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
        monkeypatch.setitem(sys.modules, "flashinfer.sampling", module)
        monkeypatch.setattr(flashinfer_peer, "version", lambda package: "0.7.2")
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        return module

    def test_no_filter(self, sampling):
        logits = rows_of().logits()
        sampler = flashinfer_peer.make_sampler(FILTERS["none"], "cpu")
        sampler.reseed(5)
        tokens = sampler.sample(logits)
        [(name, x, seed, offset)] = sampling.calls
        assert (name, seed, offset) == ("sampling_from_logits", 5, 0)
        assert torch.equal(x, combined(logits) / 0.7)
        assert torch.equal(tokens.long(), combined(logits).argmax(-1))
        assert sampler.name == FLASHINFER
        assert sampler.config == {"flashinfer-python": "0.7.2"}

    def test_top_p(self, sampling):
        logits = rows_of().logits()
        flashinfer_peer.make_sampler(FILTERS["top_p"], "cpu").sample(logits)
        softmax, (name, p, top_p, _) = sampling.calls
        assert softmax == ("softmax", None)
        assert (name, top_p) == ("top_p_sampling_from_probs", 0.9)
        assert torch.equal(p, (combined(logits) / 0.7).softmax(-1))

    def test_top_k_and_top_p(self, sampling):
        logits = rows_of().logits()
        flashinfer_peer.make_sampler(FILTERS["top_k+top_p"], "cpu").sample(logits)
        [(name, x, top_k, top_p, order)] = sampling.calls
        assert name == "top_k_top_p_sampling_from_logits"
        assert (top_k, top_p, order) == (50, 0.9, "top_k_first")
        assert torch.equal(x, combined(logits) / 0.7)

    @pytest.mark.parametrize("filters", FILTERS)
    def test_older_release(self, sampling, filters):
        sampling.softmax = None
        with pytest.raises(ImportError, match=r"flashinfer-python 0\.7\.2 has no"):
            flashinfer_peer.make_sampler(FILTERS[filters], "cpu")
        sampling.softmax = torch.softmax
        for name in ("sampling_from_logits", "top_p_sampling_from_probs",
                     "top_k_top_p_sampling_from_logits"):  # fmt: skip
            setattr(sampling, name, lambda probs, generator=None: None)
        with pytest.raises(ImportError, match="can't be captured"):
            flashinfer_peer.make_sampler(FILTERS[filters], "cpu")

    def test_missing(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert flashinfer_peer.missing() == (
            "flashinfer-python is not installed (pip install flashinfer-python)"
        )
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        assert flashinfer_peer.missing() is None

    @pytest.mark.parametrize(
        ("ended", "reason"),
        [
            ((0, ""), None),
            ((None, "..."), "flashinfer-python did not build within 7 s"),
            ((1, "x\nRuntimeError: no nvcc\n"),
             "flashinfer-python does not build: RuntimeError: no nvcc"),
            ((-9, ""), "flashinfer-python does not build: exit code -9"),
        ],
    )  # fmt: skip
    def test_build(self, monkeypatch, ended, reason):
        asked = []

        def run_process(*arguments):
            asked.append(arguments)
            return ended

        monkeypatch.setattr(flashinfer_peer, "run_process", run_process)
        assert flashinfer_peer.Build(7.0).wait() == reason
        [(command, limit)] = asked
        assert command[1:] == ["-m", "benchmarks.gpu.flashinfer_peer"]
        assert limit == 7.0
