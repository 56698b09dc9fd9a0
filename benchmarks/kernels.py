"""The operators alone: ``sample`` beside its peers, ``sample_hidden`` beside heads and ``sample``.

``python -m benchmarks.kernels --help``; docs/benchmarks.md says how each figure is obtained, and
docs/heads.md what the heads' mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle, product
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.harness import options, report, samplers
from benchmarks.harness.measure import ratios, summary, time_in_turns
from benchmarks.harness.options import parse_choices, parse_integers
from benchmarks.harness.samplers import Candidates, Filters, Heads, Logits, OpCase, Peer
from proxytune_kernels import reference

Record = dict[str, Any]
Calls = dict[str, Callable[[], object]]

BATCH_SIZES = (1, 8, 64)
DEFAULT_CASES: tuple[OpCase, ...] = (
    *(OpCase(k, d) for k in samplers.KINDS for d in samplers.DTYPES),
    *(OpCase(filters=name) for name in ("none", "top_k+top_p")),
    *(OpCase(vocab_size=size) for size in (32_000, 151_936)),
    *(OpCase(batch_size=rows) for rows in (8, 64)),
    OpCase(vocab_size=1),
)
"""A representative subset, each axis varied on its own; last, a call that has nothing to do."""

# The peers: each the best form that we know.


def softmax_only(logits: Logits) -> Tensor:
    """The yardstick: one softmax of the combination; it filters and draws nothing."""
    base, expert, anti = logits
    return torch.softmax(base + (expert - anti), dim=-1)


_PREFILTER = 256  # likeliest tokens among which the top-p set is looked for first


def torch_distribution(logits: Logits, filters: Filters) -> Candidates:
    """The fewest torch operations that give the exact set.

    Without a filter no sort; with top_k only the k likeliest; with top_p the likeliest
    :data:`_PREFILTER` and, where they do not hold enough mass (a flat row), the whole row sorted.
    """
    base, expert, anti = (x.float() for x in logits)
    x = torch.add(base, expert - anti, alpha=samplers.ALPHA).div_(filters.temperature)
    mass = torch.softmax(x, dim=-1)
    if filters.top_k:
        top, ids = mass.topk(filters.top_k, dim=-1)
        return Candidates(samplers.top_p_prefix(top, top.sum(-1, keepdim=True), filters.top_p), ids)
    if filters.top_p >= 1:
        return Candidates(mass, None)
    top, ids = mass.topk(min(_PREFILTER, mass.shape[-1]), dim=-1)
    if not (top.sum(-1) >= filters.top_p).all():
        top, ids = mass.sort(dim=-1, descending=True)
    return Candidates(samplers.top_p_prefix(top, 1.0, filters.top_p), ids)


def torch_draw(candidates: Candidates) -> Tensor:
    """Inverse of the cumulative distribution; much cheaper than multinomial on a CPU."""
    cumulative = candidates.probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    column = torch.searchsorted(cumulative, total * (1 - torch.rand_like(total)))
    return candidates.tokens(column)


def numpy_distribution(logits: Logits, filters: Filters) -> Candidates:
    """In numpy: partition for the likeliest tokens; for a flat row, sort values, not indices.

    A flat row's cut is a value, so that tokens tied at it are all kept.
    """
    base, expert, anti = (x.float().numpy() for x in logits)
    x = expert - anti
    x *= samplers.ALPHA
    x += base
    x -= x.max(-1, keepdims=True)
    x /= filters.temperature
    mass = np.exp(x, out=x)
    if filters.top_k == 0 and filters.top_p >= 1:
        return Candidates(mass, None)
    size = filters.top_k or min(_PREFILTER, mass.shape[-1])
    ids = np.argpartition(mass, -size, axis=-1)[:, -size:]
    top = np.take_along_axis(mass, ids, axis=-1)
    order = np.argsort(-top, axis=-1)
    ids, top = np.take_along_axis(ids, order, axis=-1), np.take_along_axis(top, order, axis=-1)
    total = (top if filters.top_k else mass).sum(-1, keepdims=True, dtype=np.float64)
    if filters.top_k or (top.sum(-1, keepdims=True) >= filters.top_p * total).all():
        return Candidates(_numpy_prefix(top, total, filters), ids)
    rising = np.sort(mass, axis=-1)
    falling = _numpy_prefix(rising[:, ::-1], total, filters)
    lowest = np.take_along_axis(falling, (falling > 0).sum(-1, keepdims=True) - 1, axis=-1)
    return Candidates(np.where(mass >= lowest, mass, 0), None)


def _numpy_prefix(sorted_mass: Any, total: Any, filters: Filters) -> Any:
    before = sorted_mass.cumsum(-1, dtype=np.float64) - sorted_mass
    return np.where(before < filters.top_p * total, sorted_mass, 0)


_GENERATOR = np.random.default_rng(0)


def numpy_draw(candidates: Candidates) -> Any:
    """As :func:`torch_draw`."""
    cumulative = candidates.probabilities.cumsum(-1)
    targets = cumulative[:, -1] * (1 - _GENERATOR.random(len(cumulative)))
    columns = [np.searchsorted(c, t) for c, t in zip(cumulative, targets, strict=True)]
    if candidates.token_ids is None:
        return np.array(columns)
    return candidates.token_ids[np.arange(len(columns)), columns]


PEERS: dict[str, Callable[[Filters], Peer]] = {
    "transformers": samplers.transformers_peer,
    "torch": lambda f: Peer.of("torch", partial(torch_distribution, filters=f), torch_draw),
    "numpy": lambda f: Peer.of("numpy", partial(numpy_distribution, filters=f), numpy_draw),
}
OURS, EDITED, YARDSTICK = "ours", "ours + 256 edits", "softmax only"
PROVIDERS = (OURS, EDITED, YARDSTICK, *PEERS)
"""In the order of tables."""
ATTRIBUTION = "attribution"
"""Ours with attribution: a provider that is timed where it is named."""


class Work(NamedTuple):
    """A case: its fields of a line of results, and what makes and checks the calls to time.

    ``ours`` is the provider that the others' times are over, ``size`` the bytes that a call reads.
    """

    about: Record
    make: Callable[[], Calls]
    ours: str
    size: int


def measure(works: Sequence[Work], repeats: int) -> list[Record]:
    """Check, then time every case, its calls in turn; one record per case and provider."""
    records: list[Record] = []
    with report.progress_bar(len(works)) as tick:
        for work in works:
            seconds = time_in_turns(work.make(), repeats)
            records += [
                {
                    "provider": name,
                    **work.about,
                    "microseconds": summary(times, 1e6),
                    "gigabytes_per_second": work.size / median(times) / 1e9,
                    "time_over_ours": (
                        ratios(times, seconds[work.ours]) if work.ours in seconds else None
                    ),
                }
                for name, times in seconds.items()
            ]
            tick("")
    return records


def sample_work(case: OpCase, providers: Sequence[str]) -> Work:
    """``sample`` and its peers on a case."""
    sampling = {"alpha": samplers.ALPHA, **asdict(samplers.FILTERS[case.filters])}
    about = {"op": "sample", **asdict(case), "sampling": sampling}
    return Work(about, partial(make_calls, case, providers), OURS, case.logits_bytes)


def make_calls(case: OpCase, providers: Sequence[str]) -> Calls:
    """What to time, after checking that each provider has the contract's distribution.

    At small batches a provider goes through four sets of logits in turn, so that no row's
    branches are learnt by heart. AssertionError: a provider is wrong.
    """
    sets = [case.logits(seed) for seed in range(4 if case.batch_size < 8 else 1)]
    target, params = samplers.contract_distribution(case, sets[0]), case.row_params()

    def checked(name: str) -> Callable[[Logits], object]:
        if name == YARDSTICK:
            return softmax_only
        if name == EDITED:
            edits = many_edits(case.batch_size, case.vocab_size)
            wanted = ptk.sample(*sets[0], params, edits=edits, backend="reference")
            samplers.check_outputs(str(case), ptk.sample(*sets[0], params, edits=edits), wanted)
            return lambda logits: ptk.sample(*logits, params, edits=edits)
        if name == ATTRIBUTION:
            return lambda logits: ptk.sample(*logits, params, attribution=True)
        if name == OURS:
            base, expert, anti = (x[: len(target.kept)] for x in sets[0])
            few = params.rows(slice(0, len(base)))
            wanted = ptk.sample(base, expert, anti, few, backend="reference")
            samplers.check_outputs(str(case), ptk.sample(*sets[0], params), wanted)
            return lambda logits: ptk.sample(*logits, params)
        peer = PEERS[name](samplers.FILTERS[case.filters])
        samplers.check_peer(case, peer, sets[0], target)
        return peer.sample

    def turning(call: Callable[[Logits], object]) -> Callable[[], object]:
        turn = cycle(sets)
        return lambda: call(next(turn))

    return {name: turning(checked(name)) for name in providers}


def many_edits(batch_size: int, vocab_size: int) -> ptk.Edits:
    """A long text's: 256 tokens of each row, all penalties and a bias."""
    g = torch.Generator().manual_seed(1)
    rows = [torch.randperm(vocab_size, generator=g)[:256] for _ in range(batch_size)]
    ids = torch.stack([torch.nn.functional.pad(row, (0, 256 - len(row)), value=-1) for row in rows])
    return ptk.Edits.make(
        ids,
        counts=ids % 4,
        in_prompt=ids % 2,
        bias=(ids % 9 - 4) / 8,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
    )


