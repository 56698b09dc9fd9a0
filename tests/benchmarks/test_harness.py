"""The harness: statistics, turns, memory, lines of results, options, and the check of samplers."""

import json
import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import typer

import proxytune_kernels as ptk
from benchmarks.harness import memory, report
from benchmarks.harness.measure import (
    calibrate,
    in_turns,
    ratios,
    sample_seconds,
    speed_over,
    summary,
    time_in_turns,
    timed,
)
from benchmarks.harness.memory import in_fresh_process, peak_memory
from benchmarks.harness.options import parse_choices, parse_integers, user_errors
from benchmarks.harness.samplers import (
    DTYPES,
    FILTERS,
    KINDS,
    Candidates,
    OpCase,
    check_peer,
    contract_distribution,
    make_logits,
)
from benchmarks.kernels import OURS, PEERS, make_calls

EAGER_PEERS = [PEERS[name] for name in ("transformers", "torch", "numpy")]


def test_summary():
    values = [float(v) for v in range(100, -1, -1)]
    assert summary(values) == {"median": 50.0, "p10": 10.0, "p90": 90.0, "count": 101}
    with pytest.raises(ValueError, match="at least one measurement"):
        summary([])


def test_paired_ratios_cancel_what_slows_a_repeat():
    slowdown = [1.0, 8.0, 1.0, 3.0]
    a, b = ([seconds * s for s in slowdown] for seconds in (6.0, 2.0))
    assert ratios(a, b) == {"median": 3.0, "p10": 3.0, "p90": 3.0, "count": 4}
    assert speed_over("b", {"a": a, "b": b}, ("a", "b", "c")) == {"a": ratios(a, b)}
    with pytest.raises(ValueError):
        ratios([1.0, 2.0], [1.0])


def test_all_take_turns_and_the_warm_up_is_dropped():
    ran = []

    def call(name):
        def run(repeat):
            ran.append((name, repeat))
            return repeat

        return run

    ticks: list[str] = []
    calls = {"a": call("a"), "b": call("b")}
    assert in_turns(calls, 2, ticks.append, warm_up=True) == {"a": [0, 1], "b": [0, 1]}
    assert ran == [("a", 0), ("b", 0)] * 2 + [("a", 1), ("b", 1)]
    assert ticks == ["a", "b"] * 3
    assert in_turns(calls, 1) == {"a": [0], "b": [0]}


def test_a_sample_shrugs_off_interruptions(monkeypatch):
    """One call in ten takes a hundred times as long: the sample is that of the other nine."""
    now, calls = [0.0], [0]
    monkeypatch.setattr("benchmarks.harness.measure.time.perf_counter", lambda: now[0])

    def call():
        calls[0] += 1
        now[0] += 0.05 if calls[0] % 10 == 0 else 0.0005

    size = calibrate(call)
    assert size == (1, 10)
    assert sample_seconds(call, *size) == pytest.approx(0.0005)


def test_times_are_seconds_per_call(monkeypatch):
    """On a clock that each call advances: what comes out does not depend on how often it looped."""
    now = [0.0]
    monkeypatch.setattr("benchmarks.harness.measure.time.perf_counter", lambda: now[0])

    def lasting(seconds):
        def call():
            now[0] += seconds

        return call

    seconds = time_in_turns({"short": lasting(0.0001), "long": lasting(0.25)}, 2)
    assert seconds["short"] == pytest.approx([0.0001] * 2)
    assert seconds["long"] == pytest.approx([0.25] * 2)
    assert timed(lasting(3.0))[1] == pytest.approx(3.0)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only")
