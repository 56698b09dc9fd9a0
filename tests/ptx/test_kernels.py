"""The operators' PTX gives what the CPU's kernels give, in any order, without a race.

Programs and warps go on in random order, three programs at a time; what is not written holds noise;
every access is checked for bounds, alignment and races; approximations are off by up to 2 ulp. The
seeds are fixed: a failure comes again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import proxytune_kernels as ptk
from tests import rows as kinds
from tests.ops import oracle
from tests.ops.test_attribution import check as check_attribution
from tests.ptx.device import CAPABILITIES, Device, Launched
from tests.ptx.program import Order

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS: Any = ptk  # called with roles unpacked
RIGHT = "cpu" if ptk.backends()["cpu"] is None else "reference"

# A row's mass from tiles' sums is right to 4.2e-6 of itself (docs/gpu.md), with exp2 to 2 ulp; both
# sides round a logprob to fp32 twice.
TILE_ERROR = 4.2e-6
ROUNDING = 2.0**-22


class Shape(NamedTuple):
    """Of a batch: dtypes of base, expert and anti; padding decides which rows are aligned."""

    vocab_size: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    padding: int = 0
    rows: int = 36
    steered: bool = True
    constrained: bool = False


SHAPES = {
    "bf16": Shape(2085, (BF16,) * 3, padding=3),
    "fp32": Shape(4000, (FP32,) * 3),
    "fp16, bias and mask": Shape(3000, (FP16,) * 3, padding=8, constrained=True),
    "mixed": Shape(2501, (BF16, FP32, FP16), padding=7),
    "base alone": Shape(2000, (BF16,) * 3, steered=False),
    "one tile": Shape(33, (BF16,) * 3),
    "wide": Shape(128_256, (BF16,) * 3, rows=12),
    "widest": Shape(262_208, (BF16,) * 3, rows=6),
}
# Each compute capability and each shape once; `slow` has all of the others.
FEW = {("bf16", 90), ("fp16, bias and mask", 80), ("fp32", 100), ("mixed", 120)}
# verify compiles the same kernels anew, for several positions: half of the minutes.
WITHOUT_VERIFY = {("fp32", 100), ("mixed", 120)}


def cases() -> list[Any]:
    found = []
    for shape in SHAPES:
        for capability in CAPABILITIES:
            marks = () if (shape, capability) in FEW else (pytest.mark.slow,)
            found.append(pytest.param(shape, capability, marks=marks, id=f"{shape}-{capability}"))
    return found


def device(capability: int, seed: int = 1, **settings: Any) -> Device:
    order = Order(seed, in_flight=3, races=True, ulps=2, error_seed=seed)
    return Device(capability, order, processors=40, poison=seed, **settings)


def awkward(seed: int, shape: Shape) -> oracle.Rows:
    """Random rows and parameters, a third of them flat; NaN, infinities, ends of ranges."""
    made = oracle.random_rows(seed, shape.rows, shape.vocab_size, FP32, padding=shape.padding)
    g = torch.Generator().manual_seed(seed)
    base, p, n = made.base, made.params, shape.rows
    for i in range(n - n // 3, n):  # thousands of kept tokens, ties among them
        row = torch.randn(base.shape[1], generator=g) * float(torch.rand(1, generator=g)) * 0.6
        base[i] = (row * 8).round() / 8 if i % 3 == 0 else row
        p["top_k"][i] = int(torch.randint(3, (1,), generator=g)) * (shape.vocab_size // 3)
        p["min_p"][i] = 0.0 if i % 4 else 0.01
        p["temperature"][i] = (0.8, 1.0)[i % 2]
        p["top_p"][i] = (0.9, 1.0, 0.5)[i % 3]
    column = torch.randint(shape.vocab_size, (n,), generator=g)
    base[range(0, n, 9), column[0::9]] = torch.nan
    base[range(3, n, 11), column[3::11]] = torch.inf
    base[4::23, : shape.vocab_size] = -torch.inf
    p["top_p"][5::17] = 1.5  # a bad parameter
    p["temperature"][7::19], p["temperature"][8::29] = 1e-40, 1e30
    p["seed"][9::13], p["position"][6::11] = -(2**63) + 12345, 2**63 - 7
    return made


def assert_alike(found: Any, wanted: Any, exact: bool) -> None:
    """Integers are the same; floats within the sums' error, or bit by bit."""
    if exact:
        same = (oracle.bits(found) == oracle.bits(wanted)) | (found.isnan() & wanted.isnan())
        assert same.all()
        return
    right = oracle.tensors(wanted)
    for name, value in oracle.tensors(found).items():
        if not value.dtype.is_floating_point:
            assert torch.equal(value, right[name]), name
        else:
            torch.testing.assert_close(
                value, right[name], atol=TILE_ERROR, rtol=ROUNDING, equal_nan=True, msg=name
            )