def print_times(title: str, records: Sequence[Record], read: str) -> None:
    """Table of times, a section for each case."""
    caption = (
        f"Microseconds a call. GB/s: bytes of the three roles' {read}, each counted once, over the "
        "time. x ours: paired by repeat."
    )
    columns: list[report.Column] = [
        ("provider", "provider", str),
        *((end, f"microseconds/{end}", report.significant) for end in ("median", "p10", "p90")),
        ("GB/s", "gigabytes_per_second", report.significant),
        ("x ours", "time_over_ours/median", report.significant),
    ]

    def section(r: Record) -> str:
        what = [str(r[key]) for key in ("shape", "kind", "dtype", "filters") if key in r]
        return f"{' '.join(what)}\nV={r['vocab_size']:,} B={r['batch_size']}"

    report.print_records(title, caption, records, columns, section)


# sample_hidden

FUSED, APART, PRODUCTS = "sample_hidden", "three heads, sample", "three heads alone"
_ACCURACY_ROWS = 64


def heads_work(shape: str, dtype: str, rows: int) -> Work:
    """Heads and sampling, fused and apart."""
    vocab_size, sizes = samplers.SHAPES[shape]

    def make() -> Calls:
        heads, params = (
            samplers.random_heads(shape, samplers.DTYPES[dtype], rows),
            OpCase(batch_size=rows).row_params(),
        )
        fused = partial(ptk.sample_hidden, *heads, params=params)
        samplers.check_heads(heads, vocab_size, params, fused(), 2)
        return {
            FUSED: fused,
            APART: lambda: ptk.sample(*samplers.logits_apart(heads, vocab_size), params),
            PRODUCTS: partial(samplers.logits_apart, heads, vocab_size),
        }

    about = {
        "op": FUSED, "shape": shape, "dtype": dtype, "batch_size": rows,
        "vocab_size": vocab_size, "hidden_sizes": sizes,
    }  # fmt: skip
    return Work(about, make, FUSED, vocab_size * sum(sizes) * samplers.DTYPES[dtype].itemsize)


