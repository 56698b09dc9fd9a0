"""What can't be right is refused by name: operator, argument, what it got and what it wanted."""

# ruff: noqa: E501 (a table: one case a line)
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import proxytune_kernels as ptk
from proxytune_kernels.ops.backends import backends
from proxytune_kernels.ops.table import OPERATORS
from tests.ops.conftest import WIDEST, Backend, move, registered, sized

X = torch.zeros(2, 8)
XT = torch.zeros(2, 3, 8)
IDS = torch.zeros(2, 3, dtype=torch.int64)
DRAFTS = IDS[:, 1:]
ROWS = ptk.RowParams.make(2)
MASK = torch.zeros(2, 1, dtype=torch.int32)
META = torch.zeros(2, 8, device="meta")
OUT = ptk.sample(X)
VERIFIED = ptk.verify(XT, None, None, DRAFTS)

# operator, arguments, keywords, error, and what the message holds, in this order
SHARED = {
    "a list": (([[0.0]], None, None), TypeError, "base must be a tensor, got list"),
    "dims": ((X[0], None, None), ValueError, "base must have shape [B, V], got [8]"),
    "fp64": ((X.double(), None, None), ValueError, "base must be float32, bfloat16 or float16, got torch.float64"),
    "columns": ((X[:, ::2], None, None), ValueError, "base must be contiguous in its last dimension, got stride 2"),
    "half a pair": ((X, X, None), ValueError, "anti must be given with the other of the pair, got None"),
    "other half": ((X, None, X), ValueError, "expert must be given with the other of the pair, got None"),
    "batch": ((X, X[:1], X), ValueError, "expert must have shape [2, 'V'] like base, got [1, 8]"),
    "device": ((X, X, META), ValueError, "anti must be on cpu like base, got meta"),
    "expert ints": ((X, X.int(), X), ValueError, "expert must be float32, bfloat16 or float16, got torch.int32"),
}  # fmt: skip
KEYWORDS = {
    "vocab wide": (dict(vocab_size=9), ValueError, "vocab_size must be at most the narrowest role's width 8, got 9"),
    "vocab 0": (dict(vocab_size=0), ValueError, "vocab_size must be in [1, 2^19], got 0"),
    "vocab bool": (dict(vocab_size=True), TypeError, "vocab_size must be an integer, got True"),
    "vocab float": (dict(vocab_size=4.0), TypeError, "vocab_size must be an integer, got 4.0"),
    "backend": (dict(backend="gpu"), ValueError, "backend must be one of ['cpu', 'cuda', 'reference'"),
}  # fmt: skip
BIAS_AND_MASK = {
    "bias dtype": (dict(bias=X.half()), ValueError, "bias must be torch.float32 of shape [2, 8], got torch.float16"),
    "bias shape": (dict(bias=X[:, :7]), ValueError, "bias must be torch.float32 of shape [2, 8], got torch.float32 of shape [2, 7]"),
    "mask dtype": (dict(allowed_mask=MASK.bool()), ValueError, "allowed_mask must be torch.int32 of shape [2, 1], got torch.bool"),
    "mask shape": (dict(allowed_mask=MASK[:1]), ValueError, "allowed_mask must be torch.int32 of shape [2, 1]"),
}  # fmt: skip
PARAMS = {
    "unknown": (dict(temprature=1.0), TypeError, "sample() got an unexpected keyword argument 'temprature'"),
    "temperature": (dict(temperature=-0.5), ValueError, "temperature must be 0 (greedy) or a positive finite number, got -0.5"),
    "top_k": (dict(top_k=1.5), ValueError, "top_k must be a positive integer, or 0 or -1 for off, got 1.5"),
    "top_p": (dict(top_p=0.0), ValueError, "top_p must be in (0, 1], got 0.0"),
    "min_p": (dict(min_p=2), ValueError, "min_p must be in [0, 1], got 2"),
    "order": (dict(filter_order="topk"), ValueError, "filter_order must be one of"),
    "seed": (dict(seed=2**64), ValueError, "seed must be an integer in [-2^63, 2^64), got 18446744073709551616"),
    "position": (dict(position=-1), ValueError, "position must be an integer of at least 0, got -1"),
    "tensor shape": (dict(top_p=torch.ones(3)), ValueError, "top_p must have shape [2], one value per row, got [3]"),
    "tensor kind": (dict(top_k=torch.ones(2)), ValueError, "top_k must be convertible to torch.int32, got torch.float32"),
    "alpha": (dict(alpha=float("inf")), ValueError, "alpha must"),
    "alpha past fp32": (dict(alpha=1e300), ValueError, "alpha must"),
    "temperature past fp32": (dict(temperature=1e300), ValueError, "temperature must"),
    "top_k past int32": (dict(top_k=2**40), ValueError, "top_k must"),
    "position past int64": (dict(position=2**63), ValueError, "position must"),
    "seeds of fp32": (dict(seed=torch.zeros(2)), ValueError, "seed must be convertible to torch.int64, got torch.float32"),
    "both": (dict(params=ROWS, top_p=0.5), TypeError, "give params or single parameters, not both; got params and ['top_p']"),
    "params type": (dict(params={"top_p": 1}), TypeError, "params must be RowParams, SamplingParams or a sequence of the latter, got dict"),
    "params dtype": (dict(params=ROWS._replace(top_p=ROWS.top_p.double())), ValueError, "params.top_p must be torch.float32 of shape [2], got torch.float64"),
    "params length": (dict(params=ptk.RowParams.make(3)), ValueError, "params.alpha must be torch.float32 of shape [2], got torch.float32 of shape [3]"),
    "no seed": (dict(params=[ptk.SamplingParams()] * 2), ValueError, "seed must be set in each SamplingParams, got None: use with_seed()"),
}  # fmt: skip

