"""``proxytune::decode_attention``: right to its bound, and a row's bits are its own.

On CPU tensors it is the reference in plain PyTorch; with TRITON_INTERPRET=1 (make interpret) it is
the kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from proxytune_kernels.ops import attention
from tests.ops.conftest import USABLE, Backend

pytestmark = pytest.mark.triton

DEVICE = Backend("triton").device if "triton" in USABLE else "cpu"
OP: Any = torch.ops.proxytune.decode_attention
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}


class Rows:
    """Rows of random keys, the last of them in the place of the first q queries' tokens."""

    def __init__(
        self, lengths: list[int], heads: int, kv_heads: int, queries: int, size: int,
        dtype: torch.dtype = BF16, *, value_size: int | None = None, room: int = 3, seed: int = 0,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        rows, capacity = len(lengths), max(*lengths, 1) + room

        def randn(tokens: int, heads: int, size: int) -> Tensor:
            made = torch.randn(rows, tokens, heads, size, generator=g)
            return made.to(dtype).to(DEVICE).transpose(1, 2)

        self.query = randn(queries, heads, size)
        self.keys = randn(capacity, kv_heads, size)
        self.values = randn(capacity, kv_heads, value_size or size)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.scale = size**-0.5

    def attend(self, rows: Any = slice(None), **options: Any) -> Tensor:
        """[B, q, heads, D] of some rows."""
        parts = (part[rows] for part in (self.query, self.keys, self.values))
        out: Tensor = OP(*parts, self.seq_lens[rows].contiguous(), self.scale, **options)
        return out


def check(rows: Rows, window: int | None = None, soft_cap: float | None = None) -> None:
    """Each number within its bound of the sum that fp64 gives, query by query.

    u is the dtype's rounding. A score is a sum of D products in fp32, exact ones but of fp32: it is
    wrong by e = (D + 8) 2^-23 sum |q k| scale at most in any order, with a soft cap by 4e-7 of that
    more (tanh), and so is a weight, relatively; exp2 and sums of n weights add (n + 8) 2^-23.
    Weights are rounded to the dtype, and the result is. So it is within (2 u + 2 e + 2 (n + 8)
    2^-23) sum p |v|, and 1e-30 for zeros.
    """
    found = rows.attend(window=window, soft_cap=soft_cap).cpu().double()
    query, keys, values = (t.cpu().double() for t in (rows.query, rows.keys, rows.values))
    _, heads, queries, size = query.shape
    group, u = heads // keys.shape[1], ROUNDING[rows.query.dtype]
    for b, length in enumerate(rows.seq_lens.tolist()):
        for i in range(queries):
            last = length - queries + i
            first = 0 if window is None else max(0, last - window + 1)
            if last < 0:
                assert not found[b, i].any()
                continue
            seen = slice(first, last + 1)
            for head in range(heads):
                key, value = keys[b, head // group, seen], values[b, head // group, seen]
                score = key @ query[b, head, i] * rows.scale
                size_of = float((key.abs() @ query[b, head, i].abs()).max()) * rows.scale
                error = (size + 8) * 2.0**-23 * size_of
                if soft_cap is not None:
                    score, error = soft_cap * torch.tanh(score / soft_cap), error + 4e-7 * soft_cap
                p = torch.softmax(score, 0)
                relative = 2 * u + 2 * error + 2 * (len(p) + 8) * 2.0**-23
                bound = relative * (p @ value.abs()) + 1e-30
                difference = (found[b, i, head] - p @ value).abs()
                assert bool((difference <= bound).all()), (b, i, head, difference.max())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "size", "dtype", "window", "soft_cap"),
    [
        (2, 2, 1, 128, BF16, None, None),
        (3, 1, 3, 64, FP16, None, 5.0),
        (8, 1, 5, 80, BF16, 100, None),  # 40 queries of one program
        (6, 2, 4, 256, BF16, 300, 20.0),
        (8, 1, 9, 16, FP16, None, None),  # 72: two programs
        (4, 2, 2, 64, FP32, None, None),
        (8, 1, 3, 96, FP32, 5, 2.0),  # 24: two programs of fp32
    ],
    ids=str,
)
def test_each_number_is_within_its_bound(
    heads, kv_heads, queries, size, dtype, window, soft_cap
):  # fmt: skip
    """No key, one, a part less one, a part, a part and one, three; fewer keys than queries."""
    lengths = [0, 1, 255, 256, 257, 600]
    check(Rows(lengths, heads, kv_heads, queries, size, dtype), window, soft_cap)


def test_parts_of_a_long_row_are_longer():
    """Past 64 parts of 256 keys a row has parts of 512."""
    check(Rows([16_900, 300], 1, 1, 1, 16, FP32))


def test_values_of_another_size_than_keys():
    check(Rows([300, 7], 2, 1, 2, 48, value_size=24))


