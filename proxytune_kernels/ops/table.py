"""The table of operators: arguments and outputs, stated once; all else is derived from it.

A backend registers its implementation for its dispatch key: the C++ extension for CPU, Triton for
CUDA. The CUDA C++ extension, which shares that key with Triton, has operators of its own in
``torch.ops.proxytune_cuda``, so that a graph says which of the two it was made with.
Each operator of :data:`OPERATORS` has an ``_out`` twin that writes into tensors of the caller and
returns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from proxytune_kernels.heads import Head
from proxytune_kernels.params import Edits, RowParams
from proxytune_kernels.reference import ATTRIBUTION_COLUMNS, SampleOutput, VerifyOutput

NUM_PARAMS = len(RowParams._fields)

_LOGITS = "Tensor base, Tensor? expert, Tensor? anti"
_PARAMS = ", ".join(f"Tensor {name}" for name in RowParams._fields)
_EDITS = ", ".join(f"Tensor? {name}" for name in Edits._fields)
_CONSTRAINTS = f"Tensor? bias, Tensor? allowed_mask, {_EDITS}, int vocab_size"
# The fields of three Heads, those of an absent role all None.
_HEAD_TYPES = ("Tensor", "Tensor", "Tensor?", "float?", "float?")
_HEADS = ", ".join(
    f"{kind if role == 'base' or kind.endswith('?') else kind + '?'} {role}_{field}"
    for role in ("base", "expert", "anti")
    for kind, field in zip(_HEAD_TYPES, Head._fields, strict=True)
)


class Output(NamedTuple):
    """One tensor that an operator returns."""

    field: str
    """Where it is in what the public function returns: ``status``, ``top.token_ids``."""
    dtype: torch.dtype
    shape: tuple[str, ...]
    """Its dimensions by name."""
    kind: type = Tensor
    """The NamedTuple that it is a field of; Tensor where it is returned alone."""

    @property
    def name(self) -> str:
        """Its name among the operator's outputs."""
        return self.field.replace(".", "_")

    @property
    def optional(self) -> bool:
        """Whether it need not be given where it has no column: it is asked for or not."""
        return self.shape[-1] in ("n", "a")


def outputs_of(kind: type, prefix: str = "") -> tuple[Output, ...]:
    """The tensors of a NamedTuple of ``Annotated[Tensor, dtype, *shape]``, and of those within."""
    found: list[Output] = []
    for field, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is Annotated:
            _, dtype, *shape = get_args(hint)
            found.append(Output(prefix + field, dtype, tuple(shape), kind))
        else:
            found += outputs_of(get_args(hint)[0], f"{prefix}{field}.")
    return tuple(found)