TOP_LOGPROBS = [
    ("negative", -1, ValueError, "top_logprobs must be in [0, 128], got -1"),
    ("many", 129, ValueError, "top_logprobs must be in [0, 128], got 129"),
    ("float", 2.0, TypeError, "top_logprobs must be an integer, got 2.0"),
    ("zero float", 0.0, TypeError, "top_logprobs must be an integer, got 0.0"),
    ("bool", True, TypeError, "top_logprobs must be an integer, got True"),
    ("none", None, TypeError, "top_logprobs must be an integer, got None"),
]
TOP: Any = ptk.sample(X, top_logprobs=3).top
TOP_OUT: list[Any] = [
    ("none", None, TypeError, "out.top must be a TopLogprobs, got NoneType"),
    ("tuple", tuple(TOP), TypeError, "out.top must be a TopLogprobs, got tuple"),
    ("columns", ptk.sample(X, top_logprobs=4).top, ValueError, "out.top.token_ids must be contiguous torch.int64 of shape [2, 3], got torch.int64 of shape [2, 4]"),
    ("rows", TOP._replace(logprobs=TOP.logprobs[:1]), ValueError, "out.top.logprobs must be contiguous torch.float32 of shape [2, 3], got torch.float32 of shape [1, 3]"),
    ("dtype", TOP._replace(token_ids=TOP.token_ids.int()), ValueError, "out.top.token_ids must be contiguous torch.int64 of shape [2, 3], got torch.int32"),
    ("strides", TOP._replace(logprobs=TOP.logprobs.T.contiguous().T), ValueError, "out.top.logprobs must be contiguous torch.float32 of shape [2, 3]"),
    ("device", TOP._replace(logprobs=TOP.logprobs.to("meta")), ValueError, "out.top.logprobs must be on cpu like base, got meta"),
]  # fmt: skip