def test_peak_memory_sees_what_was_freed_and_starts_anew():
    torch.ones(64)  # pages the code in
    size = 64 * 2**20
    peak = peak_memory(lambda: torch.ones(size // 4))
    slack = 2 * 2**20  # the kernel's batched counts (0.3 MB), the interpreter's own allocations
    assert size - slack <= peak["extra_bytes"] <= size + slack
    assert peak["total_bytes"] > peak["extra_bytes"]
    assert peak_memory(lambda: None)["extra_bytes"] < slack


def test_fresh_process():
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="Expecting value"):
        in_fresh_process(json.loads, "no json")


def test_no_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing")
    with pytest.raises(RuntimeError, match="needs Linux"):
        peak_memory(lambda: None)


def test_json_lines_stand_alone(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    report.write_json_lines(path, "demo", [{"provider": "a", "x": 1.5}])
    report.write_json_lines(path, "demo", [{"x": 2}], {"device": "other"}, append=True)
    one, two = [json.loads(line) for line in path.read_text().splitlines()]
    assert (one["benchmark"], one["provider"], one["x"], two["x"]) == ("demo", "a", 1.5, 2)
    where = one["environment"]
    assert set(where) == set(report.environment())
    assert {"revision", "dirty", "device_name", "cores", "threads", "load", "triton"} <= set(where)
    assert where["torch"] == torch.__version__
    assert where["threads"] == torch.get_num_threads()
    assert two["environment"]["device"] == "other"


def test_tables(capsys):
    records: list[dict[str, Any]] = [{"a": {"median": 0.5}, "case": "x"}, {"a": None, "case": "y"}]
    columns: list[report.Column] = [("share", "a/median", report.percent), ("case", "case", str)]
    report.print_records("", "", records, columns, lambda r: f"case {r['case']}")
    said = capsys.readouterr().out
    assert "50.0%" in said and " - " in said.replace("\n", " ")
    assert said.index("case x") < said.index("50.0%") < said.index("case y")
    assert [report.significant(v) for v in (1234.4, 12.34, 1.234)] == ["1,234", "12.3", "1.23"]
    assert report.decimals(1, 1e3)(0.5) == "500.0"


def test_options_name_what_is_wrong():
    assert parse_choices("--kinds", "b,a", ("a", "b"), None) == ["b", "a"]
    assert parse_choices("--sizes", None, (1, 2), 2) == [2]
    assert parse_choices("--sizes", "1", (1, 2), 2) == [1]
    with pytest.raises(typer.BadParameter, match="--kinds must be among a, b, got 'c'"):
        parse_choices("--kinds", "a,c", ("a", "b"), None)
    assert parse_integers("--rows", "1,20", 1, 20) == [1, 20]
    for text in ("0", "21", "1,many", "", "-1", "٣"):
        with pytest.raises(typer.BadParameter, match="--rows must hold integers from 1 to 20"):
            parse_integers("--rows", text, 1, 20)
    with pytest.raises(typer.BadParameter, match="no trio"), user_errors():
        raise ValueError("no trio")


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


@pytest.mark.parametrize("wrong", ["none", "top_k+top_p"])
@pytest.mark.parametrize("make_peer", EAGER_PEERS)
def test_wrong_filter_is_caught(make_peer, wrong):
    case = small(kind="flat")
    logits, peer = case.logits(), make_peer(FILTERS[wrong])
    with pytest.raises(AssertionError, match=f"{peer.name} differs from the contract"):
        check_peer(case, peer, logits, contract_distribution(case, logits))


def test_swapped_models_and_one_token_too_few_are_caught():
    case = small()
    base, expert, anti = logits = case.logits()
    target, peer = contract_distribution(case, logits), PEERS["torch"](FILTERS["top_p"])

    def shorter(rows):
        assert peer.distribution is not None
        mass, ids = peer.distribution(rows)
        last = (mass > 0).sum(-1, keepdim=True) - 1
        return Candidates(mass.scatter(-1, last, 0.0), ids)

    for wrong, given in (
        (peer, (base, anti, expert)),
        (replace(peer, distribution=shorter), logits),
    ):
        with pytest.raises(AssertionError, match="differs from the contract"):
            check_peer(case, wrong, given, target)


def test_wrong_ours_is_caught(monkeypatch):
    case, right = small(), ptk.sample

    def unfiltered(base, expert, anti, params, **options):
        if options.get("backend") == "reference":
            return right(base, expert, anti, params, **options)
        return right(base, expert, anti, params._replace(top_p=torch.ones(len(base))), **options)

    make_calls(case, [OURS])[OURS]()
    monkeypatch.setattr("benchmarks.harness.samplers.ptk.sample", unfiltered)
    with pytest.raises(AssertionError, match="ours has (token_ids|num_kept)"):
        make_calls(case, [OURS])


def test_peaked_rows_are_like_the_real_trio():
    """Loosely: the entropy and kept set that the generator was fitted to, 2.2 nats and 3 tokens."""
    base, expert, anti = OpCase(vocab_size=151_936, batch_size=48).logits()
    logprobs = (base + (expert - anti)).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    # The entropy's spread over rows is about 1.3 nats, so the median of 48 is good to about 0.25.
    assert 1.4 < entropy.median() < 2.9
    assert base.isfinite().all()


def test_logits():
    assert OpCase(vocab_size=1000, batch_size=4).logits_bytes == 48_000
    assert OpCase(dtype="bfloat16", vocab_size=1000, batch_size=4).logits_bytes == 24_000
    one, other = (make_logits("flat", 1, 100, torch.float32, seed)[0] for seed in (0, 1))
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="kind must be one of"):
        make_logits("round", 1, 10, torch.float32)
