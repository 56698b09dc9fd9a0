"""What ``python -m benchmarks.gpu`` computes of the operators, on a CPU: plan, checks, figures."""

import os
from collections import Counter
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import typer

import benchmarks.gpu.__main__ as command
import proxytune_kernels as ptk
from benchmarks.gpu import operators, peers
from benchmarks.gpu.cases import BATCH_SIZES, Case, make_inputs, plan
from benchmarks.gpu.device import Journal, first_line, slug
from benchmarks.gpu.driver import call_operators
from benchmarks.gpu.operators import Timed
from benchmarks.gpu.peers import check_draws, check_sampler, eager_peer
from benchmarks.harness.report import cells
from benchmarks.harness.samplers import (
    FILTERS,
    KINDS,
    VOCAB_SIZES,
    Filters,
    OpCase,
    Peer,
    check_heads,
    contract_distribution,
    transformers_peer,
)

BACKEND = "cpu" if ptk.backends()["cpu"] is None else "reference"
OURS = {"ours": BACKEND}
PLAIN = ("ours", "cuda", "eager", "transformers", "flashinfer")


def test_the_plan_has_the_peers_that_targets_name():
    units = plan()
    timed = {unit.case for unit in units if set(PLAIN) <= set(unit.providers)}
    axes = product(KINDS, FILTERS, VOCAB_SIZES, BATCH_SIZES)
    assert timed == {Case("sample", *values) for values in axes}
    assert {unit.case.positions for unit in units if unit.case.op == "verify-rejection"} == {5, 9}
    assert {(u.case.vocab_size, u.case.kind) for u in units[:12]} == {(128_256, "peaked")}
    compiled = next(i for i, unit in enumerate(units) if "torch.compile" in unit.providers)
    assert max(i for i, unit in enumerate(units) if unit.providers == PLAIN) < compiled
    pairs = Counter((unit.case, name) for unit in units for name in unit.providers)
    assert {name for (_, name), count in pairs.items() if count > 1} == {"ours"}
    few = plan(("ours", "eager"), [32_000], [1, 8])
    assert {(u.case.vocab_size, u.case.batch_size) for u in few} == {(32_000, 1), (32_000, 8)}
    assert Counter(unit.case for unit in few).most_common(1)[0][1] == 1


@pytest.mark.parametrize("l2_bytes", [1, 30, 3000, 6000, 7000, 10**6])
def test_twice_l2_is_read_between_two_uses(l2_bytes):
    """The fewest sets with which what is read between two uses of one is twice L2 or more."""
    count = Case(vocab_size=1000, batch_size=1).sets_needed(l2_bytes)  # of 6,000 bytes
    assert (count - 1) * 6000 >= 2 * l2_bytes > (count - 2) * 6000


def test_sets_are_other_rows_and_drafts_are_the_experts():
    case = Case("verify", vocab_size=500, batch_size=3, positions=3)
    one, other = make_inputs(case, 2, "cpu", BACKEND)
    again, _ = make_inputs(case, 2, "cpu", BACKEND)
    assert [(x.shape, x.dtype) for x in one.logits] == [((9, 500), torch.bfloat16)] * 3
    assert not torch.equal(one.logits[0], other.logits[0])
    assert torch.equal(one.logits[2], again.logits[2])
    for j in range(2):
        params = case.params("cpu")._replace(position=torch.full((3,), j))
        drawn = ptk.sample(one.logits[1].view(3, 3, 500)[:, j], params=params).token_ids
        assert torch.equal(one.token_ids[:, j], drawn)
    rejection, _ = make_inputs(replace(case, op="verify-rejection"), 2, "cpu", BACKEND)
    assert not torch.equal(rejection.token_ids, one.token_ids)


def test_calls_in_a_graph():
    assert operators.calls_in_run(1e-3, 3, "cold") == 6  # 4 ms, every set as often
    assert operators.calls_in_run(1.0, 3, "cold") == 3
    assert operators.calls_in_run(1e-3, 1, "warm") == 4
    assert operators.calls_in_run(1e-9, 1, "warm") == 64
    assert operators.calls_in_run(1e-9, 5, "single") == 1
    case = Case(vocab_size=1000, batch_size=1)
    assert operators.modes(case, 6_000) == ("cold", "warm", "single")
    assert operators.modes(replace(case, batch_size=8), 48_000) == ("cold", "warm")
    assert operators.modes(case, 5_999) == ("cold",)