VERIFY = (XT, None, None, DRAFTS)
REJECTION: dict[str, Any] = dict(mode="rejection")
OWN: list[tuple[str, str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("sample", "one entry", (X,), dict(params=[ptk.SamplingParams(seed=1)]), ValueError, "params must have one entry per row (2), got 1"),
    ("sample", "noise stream", (X,), dict(noise_stream="noise"), ValueError, "noise_stream must be one of ['sample', 'draft'"),
    ("sample", "out type", (X,), dict(out=X), TypeError, "out must be a SampleOutput, got Tensor"),
    ("sample", "out shape", (X,), dict(out=OUT._replace(status=OUT.status[:1])), ValueError, "out.status must be contiguous torch.int32 of shape [2]"),
    ("combine", "alpha", (X, X, X, "1"), {}, ValueError, "alpha must be a finite number, got '1'"),
    ("combine", "alpha nan", (X, X, X, float("nan")), {}, ValueError, "alpha must be a finite number, got nan"),
    ("combine", "alpha fp64", (X, X, X, torch.ones(2).double()), {}, ValueError, "alpha must be a number or torch.float32 of shape [2], got torch.float64"),
    ("combine", "out", (X, X, X), dict(out=X[:, :7]), ValueError, "out must be contiguous torch.float32 of shape [2, 8]"),
    ("score", "dims", (X, None, None, IDS), {}, ValueError, "base must have shape [B, T, V], got [2, 8]"),
    ("score", "ids dtype", (XT, None, None, IDS.int()), {}, ValueError, "token_ids must be torch.int64 of shape [2, 3], got torch.int32"),
    ("score", "ids shape", (XT, None, None, IDS[:, :2]), {}, ValueError, "token_ids must be torch.int64 of shape [2, 3]"),
    ("score", "alpha", (XT, XT, XT, IDS, torch.ones(3)), {}, ValueError, "alpha must be a number or torch.float32 of shape [2]"),
    ("score", "positions", (XT[:, :0], None, None, IDS[:, :0]), {}, ValueError, "base must have at least one position"),
    ("score", "out", (XT, None, None, IDS), dict(out=X), ValueError, "out must be contiguous torch.float32 of shape [2, 3]"),
    ("verify", "drafts", (XT, None, None, IDS), {}, ValueError, "draft_token_ids must be torch.int64 of shape [2, 2]"),
    ("verify", "mode", VERIFY, dict(mode="typical"), ValueError, "mode must be one of ['coupled', 'rejection'], got 'typical'"),
    ("verify", "no draft logits", VERIFY, REJECTION, ValueError, "draft_logits must be given in mode 'rejection', got None"),
    ("verify", "draft logits", VERIFY, dict(draft_logits=XT), ValueError, "draft_logits must be None in mode 'coupled'"),
    ("verify", "draft shape", VERIFY, dict(draft_logits=XT) | REJECTION, ValueError, "draft_logits must have shape [2, 2, 'V'] with V at least 8, got [2, 3, 8]"),
    ("verify", "draft width", VERIFY, dict(draft_logits=XT[:, :2, :7]) | REJECTION, ValueError, "draft_logits must have shape"),
    ("verify", "bias", VERIFY, dict(bias=X), ValueError, "bias must be torch.float32 of shape [2, 3, 8]"),
    ("verify", "params", VERIFY, dict(params=ptk.RowParams.make(1)), ValueError, "params.alpha must be torch.float32 of shape [2]"),
    ("verify", "one entry", VERIFY, dict(params=[ptk.SamplingParams(seed=1)]), ValueError, "params must have one entry per row (2), got 1"),
    ("verify", "out", VERIFY, dict(out=VERIFIED._replace(token_ids=IDS[:, 1:])), ValueError, "out.token_ids must be contiguous torch.int64 of shape [2, 3]"),
]  # fmt: skip


def _cases():
    calls = {"sample": (X, None, None), "combine": (X, None, None, 1.0), "score": (XT, None, None, IDS), "verify": VERIFY}  # fmt: skip
    for op, call in calls.items():
        for name, (kwargs, error, text) in KEYWORDS.items():
            yield op, name, call, kwargs, error, f"{op}: {text}"
    for op in ("sample", "combine"):
        for name, (roles, error, text) in SHARED.items():
            yield op, name, (*roles, *calls[op][3:]), {}, error, f"{op}: {text}"
        for name, (kwargs, error, text) in BIAS_AND_MASK.items():
            yield op, name, calls[op], kwargs, error, f"{op}: {text}"
    for op in ("score", "verify"):
        for name, roles in (("half a pair", (XT, XT, None)), ("other half", (XT, None, XT))):
            yield op, name, (*roles, *calls[op][3:]), {}, ValueError, f"{op}: {SHARED[name][2]}"
    for op in ("sample", "verify"):
        for name, (kwargs, error, text) in PARAMS.items():
            yield op, name, calls[op], kwargs, error, text.replace("sample()", f"{op}()")
    for name, value, error, text in TOP_LOGPROBS:
        yield "sample", f"top {name}", (X,), dict(top_logprobs=value), error, f"sample: {text}"
    for name, top, error, text in TOP_OUT:
        given = dict(top_logprobs=3, out=OUT._replace(top=top))
        yield "sample", f"out.top {name}", (X,), given, error, f"sample: {text}"
    for op, name, args, kwargs, error, text in OWN:
        yield op, name, args, kwargs, error, f"{op}: {text}"
    for name, reason in backends().items():
        if reason is not None:
            text = f"sample: backend {name!r} can't run: {reason}"
            yield "sample", name, (X,), dict(backend=name), RuntimeError, text


CASES = list(_cases())


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "error", "text"),
    [(op, *rest) for op, _, *rest in CASES],
    ids=[f"{op}-{name}" for op, name, *_ in CASES],
)
@pytest.mark.parametrize("name", [kernel.name for kernel in WIDEST] or ["reference"])
def test_message(name, op, args, kwargs, error, text):
    device = Backend(name).device
    text = text.replace("on cpu", f"on {move(X, device).device}")
    args, kwargs = move(tuple(args), device), {n: move(v, device) for n, v in kwargs.items()}
    with pytest.raises(error, match=re.escape(text)):
        getattr(ptk, op)(*args, **{"backend": name} | kwargs)