def test_more_keys_than_there_is_room_for():
    """The last tokens of a row that is full are not there: others are as if they were."""
    rows = Rows([300, 20], 2, 1, 4, 64, room=0)
    wanted = rows.attend()
    for name in ("keys", "values"):
        layer = getattr(rows, name)
        layer[0, :, 298:] = torch.nan
        setattr(rows, name, layer[:, :, :298])
    assert torch.equal(rows.attend()[0, :2], wanted[0, :2])
    assert torch.equal(rows.attend()[1], wanted[1])


@pytest.mark.skipif("triton" not in USABLE, reason="of the kernel; PyTorch promises no bits")
@pytest.mark.parametrize("window", [None, 270])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_rows_bits_are_its_own(dtype, window):
    """Alone and beside others, in any order, with more room, every second row of a cache."""
    rows = Rows([530, 3, 257], 2, 1, 3, 32, dtype)
    wanted = rows.attend(window=window)
    for order in ([0], [2], [1, 2, 0]):
        assert torch.equal(rows.attend(order, window=window), wanted[order]), order
    assert torch.equal(rows.attend(slice(0, None, 2), window=window), wanted[0::2])
    for name in ("keys", "values"):
        setattr(rows, name, torch.nn.functional.pad(getattr(rows, name), (0, 0, 0, 900)))
    assert torch.equal(rows.attend(window=window), wanted)


def test_what_no_query_sees_is_not_read():
    """NaN past a row's end, and before a window of each of its queries."""
    rows = Rows([400, 5, 270], 4, 2, 3, 64)
    wanted = rows.attend(window=40)
    for layer in (rows.keys, rows.values):
        for b, length in enumerate(rows.seq_lens.tolist()):
            layer[b, :, length:] = torch.nan
            layer[b, :, : max(0, length - 42)] = torch.nan
    assert torch.equal(rows.attend(window=40), wanted)
    # And what one does see, is.
    rows.keys[0, 1, 365] = torch.nan
    nans = rows.attend(window=40)[0].isnan().all(-1)
    assert nans.tolist() == [[False, False, True, True]] * 3


def test_arrivals_are_given_back_as_zeros():
    rows = Rows([600, 3], 4, 2, 3, 64)
    arrivals = torch.zeros(attention.num_arrivals(rows.query), dtype=torch.int32, device=DEVICE)
    assert torch.equal(rows.attend(arrivals=arrivals), rows.attend())
    assert not arrivals.any()


@pytest.mark.parametrize("options", [{}, {"window": 5, "soft_cap": 3.0}], ids=str)
def test_registration(options):
    rows = Rows([9, 4], 4, 2, 2, 16, FP32)
    given = (rows.query, rows.keys, rows.values, rows.seq_lens, rows.scale)
    torch.library.opcheck(OP.default, given, options)

    def run(*tensors: Tensor) -> Tensor:
        out: Tensor = OP(*tensors, rows.scale, **options) * 2
        return out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given[:-1]), run(*given[:-1]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query": torch.zeros(2, 4, 2, 300)}, "query must be .* with D up to 256, got"),
        ({"query": torch.zeros(2, 4, 2, 16).double()}, "query must be .* got torch.float64"),
        ({"keys": torch.zeros(2, 3, 9, 16)}, r"keys must be .* got .* \[2, 3, 9, 16\]"),
        ({"keys": torch.zeros(2, 2, 9, 8)}, "keys must be"),
        ({"values": torch.zeros(2, 2, 8, 16)}, "values must be"),
        ({"values": torch.zeros(2, 2, 16, 9).mT}, "values must be .* its last dimension contig"),
        ({"seq_lens": torch.zeros(2).long()}, "seq_lens must be .*int32.* got torch.int64"),
        ({"window": 0}, "window must be at least 1, or None, got 0"),
        ({"soft_cap": -1.0}, "soft_cap must be above 0, or None, got -1.0"),
        ({"arrivals": torch.zeros(7).int()}, "arrivals must be int32 zeros, at least 8, got 7"),
    ],
    ids=str,
)
def test_errors_name_the_argument(change, said):
    rows = Rows([9, 4], 4, 2, 2, 16, FP32, room=0)
    given: dict[str, Any] = {
        "query": rows.query, "keys": rows.keys, "values": rows.values, "seq_lens": rows.seq_lens,
        "scale": 1.0,
    }  # fmt: skip
    moved = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in change.items()}
    with pytest.raises(ValueError, match=f"decode_attention: {said}"):
        OP(**(given | moved))


def test_why_the_kernel_is_not_used():
    assert attention.unusable(torch.device("cpu"), BF16) == (
        "decode_attention runs on CUDA devices, and this model is on cpu"
    )
    assert attention.unusable(torch.device("cuda", 0), torch.float64) == (
        "decode_attention takes bfloat16, float16 and float32, and this model has torch.float64"
    )