def errors_of(heads: Heads, vocab_size: int) -> Record:
    """How far x is from exact heads' by both ways, and what that does to tokens.

    Fused: fp32 accumulators, combined in fp32. Apart: logits rounded to the heads' dtype, combined
    in fp32. The roles' alpha is 1, the filter top_p.
    """
    few = samplers.first_rows(heads, _ACCURACY_ROWS)
    exact, error = samplers.exact_x(few, vocab_size)
    params = OpCase(batch_size=len(exact)).row_params()
    wanted, drawn = reference.distribution(exact, params), reference.sample(exact, params)
    bound, largest = float(error.max()), float(exact.abs().max())
    found: Record = {"rows": len(exact), "largest_x": largest, "bound": bound}
    fused = [torch.empty(len(exact), vocab_size) for _ in few]
    for head, out in zip(few, fused, strict=True):
        hidden = head.hidden.float().contiguous()
        torch.ops.proxytune.head_logits_out(hidden, head.weight, 0, vocab_size, out_logits=out)
    ways = {FUSED: fused, APART: samplers.logits_apart(few, vocab_size)}
    for name, (base, expert, anti) in ways.items():
        x = reference.combine(base, expert, anti, params.alpha)
        off = (x.double() - exact).abs()
        kept = reference.distribution(x, params).kept
        found[name] = {
            "largest_error": float(off.max()),
            "rms_error": float(off.square().mean().sqrt()),
            "greedy_differs": int((x.argmax(-1) != exact.argmax(-1)).sum()),
            "kept_differs": int((kept != wanted.kept).any(-1).sum()),
            "token_differs": int((reference.sample(x, params).token_ids != drawn.token_ids).sum()),
        }
    return found