@pytest.mark.parametrize("args", [(X[:, ::2],), (X.double(),), (X, X[:1], X), (X, X, None)])
def test_the_operators_themselves_stay_in_bounds(widest, args):
    """Direct callers of torch.ops meet a check too, if a plainer one."""
    base, expert, anti = (*args, None, None)[:3]
    with pytest.raises((RuntimeError, ValueError), match="proxytune: |sample: "):
        widest.operator("sample")(base, expert, anti, *ROWS, None, None, None, None, 4, 0, 0, None)


@pytest.mark.parametrize("number", (-1, 129, 2**32 + 1, 2**62))
def test_the_operators_themselves_refuse_more_likeliest_tokens_than_fit(widest, number):
    arguments = (X, None, None, *ROWS, None, None, None, None, 8, 0)
    refused = pytest.raises((RuntimeError, ValueError), match="(proxytune|sample): top_logprobs")
    with refused:
        widest.operator("sample")(*arguments, number, None)
    names = OPERATORS["sample"].out_names
    out: dict[str, Any] = dict(zip(names, (*OUT[:-2], *TOP), strict=False))
    wide = dict(out)
    if 0 <= number < 2**32:  # outputs that would fit
        wide |= {n: t.new_zeros(2, number) for n, t in out.items() if n.startswith("out_top")}
    with refused:
        widest.operator("sample_out")(*arguments, number, None, **wide)
    with pytest.raises((RuntimeError, ValueError), match="top_?.token_ids"):
        widest.operator("sample_out")(*arguments, 4, None, **out)


@pytest.mark.parametrize("number", (5, 256, 2**32, 2**32 + 1, -1, -(2**32), 2**62))
def test_the_operators_themselves_refuse_streams_and_modes_past_the_last(widest, number):
    """Also numbers whose low bits are one that there is."""
    with pytest.raises((RuntimeError, ValueError), match="noise_stream"):
        widest.operator("sample")(X, None, None, *ROWS, None, None, None, None, 8, number, 0, None)
    with pytest.raises((RuntimeError, ValueError), match="mode"):
        widest.operator("verify")(
            XT, None, None, DRAFTS, None, *ROWS, None, None, None, None, 8, number
        )


def test_the_cpus_head_refuses_tokens_that_there_are_not():
    if backends()["cpu"] is not None:
        pytest.skip("the C++ extension is not built")
    most = 2**63 - 1
    for begin, end in ((-most - 1, most), (most, -most - 1), (0, 4), (-1, 2), (2, 2)):
        with pytest.raises(RuntimeError, match="tokens must be in"):
            torch.ops.proxytune.head_logits_out(X, X[:1].expand(3, 8), begin, end, out_logits=X)


WANTS, WANT_T = X.clone().requires_grad_(), XT.clone().requires_grad_()
WANTS_ALPHA = torch.ones(2, requires_grad=True)
WEIGHT = torch.nn.Parameter(torch.zeros(9, 8))
GRADIENTS: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("sample", "base", (WANTS, X, X), {}),
    ("sample", "expert", (X, WANTS, X), {}),
    ("sample", "anti", (X, X, WANTS), {}),
    ("sample", "bias", (X,), dict(bias=WANTS)),
    ("sample", "params.alpha", (X,), dict(params=ROWS._replace(alpha=WANTS_ALPHA))),
    ("sample_hidden", "base.hidden", (ptk.Head(WANTS, WEIGHT),), {}),
    ("combine", "expert", (X, WANTS, X), {}),
    ("combine", "alpha", (X, X, X, WANTS_ALPHA), {}),
    ("score", "anti", (XT, XT, WANT_T, IDS), {}),
    ("verify", "base", (WANT_T, None, None, DRAFTS), {}),
]


