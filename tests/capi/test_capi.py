"""The C API from C: no Python, no torch; the numbers are those of the operators, bit for bit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import proxytune_kernels as ptk
from proxytune_kernels.ops.backends import backends
from tests.capi.conftest import CROSS, INCLUDE, ROOT, STRICT, at, declared, exported, link, run

NUM_TOP = 9  # as in ops.c
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs gcc and g++"),
    pytest.mark.skipif(backends()["cpu"] is not None, reason="needs the C++ extension to compare"),
]


@pytest.fixture(scope="session")
def ops(library: Path) -> Path:
    return link(library, Path(__file__).with_name("ops.c"), "ops")


class Case:
    """One call's inputs: as tensors, and as the file that ops.c reads."""

    def __init__(self, vocab_size, dtype, *, steered=True, constrained=False, rows=4, seed=0):
        make = np.random.default_rng(seed)
        self.rows, self.positions, self.vocab_size = rows, 3, vocab_size
        self.width, self.dtype = vocab_size + 5, dtype
        shape = (rows, self.positions, self.width)

        def logits(*shape):
            # A few levels, so that there are ties; the padding is poisoned.
            values = make.integers(-12, 13, shape) / 2
            values[make.random(shape) < 0.02] = -np.inf
            values[make.random(shape) < 0.002] = np.nan
            values[..., vocab_size:] = np.inf
            return torch.from_numpy(values).to(dtype)

        self.base = logits(*shape)
        self.expert: torch.Tensor | None = logits(*shape) if steered else None
        self.anti: torch.Tensor | None = logits(*shape) if steered else None
        self.draft_logits = logits(rows, self.positions - 1, self.width)
        self.bias = self.allowed_mask = None
        self.edits: ptk.Edits | None = None
        if constrained:
            self.bias = torch.from_numpy(make.integers(-4, 5, (*shape[:2], vocab_size)) / 4).float()
            words = (*shape[:2], -(-vocab_size // 32))
            self.allowed_mask = torch.from_numpy(make.integers(-(2**31), 2**31, words)).int()
            ids = torch.from_numpy(make.permuted(np.tile(np.arange(40), (rows, 1)), axis=1))[:, :20]
            ids = ids[:, None].expand(-1, self.positions, -1)
            self.edits = ptk.Edits.make(
                ids,
                counts=ids % 3 + torch.arange(self.positions)[:, None],
                in_prompt=ids % 2,
                bias=ids / 8 - 2,
                repetition_penalty=1.25,
                presence_penalty=torch.arange(float(rows)),
                frequency_penalty=0.5,
            )
        self.token_ids = torch.from_numpy(make.integers(-1, vocab_size, shape[:2]))
        self.params = ptk.RowParams.make(
            rows,
            alpha=torch.tensor([1.0, 0.0, -0.5, 2.0])[:rows],
            temperature=torch.tensor([0.7, 1.0, 0.0, 1.5])[:rows],
            top_k=torch.tensor([0, 40, 7, -1])[:rows],
            top_p=torch.tensor([0.9, 0.95, 1.0, 2.0])[:rows],  # the last one is out of range
            min_p=torch.tensor([0.0, 0.01, 0.0, 0.0])[:rows],
            filter_order=torch.arange(rows) % 3,
            seed=torch.from_numpy(make.integers(-(2**63), 2**63 - 1, rows)),
            position=torch.arange(rows) * 1000,
        )
        # Drafts that plain decoding accepts at first, then none.
        first = self.sample(self.params).token_ids
        self.draft_token_ids = torch.stack([first, torch.full_like(first, -1)], 1)
        self.draft_token_ids[1:2] = -1  # a row without drafts

    def sample(self, params, stream="sample"):
        base, expert, anti = self.roles(0)
        constraints = self.constraints(0)
        return ptk.sample(
            base, expert, anti, params, vocab_size=self.vocab_size, noise_stream=stream,
            top_logprobs=NUM_TOP, attribution=True, **constraints,
        )  # fmt: skip

    def roles(self, position=slice(None)):
        steering = (None if t is None else t[:, position] for t in (self.expert, self.anti))
        return self.base[:, position], *steering

    def constraints(self, position=slice(None)):
        names = ("bias", "allowed_mask")
        found = {n: v[:, position] for n in names if (v := getattr(self, n)) is not None}
        if self.edits is not None:
            entries = self.edits.entries[:, position].contiguous()
            found["edits"] = self.edits._replace(entries=entries)
        return found

    def write(self, path: Path) -> None:
        head = [self.rows, self.positions, self.width, self.vocab_size, DTYPES[self.dtype]]
        arrays = [
            self.base, self.expert, self.anti, self.params.alpha, self.bias, self.allowed_mask,
            *(self.edits or (None, None)), *self.params[1:], self.token_ids, self.draft_token_ids,
            self.draft_logits,
        ]  # fmt: skip
        with path.open("wb") as file:
            file.write(np.array(head, np.int64).tobytes())
            for array in arrays:
                data = b"" if array is None else array.view(torch.uint8).numpy().tobytes()
                file.write(np.int64(len(data)).tobytes() + data)

    def expected(self) -> list[str]:
        """What ops.c must print, by the operators."""
        out = self.sample(self.params)
        lines = [f"ids {token}" for token in out.token_ids.tolist()]
        assert out.attribution is not None
        lines += _sample_lines("sample", out)
        lines += [f"attribution {' '.join(_bits(row))}" for row in out.attribution.columns]
        lines += _sample_lines("rows", out)
        plain = ptk.RowParams.make(self.rows)
        lines += _sample_lines("defaults", self.sample(plain, "draft"))
        base, expert, anti = self.roles(0)
        alpha, vocab_size = self.params.alpha, self.vocab_size
        x = ptk.combine(base, expert, anti, alpha, vocab_size=vocab_size, **self.constraints(0))
        lines += [f"combine {' '.join(_bits(row))}" for row in x]
        base, expert, anti = self.roles()
        scores = ptk.score(base, expert, anti, self.token_ids, alpha, vocab_size=vocab_size)
        lines += [f"score {bits}" for bits in _bits(scores.flatten())]
        for mode in ("coupled", "rejection"):
            drafts = {"draft_logits": self.draft_logits} if mode == "rejection" else {}
            v = ptk.verify(base, expert, anti, self.draft_token_ids, self.params, mode=mode,
                           vocab_size=vocab_size, **drafts, **self.constraints())  # fmt: skip
            for r in range(self.rows):
                logprobs = _bits(v.logprobs[r]), _bits(v.raw_logprobs[r])
                emitted = zip(v.token_ids[r].tolist(), *logprobs, strict=True)
                tokens = [str(value) for values in emitted for value in values]
                lines.append(f"{mode} {v.num_accepted[r]} {v.status[r]} {' '.join(tokens)}")
        return lines


def _bits(values: torch.Tensor) -> list[str]:
    canonical = torch.where(values.isnan(), torch.nan, values)  # NaNs have no agreed sign
    return [f"{int(b) & 0xFFFFFFFF:08x}" for b in canonical.view(torch.int32)]


def _sample_lines(label: str, out: ptk.SampleOutput) -> list[str]:
    columns = (out.token_ids.tolist(), _bits(out.logprobs), _bits(out.raw_logprobs),
               out.num_kept.tolist(), out.status.tolist())  # fmt: skip
    drawn = [" ".join([label, *map(str, row)]) for row in zip(*columns, strict=True)]
    assert out.top is not None
    top = []
    for token_ids, logprobs in zip(*out.top, strict=True):
        pairs = zip(token_ids.tolist(), _bits(logprobs), strict=True)
        top.append(" ".join(["top", *(f"{token} {bits}" for token, bits in pairs)]))
    return [line for pair in zip(drawn, top, strict=True) for line in pair]


def _canonical(line: str) -> str:
    """NaN has more than one bit pattern; the operators' default one stands for all."""
    return re.sub(r"\b[7f]f[c-f][0-9a-f]{5}\b", "7fc00000", line)


def hold(lines: list[str], wanted: list[str], same_vectors: bool = not CROSS) -> None:
    """Hold what ops.c printed to the operators: to the bit, attribution by other vectors excepted.

    Its sums are of floating point, and their last bits are the vectors'. Both sides are within the
    bound of docs/contracts.md, for logits of at most 6 and log-probabilities of at most 20.
    """
    found = [_canonical(line) for line in lines]
    if same_vectors:
        assert found == wanted
        return
    sums = [[line for line in side if line[:4] == "attr"] for side in (found, wanted)]
    assert [s for s in found if s not in sums[0]] == [s for s in wanted if s not in sums[1]]
    bits = [[[int(b, 16) for b in line.split()[1:]] for line in side] for side in sums]
    ours, theirs = (np.array(side, np.uint32).view(np.float32).T for side in bits)
    bound = 2e-5 + 6 * 2**-22
    np.testing.assert_array_equal(ours[4:6], theirs[4:6])  # rank and change are exact
    np.testing.assert_allclose(ours[:4], theirs[:4], rtol=2 * bound)
    np.testing.assert_allclose(ours[6], theirs[6], rtol=0, atol=2 * 2 * bound * 21)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 300, 20_000])