def test_records_are_paired_by_repeat_and_mode():
    case = Case(vocab_size=1000, batch_size=1)
    names = (("ours", "cold"), ("ours", "warm"), ("eager", "cold"))
    timed = [Timed(name, mode, lambda: None, 4) for name, mode in names]
    samples = [[1e-6, 4e-6, 2e-6], [1e-6] * 3, [30e-6, 80e-6, 20e-6]]
    ours, warm, eager = operators.records(case, timed, samples, 6e9)
    assert ours["microseconds"] == pytest.approx(
        {"median": 2.0, "p10": 1.2, "p90": 3.6, "count": 3, "min": 1.0}
    )
    # 30, 20 and 10 times; not the 15 of the medians
    assert eager["time_over_ours"]["median"] == pytest.approx(20.0)
    assert warm["time_over_ours"]["median"] == 1.0
    [alone] = operators.records(case, timed[2:], samples[2:], 6e9)
    assert alone["time_over_ours"] is None
    [row] = (cells(r, operators.COLUMNS) for r in operators.by_case([ours, eager]))
    assert row == ["B=1 top_p", "2.00", "-", "3", "50.0%", "-", "20.0", "-", "-", "-"]


def test_names():
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert (slug("Tesla T4/x"), slug("NVIDIA")) == ("tesla-t4-x", "unknown")
    assert first_line(RuntimeError("\none\ntwo")) == "RuntimeError: one"
    assert first_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "benchmarks.gpu: no CUDA device: torch "),
        (["--decoder"], "benchmarks.gpu: no CUDA device: torch "),
        (["--vocab-sizes", "7"], "--vocab-sizes must be among 32000"),
        (["--decoder", "--batch-sizes", "8"], "--batch-sizes must be among 1, 4, 16"),
    ],
)
def test_command(run_command, monkeypatch, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run_command(command.main, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", "").split())


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A tree with sources and no extensions, and what build() does there."""
    for path in ("setup.py", "build_cuda.py", "csrc/cuda/launch.cu", "proxytune_kernels/params.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    done = []
    monkeypatch.delenv("BENCHMARKS_GPU_BUILT", raising=False)
    monkeypatch.setattr("os.environ", dict(os.environ))

    def run(asked, **_):
        done.append(asked[1:])
        return SimpleNamespace(returncode=int(len(done) > 2))  # the second build fails

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("os.execv", lambda _, arguments: done.append(arguments[1:]))
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", "--budget", "9"])
    return tmp_path, done


def test_it_builds_first_and_begins_anew(checkout):
    root, done = checkout
    command.build(root)
    building = ["setup.py", "-q", "build_ext", "--inplace"]
    assert done == [building, ["-m", "benchmarks.gpu", "--budget", "9"]]
    command.build(root)  # in the process that follows
    assert len(done) == 2
    del os.environ["BENCHMARKS_GPU_BUILT"]
    with pytest.raises(typer.Exit):
        command.build(root)
    assert done[2:] == [building]


def test_what_is_newer_than_its_sources_is_not_built(checkout):
    root, done = checkout
    extensions = [root / "proxytune_kernels" / f"{name}.abi3.so" for name in ("_cpu", "_cuda")]
    for path in extensions:
        path.touch()
        os.utime(path, (path.stat().st_mtime + 60,) * 2)
    command.build(root)
    assert done == []
    source = root / "csrc" / "cuda" / "launch.cu"
    os.utime(source, (source.stat().st_mtime + 90,) * 2)
    command.build(root)
    assert len(done) == 2


@pytest.mark.parametrize("failed", [False, True])
def test_it_ends_with_what_to_send_back(tmp_path, capsys, failed):
    journal = Journal(tmp_path / "gpu-h200.jsonl", {})
    journal.failed = failed
    assert journal.conclude() == failed
    wrote, send, *more = capsys.readouterr().out.splitlines()
    assert wrote.endswith("gpu-h200.jsonl") and f"git add {journal.output}" in send
    assert bool(more) == failed


# Peers and their checks


def rows_of(filters="top_p", kind="peaked", vocab_size=600, batch_size=4):
    return OpCase(kind, "bfloat16", filters, vocab_size, batch_size)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_transformers_are_the_contract(kind, filters):
    """Flat bf16 rows have ties at the 50th token, which transformers all keeps."""
    case = rows_of(filters, kind)
    for make in (eager_peer, transformers_peer):
        check_sampler(case, make(FILTERS[filters]), case.logits())


@pytest.mark.parametrize(
    "wrong",
    [Filters(), Filters(top_p=0.95), Filters(top_p=0.85), Filters(top_p=0.9, temperature=1.0),
     Filters(top_p=0.9, temperature=0.5), Filters(top_p=0.9, top_k=50)],
)  # fmt: skip
def test_draws_of_another_filter_are_caught(wrong):
    """By draws alone, of flat rows, where nearly all tokens are kept."""
    case = rows_of("top_p", "flat", batch_size=32)
    base, expert, anti = (3 * role for role in case.logits())
    logits = base, expert, anti
    target = contract_distribution(case, logits, 32)
    with pytest.raises(AssertionError, match="parts of the kept set|not in the kept set"):
        check_draws(case, eager_peer(wrong), logits, target)
    check_draws(case, eager_peer(FILTERS["top_p"]), logits, target)


def test_greedy_and_tokens_outside_the_vocabulary_are_caught():
    case = rows_of("none")
    greedy = Peer("x", lambda rows: peers.combine(rows).argmax(-1))
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
    any_of_them = Peer("x", lambda rows: torch.randint(40, (2,)))
    check_draws(case, any_of_them, logits, target)


def test_accept_is_coupled_verification():
    """On our own draws at every position it is what ``verify`` says."""
    case = Case("verify", vocab_size=300, batch_size=6, positions=4)
    [inputs] = make_inputs(case, 1, "cpu", BACKEND)
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
@pytest.mark.parametrize("op", ["sample", "verify", "verify-rejection"])
def test_ours_and_eager_pass_their_checks(op, filters):
    case = Case(op, "flat", filters, 500, 3, 1 if op == "sample" else 4)
    inputs, other = make_inputs(case, 2, "cpu", BACKEND)
    for name in ("ours", "eager") if op != "verify-rejection" else ("ours",):
        prepared = peers.prepare(case, name, inputs, OURS)
        for given in (inputs, other):
            prepared.check(given)


@pytest.mark.parametrize(
    ("op", "field", "by"),
    [("sample", "token_ids", 1), ("sample", "num_kept", 1), ("sample", "logprobs", 1e-4),
     ("verify", "token_ids", 1), ("verify", "num_accepted", 1), ("verify", "status", 1),
     ("verify", "logprobs", 1e-4)],
)  # fmt: skip
def test_what_is_wrong_is_caught(op, field, by):
    case = Case(op, "flat", vocab_size=300, batch_size=3, positions=3 if op == "verify" else 1)
    [inputs] = make_inputs(case, 1, "cpu", BACKEND)
    out = peers.operator(case, inputs, case.params("cpu"), backend=BACKEND)
    peers.check_ours(case, inputs, case.params("cpu"), out)
    getattr(out, field).add_(by)
    with pytest.raises(AssertionError, match=field):
        peers.check_ours(case, inputs, case.params("cpu"), out)


def test_heads():
    case = Case("sample_hidden", "random", vocab_size=300, batch_size=2)
    [inputs] = make_inputs(case, 1, "cpu", BACKEND)
    assert inputs.heads is not None
    for name in ("ours", "eager"):
        prepared = peers.prepare(case, name, inputs, OURS)
        prepared.check(inputs)
        out = prepared.call(inputs)
        wrong = out._replace(raw_logprobs=out.raw_logprobs + 3.0)
        with pytest.raises(AssertionError, match="raw logprobs off by"):
            check_heads(inputs.heads, 300, case.params("cpu"), wrong, 2, rounding=3 / 16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_the_compiled_chain_is_the_contract():
    """What torch.compile makes of the chain, whole: one graph."""
    case = Case("sample", vocab_size=600, batch_size=8)
    [inputs] = make_inputs(case, 1, "cpu", BACKEND)
    torch.compiler.reset()
    peers.prepare(case, "torch.compile", inputs, OURS).check(inputs)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_the_sanitizers_watch_runs():
    call_operators("cpu", BACKEND, 1000, "peaked", every=True)