@dataclass(frozen=True)
class Operator:
    """An operator: its arguments, its outputs, and what follows from them."""

    name: str
    arguments: str
    """As a schema has them."""
    returns: type | Output
    """What the public function returns: a NamedTuple of tensors, or one tensor."""
    sizes: Callable[[Mapping[str, Any]], Mapping[str, int]]
    """The outputs' dimensions by name, from the arguments by name."""
    has_twin: bool = True
    """Whether there is an ``_out`` twin."""

    @cached_property
    def argument_names(self) -> tuple[str, ...]:
        """Names of the arguments, in order."""
        return tuple(part.split()[-1] for part in self.arguments.split(", "))

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        """The tensors that it returns."""
        return (self.returns,) if isinstance(self.returns, Output) else outputs_of(self.returns)

    @cached_property
    def out_names(self) -> tuple[str, ...]:
        """Keywords of the twin, one for each output."""
        return tuple(f"out_{output.name}" for output in self.outputs)

    @property
    def schema(self) -> str:
        """Schema of the operator."""
        tensors = ["Tensor"] * len(self.outputs)
        returns = f"({', '.join(tensors)})" if len(tensors) > 1 else "Tensor"
        return f"{self.name}({self.arguments}) -> {returns}"

    @property
    def out_schema(self) -> str:
        """Schema of its twin."""
        written = (
            f"Tensor({chr(97 + i)}!)" + (f"? {name}=None" if output.optional else f" {name}")
            for i, (output, name) in enumerate(zip(self.outputs, self.out_names, strict=True))
        )
        return f"{self.name}_out({self.arguments}, *, {', '.join(written)}) -> ()"

    def named(self, arguments: Iterable[Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return dict(zip(self.argument_names, arguments, strict=True))

    def shapes(self, arguments: Mapping[str, Any]) -> list[list[int]]:
        """Shape of each output of a call, from its arguments by name."""
        sizes = self.sizes(arguments)
        return [[sizes[dim] for dim in output.shape] for output in self.outputs]

    def empty(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Unwritten outputs of a call, on the device of its first argument."""
        like: Tensor = arguments[0]
        shapes = zip(self.outputs, self.shapes(self.named(arguments)), strict=True)
        return tuple(like.new_empty(shape, dtype=output.dtype) for output, shape in shapes)


def _position_sizes(a: Mapping[str, Any]) -> Mapping[str, int]:
    return {"B": a["base"].shape[0], "k + 1": a["base"].shape[1]}


NUM_WORDS = 5
"""Words of a rank's draw of one row; one more where the key of a given token is asked for."""
NUM_RESIDUAL_WORDS = 2


class Finished(NamedTuple):
    """What ``shard_finish`` returns for some rows, the same on every rank."""

    token_ids: Annotated[Tensor, torch.int64, "B"]
    """-1, with status 8, where the candidates did not reach to the cut."""
    logprobs: Annotated[Tensor, torch.float32, "B"]
    raw_logprobs: Annotated[Tensor, torch.float32, "B"]
    num_kept: Annotated[Tensor, torch.int32, "B"]
    status: Annotated[Tensor, torch.int32, "B"]
    cut: Annotated[Tensor, torch.int64, "B"]
    """Order key of the last kept token."""
    kept_mass: Annotated[Tensor, torch.int64, "B"]
    """Mass of the kept set."""
    wanted_logprobs: Annotated[Tensor, torch.float32, "B"]
    """Logprob of the token asked for, NaN where it is not kept."""
    wanted_raw_logprobs: Annotated[Tensor, torch.float32, "B"]
    """Its raw logprob, likewise."""
    raw_mass: Annotated[Tensor, torch.int64, "B"]
    """Mass of all tokens at temperature 1."""
    undecided: Annotated[Tensor, torch.int32, "B"]
    """Whether the candidates did not reach to the cut."""


class Accepted(NamedTuple):
    """What ``shard_accept`` returns."""

    num_accepted: Annotated[Tensor, torch.int32, "B"]
    steps: Annotated[Tensor, torch.int64, "B"]
    """The step that a residual is drawn at, -1 for none."""


_SAMPLING = "int noise_stream, int top_logprobs"

OPERATORS = {
    op.name: op
    for op in (
        Operator(
            "sample",
            # attributed: int64 [B], -1 for the token drawn; None: no attribution is asked for
            f"{_LOGITS}, {_PARAMS}, {_CONSTRAINTS}, {_SAMPLING}, Tensor? attributed",
            SampleOutput,
            lambda a: {
                "B": a["base"].shape[0],
                "n": a["top_logprobs"],
                "a": 0 if a.get("attributed") is None else ATTRIBUTION_COLUMNS,
            },
        ),
        Operator(
            "sample_hidden",
            f"{_HEADS}, {_PARAMS}, Tensor? bias, Tensor? allowed_mask, int vocab_size, {_SAMPLING}",
            SampleOutput,
            lambda a: {"B": a["base_hidden"].shape[0], "n": a["top_logprobs"], "a": 0},
        ),
        Operator(
            "combine",
            f"{_LOGITS}, Tensor alpha, {_CONSTRAINTS}",
            Output("x", torch.float32, ("B", "V")),
            lambda a: {"B": a["base"].shape[0], "V": a["vocab_size"]},
        ),
        Operator(
            "score",
            f"{_LOGITS}, Tensor token_ids, Tensor alpha, int vocab_size",
            Output("logprobs", torch.float32, ("B", "k + 1")),
            _position_sizes,
        ),
        Operator(
            "verify",
            f"{_LOGITS}, Tensor draft_token_ids, Tensor? draft_logits, {_PARAMS}, {_CONSTRAINTS}, "
            # not "mode": torch.compile passes arguments on by name, beside one of its own so called
            "int verify_mode",
            VerifyOutput,
            _position_sizes,
        ),
        # The operators on shards of the vocabulary (docs/sharded.md), which ops/sharded calls
        # between its collectives; a row's numbers travel as int64 words. All tensors are
        # contiguous. W ranks, B rows, n tokens of this rank's shard.
        # x fp32 [B, n] -> one word: highest x, whether a NaN was there, tokens not masked
        Operator(
            "shard_scan",
            "Tensor x",
            Output("out", torch.int64, ("B",)),
            lambda a: {"B": a["x"].shape[0]},
            has_twin=False,
        ),
        # summaries: shard_scan's of all ranks, [W, B] -> order keys, 0 where masked
        Operator(
            "shard_keys",
            "Tensor x, Tensor summaries, int vocab_start",
            Output("out", torch.int64, ("B", "n")),
            lambda a: {"B": a["x"].shape[0], "n": a["x"].shape[1]},
            has_twin=False,
        ),
        # -> 5 words, or 6 with wanted. Draws among the tokens whose key is at least cut and that
        # min_p keeps; without a cut, rows with top_k or top_p are not drawn.
        Operator(
            "shard_draw",
            f"Tensor x, Tensor summaries, {_PARAMS}, Tensor? cut, Tensor? wanted, "
            "int vocab_start, int noise_stream",
            Output("out", torch.int64, ("B", "words")),
            lambda a: {"B": a["x"].shape[0], "words": NUM_WORDS + (a["wanted"] is not None)},
            has_twin=False,
        ),
        # keys [B, m], edges [B, E] descending -> for each edge the number, then the mass, of the
        # keys from it up to the edge before
        Operator(
            "shard_histogram",
            "Tensor keys, Tensor summaries, Tensor temperature, Tensor edges",
            Output("out", torch.int64, ("B", "2 E")),
            lambda a: {"B": a["edges"].shape[0], "2 E": 2 * a["edges"].shape[1]},
            has_twin=False,
        ),
        # words [W, B, 2 to 6]; candidates [W, B, C]: each rank's first keys, 0 past the last;
        # kept int64 [B, 4]: the kept sets (cut, count, mass, raw mass of the row) where known
        Operator(
            "shard_finish",
            f"Tensor summaries, Tensor words, Tensor? candidates, {_PARAMS}, Tensor? kept, "
            "int noise_stream",
            Finished,
            lambda a: {"B": a["words"].shape[1]},
            has_twin=False,
        ),
        # logprobs of the drafts, NaN where not kept: fp32 [B, k + 1] and [B, k]
        Operator(
            "shard_accept",
            "Tensor target_logprobs, Tensor target_status, Tensor draft_logprobs, "
            "Tensor draft_token_ids, Tensor seed, Tensor position",
            Accepted,
            lambda a: {"B": a["seed"].shape[0]},
            has_twin=False,
        ),
        # x [B (k + 1), n] and draft_x [B k, n] with their kept sets; steps [B] -> 2 words
        Operator(
            "shard_residual",
            "Tensor x, Tensor summaries, Tensor cut, Tensor kept_mass, Tensor draft_x, "
            "Tensor draft_summaries, Tensor draft_cut, Tensor draft_kept_mass, Tensor steps, "
            f"{_PARAMS}, int vocab_start",
            Output("out", torch.int64, ("B", "words")),
            lambda a: {"B": a["steps"].shape[0], "words": NUM_RESIDUAL_WORDS},
            has_twin=False,
        ),
    )
}
"""All operators by name: the public ones, and those that sharded draws consist of."""


def _one_device(like: Tensor, *tensors: object) -> None:
    # A meta tensor among real ones brings the call here: its outputs would never be written.
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device != like.device:
            raise ValueError(f"proxytune: tensors on {like.device} and {tensor.device}")


def define(namespace: str, operators: Iterable[Operator]) -> torch.library.Library:
    """Define operators and their fake versions in ``torch.ops``; the library must be kept."""
    library = torch.library.Library(namespace, "DEF")

    def fake(operator: Operator) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            _one_device(*arguments)
            results = operator.empty(*arguments)
            return results if len(results) > 1 else results[0]

        return run

    def fake_out(*arguments: Any, **outputs: Tensor | None) -> None:
        _one_device(*arguments, *outputs.values())

    for operator in operators:
        schemas = {operator.schema: fake(operator)}
        if operator.has_twin:
            schemas[operator.out_schema] = fake_out
        for schema, run in schemas.items():
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            name = schema.partition("(")[0]
            torch.library.register_fake(f"{namespace}::{name}", run, lib=library)
    return library


LIBRARY = define("proxytune", OPERATORS.values())
LIBRARY.define(
    "head_logits_out(Tensor hidden, Tensor weight, int begin, int end, *, Tensor(a!) out_logits) "
    "-> ()"
)
"""The CPU's part of ``sample_hidden``: fp32 hidden [B, H] by the weights of tokens [begin, end)."""
LIBRARY.define("packed_linear(Tensor rows, Tensor weight, Tensor scales) -> Tensor")
torch.library.register_fake(
    "proxytune::packed_linear",
    lambda rows, weight, scales: rows.new_empty(rows.shape[0], weight.shape[0]),
    lib=LIBRARY,
)
"""Rows [T, K] times weights int8 [N, K], scales [N, K / 128 rounded up]: [T, N]. fp32 rows by
vectors, scales of fp32, bf16 or fp16; bf16 rows and scales, K a multiple of 64, by AMX. AMX takes
int4, too, N a multiple of 64, as torch packs it: uint8 [N, K / 2], scales and zeros bf16
[K / 32, N, 2]."""