def test_the_c_api_gives_the_operators_numbers(ops, tmp_path, vocab_size, dtype):
    case = Case(vocab_size, dtype)
    case.write(tmp_path / "case")
    lines = run([ops, tmp_path / "case", "1", "given"]).splitlines()
    assert re.fullmatch("isa neon" if CROSS else "isa (avx512|avx2|neon|scalar)", lines[0])
    hold(lines[1:], case.expected())


@pytest.mark.parametrize("steered", [True, False])
def test_bias_mask_and_base_alone(ops, tmp_path, steered):
    case = Case(333, torch.float32, steered=steered, constrained=True, seed=1)
    case.write(tmp_path / "case")
    lines = run([ops, tmp_path / "case", "1", "own"]).splitlines()
    hold(lines[1:], case.expected())


def test_threads_workspaces_and_instruction_sets_do_not_change_a_bit(ops, tmp_path):
    case = Case(20_000, torch.bfloat16, seed=2)
    case.write(tmp_path / "case")
    wanted = case.expected()
    for threads, workspace in (("1", "own"), ("3", "given"), ("16", "own")):
        lines = run([ops, tmp_path / "case", threads, workspace]).splitlines()
        hold(lines[1:], wanted)
    lines = run([ops, tmp_path / "case", "2", "own"], PROXYTUNE_FORCE_ISA="scalar").splitlines()
    assert lines[0] == "isa scalar"
    hold(lines[1:], wanted, same_vectors=False)