def check(run: Any, given: Device, exact: bool = False) -> None:
    """``run(backend)`` on PTX beside the CPU's own."""
    with given:
        found = run("triton")
    assert given.launches > 0
    assert_alike(found, run(RIGHT), exact)


def edits_of(rows: int, vocab_size: int, g: torch.Generator) -> ptk.Edits:
    """Of 90 tokens of each row, some side by side, and of none."""
    ids = torch.stack([torch.randperm(vocab_size, generator=g)[:90] for _ in range(rows)])
    ids[0, :40] = torch.arange(40)
    ids[0, 40:] = torch.arange(50) + vocab_size - 50
    ids[:, ::9] = -1
    return ptk.Edits.make(
        ids,
        counts=torch.randint(0, 4, ids.shape, generator=g),
        in_prompt=torch.randint(0, 2, ids.shape, generator=g),
        bias=torch.randn(ids.shape, generator=g),
        repetition_penalty=1.3,
        presence_penalty=torch.randn(rows, generator=g),
        frequency_penalty=0.3,
    )


@pytest.mark.parametrize(("name", "capability"), cases())
@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in (2, 3))])
def test_operators(name, capability, seed):
    shape = SHAPES[name]
    given = awkward(seed, shape)
    g = torch.Generator().manual_seed(seed)
    V, B = shape.vocab_size, shape.rows
    roles: Any = [
        role.to(dtype)
        for role, dtype in zip((given.base, given.expert, given.anti), shape.dtypes, strict=True)
    ]
    if not shape.steered:
        roles[1:] = None, None
    params = ptk.RowParams(**given.params)
    options: Any = dict(vocab_size=V)
    if shape.constrained:
        options["bias"] = torch.randn(B, V, generator=g)
        words = torch.randint(-(2**31), 2**31, (B, -(-V // 32)), generator=g)
        options["allowed_mask"] = words.int()
        options["edits"] = edits_of(B, V, g)
    at = device(capability, seed)
    for n in (0, 20):
        check(lambda b, n=n: OPS.sample(*roles, params, top_logprobs=n, backend=b, **options), at)
    check(lambda b: OPS.combine(*roles, params.alpha, backend=b, **options), at, exact=True)

    T, R = 3, B // 3  # positions, requests
    deep: Any = [None if role is None else role[: R * T].view(R, T, -1) for role in roles]
    several = params.rows(torch.arange(0, R * T, T))
    for option in ("bias", "allowed_mask"):
        if option in options:
            options[option] = options[option][: R * T].view(R, T, -1)
    if "edits" in options:
        entries, penalties = options["edits"]
        entries = entries[: R * T].unflatten(0, (R, T)).contiguous()
        options["edits"] = ptk.Edits(entries, penalties[:R])
    ids = torch.randint(-1, V + 1, (R, T), generator=g)
    check(lambda b: OPS.score(*deep, ids, several.alpha, vocab_size=V, backend=b), at)
    if (name, capability) in WITHOUT_VERIFY:
        return
    base = deep[0]
    noise = torch.randn((R, T - 1, base.shape[2]), generator=g)
    drafts = (base[:, : T - 1].float() + 0.3 * noise).to(base.dtype).contiguous()
    positions = (several.position[:, None] + torch.arange(T)).flatten()
    each = ptk.RowParams(*(column.repeat_interleave(T) for column in several))
    each = each._replace(position=positions)
    flat: Any = [None if role is None else role[: R * T] for role in roles]
    own = OPS.sample(*flat, each, vocab_size=V, backend=RIGHT).token_ids.view(R, T)
    given_ids = own[:, : T - 1].clone()
    given_ids[1::2] = torch.randint(
        V, given_ids[1::2].shape, generator=g
    )  # the others are accepted
    given_ids[1::7, 1] = -1
    check(lambda b: OPS.verify(*deep, given_ids, several, backend=b, **options), at)
    rejection: Any = dict(mode="rejection", draft_logits=drafts)
    check(lambda b: OPS.verify(*deep, given_ids, several, **rejection, backend=b, **options), at)


@pytest.mark.parametrize(
    ("name", "capability"), [("bf16", 90), pytest.param("mixed", 80, marks=pytest.mark.slow)]
)
def test_attribution(name, capability):
    """Also of tokens that were given, -1 for those drawn."""
    shape = SHAPES[name]._replace(rows=6)
    made = awkward(4, shape)
    roles: Any = [
        role.to(dtype)
        for role, dtype in zip((made.base, made.expert, made.anti), shape.dtypes, strict=True)
    ]
    V, params = shape.vocab_size, ptk.RowParams(**made.params)
    ids = torch.arange(-1, shape.rows - 1)
    with device(capability) as at:
        found = OPS.sample(*roles, params, vocab_size=V, attribution=ids, backend="triton")
    assert at.launches > 0
    ids = torch.where(ids < 0, found.token_ids, ids).masked_fill(found.token_ids < 0, -1)
    x = OPS.combine(*roles, params.alpha, vocab_size=V, backend=RIGHT)
    check_attribution(found, [role[:, :V] for role in roles], params.alpha, x, ids)


# What sends rows each way.
WAYS: list[dict[str, Any]] = [
    dict(top_p=0.9), dict(top_k=50, top_p=0.9), dict(top_k=200, top_p=0.95), dict(min_p=0.02),
    dict(top_k=100, top_p=0.9, filter_order="hf"), dict(top_p=0.99, filter_order="joint"),
]  # fmt: skip


def check_ways(roles: Any, given: Device) -> None:
    """Rows with the ways' parameters in turn."""
    requests = [ptk.SamplingParams(seed=i, **WAYS[i % len(WAYS)]) for i in range(len(roles[0]))]
    params = ptk.RowParams.from_sampling_params(requests)
    check(lambda b: OPS.sample(*roles, params, backend=b), given)


@pytest.mark.parametrize("capability", [90, *(pytest.param(c, marks=pytest.mark.slow)
                                              for c in CAPABILITIES if c != 90)])  # fmt: skip
def test_kinds_of_rows(capability):
    made = [kinds.make(kind, len(WAYS), 4000, BF16) for kind in kinds.KINDS]
    check_ways(tuple(map(torch.cat, zip(*made, strict=True))), device(capability))


@pytest.mark.slow
def test_rows_of_the_shipped_trio():
    pytest.importorskip("transformers", reason="transformers is not installed")
    check_ways(kinds.shipped(), device(90))


class Enough(Exception):
    """What comes after does not matter."""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_aligned_rows_are_read_by_16_bytes(capability):
    """All but their ends, whatever the vocabulary; rows are padded to 16 elements."""
    V, rows, dtype = 2085, 2, BF16
    roles: Any = [torch.zeros(rows, 2096, dtype=dtype) for _ in range(3)]
    wide: dict[str, int] = {}

    def note(one: Launched) -> None:
        wide[one.name] = one.report.wide
        if one.name == "scan":
            raise Enough

    with Device(capability, on_launch=[note]):
        OPS.combine(*roles, torch.ones(rows), vocab_size=V, backend="triton")
        with pytest.raises(Enough):
            OPS.sample(*roles, vocab_size=V, seed=1, position=0, backend="triton")
    whole = 3 * rows * dtype.itemsize * (V // 1024 * 1024)
    assert min(wide["scan"], wide["combine"]) >= whole


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.slow
def test_rows_at_odd_addresses_far_apart_and_shared(dtype):
    g = torch.Generator().manual_seed(1)
    V = 3001
    wide: Any = [torch.randn(4, V + 40, generator=g).to(dtype) * 2 for _ in range(3)]
    views: Any = [[w[:, k : k + V] for w in wide] for k in (1, 3, 8)]
    views.append([w[:1, :V].expand(4, V) for w in wide])
    if dtype == BF16:  # untouched pages take no memory
        far: Any = []
        for i in range(3):
            big = torch.empty(2**31 + 16 + 4096 * (i + 1), dtype=dtype)
            far.append(big.as_strided((2, V), (2**31 + 16 * (i + 1), 1)))
            far[i].copy_(wide[i][:2, :V])
        views.append(far)
    for roles in views:
        for values in (dict(), dict(top_p=0.9), dict(top_k=100)):
            params = ptk.RowParams.make(len(roles[0]), seed=7, **values)
            at = Device(90, Order(1, in_flight=3))
            check(lambda b, r=roles, p=params: OPS.sample(*r, p, vocab_size=V, backend=b), at)


def ends(vocab_size: int) -> dict[str, tuple[Any, list[Any]]]:
    """Rows at the ends of what the contract takes, and the parameters that they are drawn with."""
    g = torch.Generator().manual_seed(3)
    normal = [torch.randn(4, vocab_size, generator=g) * s for s in (2, 1, 1)]
    equal = torch.zeros(3, vocab_size)
    equal[1], equal[1, ::2], equal[2] = -0.0, 0.0, 1e-45
    subnormal = torch.rand(2, vocab_size, generator=g) * 1e-38
    steered = [role.clone() for role in normal]
    steered[1][0, ::7], steered[2][0, ::7] = 3e38, -3e38
    steered[1][1, 3], steered[2][2, 5], steered[1][2, 5], steered[1][3] = (
        torch.nan,
        *[torch.inf] * 3,
    )
    few: list[dict[str, Any]] = [dict(), dict(top_p=0.7), dict(top_k=20)]
    numbers = [
        dict(min_p=1e-38), dict(min_p=1.0), dict(top_p=1e-10), dict(top_p=0.99999994),
        dict(top_k=1), dict(top_k=vocab_size), dict(top_k=2**31 - 1), dict(top_k=-1),
        dict(top_k=512), dict(top_k=513), dict(position=2**63 - 1), dict(seed=2**64 - 1),
    ]  # fmt: skip
    temperatures = (1.1754944e-38, 1e-30, 1e-3, 1e20, 3.4e38)
    return {
        "numbers": (normal[:1], numbers),
        "temperatures": (normal[:1], [f | dict(temperature=t) for t in temperatures for f in few]),
        "equal": ([equal], [dict(top_k=900), dict(top_p=0.5), dict(min_p=1.0), *few]),
        "subnormal": ([subnormal], [f | dict(temperature=t) for t in (2e-38, 1.0) for f in few]),
        "steered": (steered, [f | dict(alpha=a) for a in (0.0, -2.5, 3e38, 1e-45) for f in few]),
    }


@pytest.mark.parametrize("name", list(ends(8)))
@pytest.mark.slow
def test_ends_of_ranges(name):
    roles, settings = ends(2000)[name]
    for values in settings:
        params = ptk.RowParams.make(len(roles[0]), **values)
        given: Any = (*roles, None, None)[:3]
        check(lambda b, p=params, r=given: OPS.sample(*r, p, backend=b), device(90))


@pytest.mark.parametrize("vocab_size", (1, 2, 31, 127, 128, 129, 1023, 1024, 1025))
@pytest.mark.slow
def test_widths(vocab_size):
    row = torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(1))
    for values in (dict(), dict(top_p=0.5), dict(top_k=1)):
        params = ptk.RowParams.make(2, seed=4, **values)
        check(lambda b, p=params: OPS.sample(row, None, None, p, backend=b), device(90))


@pytest.mark.parametrize(
    "capability", [c for c in CAPABILITIES if c != 100]
)  # tcgen05: docs/ptx.md
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.slow
def test_heads(dtype, capability):
    """Small integers, exact in any order: x is exact, and the draws are those of its logits."""
    g = torch.Generator().manual_seed(1)
    for batch, width in ((3, 300), (20, 260), *(() if dtype == FP32 else ((70, 300),))):
        heads: Any = [
            ptk.Head(
                torch.randint(-3, 4, (batch, size), generator=g).to(dtype),
                torch.randint(-3, 4, (width, size), generator=g).to(dtype),
            )
            for size in (72, 128, 64)
        ]
        params = ptk.RowParams(**oracle.random_params(g, batch, width))
        check(
            lambda b, h=heads, p=params: OPS.sample_hidden(*h, p, top_logprobs=5, backend=b),
            device(capability),
        )