def measure_accuracy() -> list[Record]:
    """Errors of x in bf16: of the hidden states of the trios that are there, and random ones."""
    from benchmarks.harness.trios import TrioMissing, make_prompts, open_trio

    found = []
    for name in ("shipped", "qwen"):
        try:
            trio = open_trio(name, "bfloat16")
        except TrioMissing as error:
            report.say(f"No accuracy of {name}: {error}")
            continue
        ids = torch.tensor(make_prompts(trio, 4, _ACCURACY_ROWS // 4))
        with torch.no_grad():
            base, expert, anti = (
                ptk.Head.of(model, model.base_model(ids).last_hidden_state.flatten(0, 1))
                for model in trio.models.values()
            )
        found.append({"heads": f"{name} trio", **errors_of((base, expert, anti), trio.vocab_size)})
    heads = samplers.random_heads("llama-2", torch.bfloat16, _ACCURACY_ROWS)
    vocab_size, _ = samplers.SHAPES["llama-2"]
    found.append({"heads": "llama-2 shape, random", **errors_of(heads, vocab_size)})
    return [{"op": "heads accuracy", **record} for record in found]


ACCURACY: tuple[report.Column, ...] = (
    ("x in bf16 models", "name", str),
    ("largest error", "largest_error", "{:.2g}".format),
    ("rms", "rms_error", "{:.2g}".format),
    ("greedy", "greedy_differs", str),
    ("kept", "kept_differs", str),
    ("drawn", "token_differs", str),
    ("bound", "bound", "{:.2g}".format),
)
ACCURACY_CAPTION = (
    "Against exact heads, fp64, at alpha 1. greedy, kept, drawn: rows whose likeliest token, "
    "kept set (T 0.7, top_p 0.9) or draw of the same seed is another. bound: of sample_hidden."
)


# How like a real trio's the peaked logits are

_SKIPPED = 8  # the first positions have too little context to be typical


def row_statistics(x: Tensor) -> dict[str, Tensor]:
    """Per row of x [B, V], what decides how much work a sampler has."""
    logprobs = x.log_softmax(-1)
    params = ptk.RowParams.make(len(x), temperature=samplers.TEMPERATURE, top_p=samplers.TOP_P)
    falling = x.sort(-1, descending=True).values
    top = falling[:, 0]
    return {
        "entropy, nats": -(logprobs.exp() * logprobs).sum(-1),
        "kept": reference.distribution(x, params).kept.sum(-1),
        "standard deviation": x.std(-1),
        "top - median": top - falling.median(-1).values,
        **{f"top - rank {r:,}": top - falling[:, r - 1] for r in (10, 100, 1_000, 10_000)
           if r <= x.shape[-1]},
        "weights over e^-20": (x >= top[:, None] - 20 * samplers.TEMPERATURE).sum(-1),
    }  # fmt: skip


@torch.inference_mode()
def print_statistics(name: str, length: int = 160) -> None:
    """Compare a trio's combined logits on English with the benchmarks' peaked ones."""
    from benchmarks.harness.trios import make_prompts, open_trio

    trio = open_trio(name, None)
    ids = torch.tensor(make_prompts(trio, 1, length))
    base, expert, anti = (
        model(ids).logits[0, _SKIPPED:, : trio.vocab_size].float() for model in trio.models.values()
    )
    real = base + samplers.ALPHA * (expert - anti)
    base, expert, anti = samplers.make_logits("peaked", len(real), trio.vocab_size, torch.float32)
    made = row_statistics(base + samplers.ALPHA * (expert - anti))
    quantiles = torch.tensor([0.5, 0.1, 0.9])
    rows = []
    for what, values in row_statistics(real).items():
        both = torch.cat([x.float().quantile(quantiles) for x in (values, made[what])])
        rows.append(("", (what, *map(report.significant, both.tolist()))))
    columns = ("", name, "p10", "p90", "peaked", "p10", "p90")
    caption = (
        f"Medians over {len(real)} rows, V = {trio.vocab_size:,}. Kept: at temperature "
        f"{samplers.TEMPERATURE}, top_p {samplers.TOP_P}."
    )
    report.print_table("Combined logits", columns, caption, rows)


AXES: dict[str, tuple[Sequence[Any], Any]] = {
    "kinds": (samplers.KINDS, "peaked"),
    "dtypes": (list(samplers.DTYPES), "float32"),
    "filters": (list(samplers.FILTERS), "top_p"),
    "vocab-sizes": (samplers.VOCAB_SIZES, 128_256),
    "batch-sizes": (BATCH_SIZES, 1),
}
"""In the order of :class:`OpCase`: known values, and the one where none is given."""


def _axis(name: str) -> Any:
    return typer.Option(f"--{name}", help=f"Of {','.join(map(str, AXES[name][0]))}.")


def main(
    kinds: Annotated[str | None, _axis("kinds")] = None,
    dtypes: Annotated[str | None, _axis("dtypes")] = None,
    filters: Annotated[str | None, _axis("filters")] = None,
    vocab_sizes: Annotated[str | None, _axis("vocab-sizes")] = None,
    batch_sizes: Annotated[str | None, _axis("batch-sizes")] = None,
    providers: Annotated[
        str, typer.Option(help=f"Of {','.join((*PROVIDERS, ATTRIBUTION))}.")
    ] = ",".join(PROVIDERS),
    heads: Annotated[
        str | None,
        typer.Option(help=f"Instead, sample_hidden at shapes of {','.join(samplers.SHAPES)}."),
    ] = None,
    statistics: Annotated[
        str | None, typer.Option(help="Instead, compare the peaked logits with this trio's.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each, in turn.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1,
    output: options.Output = None,
    accuracy: Annotated[bool, typer.Option(help="With --heads: also the error of x.")] = True,
) -> None:
    """Time `sample` alone beside its peers. Naming any axis measures the product of the axes."""
    torch.set_num_threads(threads)
    if statistics is not None:
        with options.user_errors():
            return print_statistics(statistics)
    if heads is not None:
        shapes = parse_choices("--heads", heads, samplers.SHAPES, None)
        types = parse_choices("--dtypes", dtypes or "bfloat16,float32", samplers.DTYPES, None)
        rows = parse_integers("--batch-sizes", batch_sizes or "1,4,16,64", 1)
        records = measure([heads_work(*c) for c in product(shapes, types, rows)], repeats)
        errors = measure_accuracy() if accuracy else []
        report.write_results(output, "heads", {}, [*records, *errors])
        print_times("From hidden states to tokens", records, "weights")
        lines = [{**r, **r[name], "name": name} for r in errors for name in (FUSED, APART)]
        where = "{heads}, {rows} rows".format_map
        return report.print_records("", ACCURACY_CAPTION, lines, ACCURACY, where)
    given = (kinds, dtypes, filters, vocab_sizes, batch_sizes)
    axes = [
        parse_choices(f"--{name}", text, known, default)
        for text, (name, (known, default)) in zip(given, AXES.items(), strict=True)
    ]
    cases = [OpCase(*c) for c in product(*axes)] if any(given) else DEFAULT_CASES
    names = parse_choices("--providers", providers, (*PROVIDERS, ATTRIBUTION), OURS)
    records = measure([sample_work(case, names) for case in cases], repeats)
    report.write_results(output, "kernels", {}, records)
    title = "sample: combine, filter and draw a token per row"
    return print_times(title, records, "logits")


if __name__ == "__main__":
    typer.run(main)