def test_what_cannot_be_meant_is_refused(ops):
    lines = [line.split(" ", 2) for line in run([ops, "errors"]).splitlines()]
    assert lines.pop() == ["workspace", "0", "0"]
    assert lines.pop() == ["head", "1,3,3"]
    codes = {name: int(code) for name, code, _ in lines}
    accepted = {name: 0 for name in codes if name.startswith("good") or name == "no-rows"}
    special = {"isa": 2, "unknown-code": 99}
    assert codes == {name: 1 for name in codes} | accepted | special
    assert len(codes) == 29 and len(accepted) == 5
    assert all(len(message) > 5 for _, _, message in lines)


def test_a_forced_instruction_set_that_is_unknown_is_an_error(ops, tmp_path):
    Case(5, torch.float32).write(tmp_path / "case")
    env = os.environ | {"PROXYTUNE_FORCE_ISA": "mmx", "LD_PRELOAD": ""}
    done = subprocess.run(
        [*at(ops), tmp_path / "case", "1", "own"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "PROXYTUNE_FORCE_ISA" in done.stderr


@pytest.mark.parametrize(
    "compiler", [["gcc", "-std=c11", "-x", "c"], ["g++", "-std=c++20", "-x", "c++"]]
)
def test_the_header_stands_alone_in_both_languages(compiler):
    run([*compiler, *STRICT, "-fsyntax-only", INCLUDE / "proxytune.h"])


def test_only_the_api_is_exported(library):
    assert exported(library) == {name for name in declared() if "_cuda_" not in name}


def test_the_documented_example_runs(library, tmp_path):
    text = (ROOT / "docs" / "contracts.md").read_text()
    source = tmp_path / "example.c"
    source.write_text(re.findall(r"```c\n(.*?)```", text, re.DOTALL)[0])
    printed = re.findall(r"token (-?\d+)", run([link(library, source, "example")]))
    base = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    expert = torch.tensor([[0.0, 3.0, 0.5, 0.0]])
    anti = torch.tensor([[0.5, 1.0, 0.5, 0.0]])
    positions = [ptk.sample(base, expert, anti, temperature=0.7, top_p=0.9, seed=7, position=i)
                 for i in range(3)]  # fmt: skip
    assert [int(t) for t in printed] == [int(out.token_ids) for out in positions]