@registered
@pytest.mark.parametrize(("op", "name", "args", "kwargs"), GRADIENTS, ids=lambda v: str(v)[:13])
def test_a_gradient_is_refused(backend, op, name, args, kwargs):
    """None would come: it is said, unless no gradient is recorded."""
    run = getattr(backend, op)
    with torch.no_grad():
        out = run(*args, **kwargs)
    text = re.escape(f"{op}: {name} must not require grad")
    for given in (None, out):
        with pytest.raises(ValueError, match=text):
            run(*args, **kwargs, out=given)


@registered
def test_weights_and_what_is_detached_may_want_one(backend):
    out = backend.sample_hidden(ptk.Head(WANTS.detach(), WEIGHT))
    assert not out.logprobs.requires_grad


def test_a_gradient_is_refused_in_a_compiled_function():
    compiled = torch.compile(lambda x: ptk.sample(x).token_ids, backend="eager", fullgraph=True)
    assert (compiled(X) >= 0).all()
    with pytest.raises(Exception, match="gradient|require grad"):
        compiled(WANTS)


def _overlapping() -> Iterator[tuple[str, str, str, tuple[Any, ...], Any]]:
    """Operator, the output and what it overlaps, arguments, outputs."""
    memory = torch.zeros(64)
    base = memory[:16].view(2, 8)
    inside = OUT._replace(logprobs=memory[15:17])  # by its first element
    yield "sample", "out.logprobs", "base", (base,), inside
    yield (
        "sample",
        "out.raw_logprobs",
        "out.logprobs",
        (X,),
        OUT._replace(raw_logprobs=OUT.logprobs),
    )
    yield "combine", "out", "anti", (X, X, base), base
    yield "combine", "out", "alpha", (X, X, X, memory[:2]), base
    wide = torch.zeros(2, 3, 10)
    yield "score", "out", "base", (wide[..., :8], None, None, IDS), wide.view(-1)[35:41].view(2, 3)
    ids = torch.zeros(10, dtype=torch.int64)
    drafts = ids[6:].view(2, 2)
    verified = VERIFIED._replace(token_ids=ids[1:7].view(2, 3))
    yield "verify", "out.token_ids", "draft_token_ids", (XT, None, None, drafts), verified


@registered
@pytest.mark.parametrize(
    ("op", "name", "other", "args", "out"), list(_overlapping()), ids=lambda v: str(v)[:15]
)
def test_outputs_that_overlap_are_refused(backend, op, name, other, args, out):
    if backend.device != "cpu":
        pytest.skip("tensors are copied to the device one by one")
    with pytest.raises(ValueError, match=re.escape(f"{op}: {name} must not overlap {other}")):
        getattr(backend, op)(*args, out=out)


@registered
def test_outputs_between_the_rows_of_an_argument_are_taken(backend):
    wide = torch.zeros(2, 16)
    out = OUT._replace(logprobs=wide[0, 8:10], raw_logprobs=wide[1, 9:11])
    assert backend.sample(wide[:, :8], out=out) is out


def test_the_operators_themselves_refuse_outputs_that_overlap(widest):
    if widest.device != "cpu":
        pytest.skip("tensors are copied to the device one by one")
    for op, _, _, args, out in _overlapping():
        if op != "sample":
            continue
        top = torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0)
        written = dict(zip(OPERATORS[op].out_names, (*out[:-2], *top), strict=False))
        with pytest.raises((RuntimeError, ValueError), match="must not overlap"):
            widest.operator("sample_out")(
                *args, None, None, *ROWS, None, None, None, None, 8, 0, 0, None, **written
            )


def test_the_widest_vocabulary(widest):
    row = torch.zeros(1, 2**19 + 1)
    # Greedy in the interpreter: without filters it takes a minute.
    out = widest.sample(row, vocab_size=2**19, temperature=sized(widest, 1.0, 0.0))
    assert int(out.num_kept) == sized(widest, 2**19, 1) and 0 <= int(out.token_ids) < 2**19
    with pytest.raises(ValueError, match=re.escape("vocab_size must be in [1, 2^19], got 524289")):
        widest.sample(row)
