"""sample and verify by the cluster kernels' own source, on a CPU; model.cpp runs it.

There is no kernel here for combine and score.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import Structure, c_int, c_int32, c_int64, c_size_t, c_void_p
from typing import Any

import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels.ops import VERIFY_MODES
from proxytune_kernels.ops.backends import BY_NAME
from proxytune_kernels.ops.backends.backend import Backend, Implementation, from_writer
from proxytune_kernels.ops.table import OPERATORS
from tests.cluster import build

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Logits(Structure):
    _fields_ = (
        ("data", c_void_p), ("row_stride", c_int64), ("position_stride", c_int64),
        ("dtype", c_int32),
    )  # fmt: skip


class Inputs(Structure):
    _fields_ = (
        ("vocab_size", c_int64), ("base", Logits), ("expert", Logits), ("anti", Logits),
        ("alpha", c_void_p), ("bias", c_void_p), ("bias_row_stride", c_int64),
        ("bias_position_stride", c_int64), ("allowed", c_void_p), ("allowed_row_stride", c_int64),
        ("allowed_position_stride", c_int64), ("edits", c_void_p),
        ("num_edits", c_int64), ("edits_row_stride", c_int64), ("edits_position_stride", c_int64),
        ("penalties", c_void_p),
    )  # fmt: skip


_PARAMS = ptk.RowParams._fields[1:]  # alpha comes with the inputs


class Params(Structure):
    _fields_ = tuple((name, c_void_p) for name in _PARAMS)


*_DRAWN, _token_ids, _logprobs, _attribution = (
    (o.name, c_void_p) for o in OPERATORS["sample"].outputs
)
_TOP = (_token_ids, _logprobs)


class SampleArgs(Structure):
    """proxytune_sample_args of csrc/include/proxytune.h, as the structures above are its parts."""

    _fields_ = (
        ("inputs", Inputs), ("params", Params), ("noise_stream", c_int32), *_DRAWN,
        ("num_top", c_int32), *_TOP, _attribution, ("attributed", c_void_p),
    )  # fmt: skip


class VerifyArgs(Structure):
    """proxytune_verify_args."""

    _fields_ = (
        ("inputs", Inputs), ("params", Params), ("num_drafts", c_int64), ("mode", c_int32),
        ("draft_token_ids", c_void_p), ("draft_token_ids_row_stride", c_int64),
        ("draft_logits", Logits), ("token_ids", c_void_p), ("num_accepted", c_void_p),
        ("logprobs", c_void_p), ("raw_logprobs", c_void_p), ("status", c_void_p),
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _logits(tensor: Tensor | None) -> Logits:
    if tensor is None:
        return Logits()
    rows, *positions, _ = tensor.stride()
    return Logits(tensor.data_ptr(), rows, *(positions or [0]), DTYPES[tensor.dtype])


def _inputs(
    roles: tuple[Tensor | None, ...], params: ptk.RowParams, bias: Tensor | None,
    allowed_mask: Tensor | None, vocab_size: int,
) -> tuple[Inputs, Params]:  # fmt: skip
    constraints: list[int | None] = []
    for tensor in (bias, allowed_mask):
        strides = (0, 0) if tensor is None else (*tensor.stride()[:-1], 0)[:2]
        constraints += [_address(tensor), *strides]
    inputs = Inputs(vocab_size, *map(_logits, roles), _address(params.alpha), *constraints)
    return inputs, Params(*(_address(getattr(params, name)) for name in _PARAMS))


@functools.cache
def _library(races: bool) -> ctypes.CDLL:
    library = build.library("model", races=races)
    sizes = (c_size_t(), c_size_t())
    library.cluster_sizes(*map(ctypes.byref, sizes))
    assert [s.value for s in sizes] == [ctypes.sizeof(t) for t in (SampleArgs, VerifyArgs)]
    for name, args in (("cluster_sample", SampleArgs), ("cluster_verify", VerifyArgs)):
        call = getattr(library, name)
        call.argtypes = [ctypes.POINTER(args), c_int64, c_int, c_int, ctypes.c_uint64]
        call.restype = ctypes.c_char_p
    return library


class Model(Backend):
    """The kernels on clusters of so many blocks, as a backend.

    Args:
        blocks: of a cluster, 1 to 16.
        threads: of a block.
        seed: of the order in which threads run: no result may depend on it.
        races: whether each access to shared memory is checked, too.
    """

    device_type = "cpu"
    operators = ("sample", "verify")

    def __init__(self, blocks: int, threads: int = 64, seed: int = 0, races: bool = False) -> None:
        self.blocks, self.threads, self.seed, self.races = blocks, threads, seed, races
        self.name = f"cluster of {blocks} x {threads}, {seed}, {races}"
        self._implementations = {
            **from_writer("sample", self._sample), **from_writer("verify", self._verify)
        }  # fmt: skip
        BY_NAME[self.name] = self  # for callers who ask for it by name
        self.sample: Any = functools.partial(ptk.sample, backend=self.name)
        self.verify: Any = functools.partial(ptk.verify, backend=self.name)

    def implementation(self, name: str, device: torch.device) -> Implementation:
        return self._implementations[name]

    def _call(self, name: str, args: Structure, rows: int) -> None:
        if rows == 0:  # tensors of none have no address
            return
        call = getattr(_library(self.races), name)
        error = call(ctypes.byref(args), rows, self.blocks, self.threads, self.seed)
        if error is not None:
            raise RuntimeError(f"{name}: {error.decode()}")

    def _sample(
        self, base: Any, expert: Any, anti: Any, params: ptk.RowParams, bias: Any,
        allowed_mask: Any, edits: None, vocab_size: int, noise_stream: int, top_logprobs: int,
        attributed: Any,
        out: Any,
    ) -> None:  # fmt: skip
        assert attributed is None
        inputs, row_params = _inputs((base, expert, anti), params, bias, allowed_mask, vocab_size)
        *drawn, top_token_ids, top, _ = map(_address, out)
        args = SampleArgs(
            inputs, row_params, noise_stream, *drawn, top_logprobs, top_token_ids, top
        )
        self._call("cluster_sample", args, base.shape[0])

    def _verify(
        self, base: Any, expert: Any, anti: Any, draft_token_ids: Any, draft_logits: Any,
        params: ptk.RowParams, bias: Any, allowed_mask: Any, edits: None, vocab_size: int,
        mode: str, out: Any,
    ) -> None:  # fmt: skip
        drafts = draft_token_ids.contiguous()
        inputs, row_params = _inputs((base, expert, anti), params, bias, allowed_mask, vocab_size)
        args = VerifyArgs(
            inputs, row_params, drafts.shape[1], VERIFY_MODES.index(mode), _address(drafts),
            drafts.stride(0), _logits(draft_logits), *map(_address, out),
        )  # fmt: skip
        self._call("cluster_verify", args, base.shape[0])
