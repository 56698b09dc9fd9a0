"""The small pair as one model where it is two checkpoints: each layer holds both their weights.

Rows are interleaved, row 2s is the expert's row of slot s and row 2s + 1 the anti-expert's. A
linear layer of the pair is one batched product over weights [2, in, out], a norm scales by weights
[2, 1, H], an embedding looks ids up in one table of both. As many bytes are read as by two models,
in half as many calls: this is for models so small that calls are what their step costs.

A layer whose weights are equal in both checkpoints serves all rows as it is. The others' weights
are copied: the given ones belong to the caller.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, LayerNorm, Linear, Module, Parameter, RMSNorm
from torch.nn.functional import layer_norm

from proxytune_kernels.decoder.model import FusedNorm, is_llama
from proxytune_kernels.decoder.pair.shared import (
    PairError,
    check_same_architecture,
    held_tensors,
    same_values,
)


class BatchedLinear(Linear):
    """The same linear layer of both models: weight [2, in, out], bias [2, 1, out] or None."""

    def forward(self, input: Tensor) -> Tensor:
        """Result [2B, q, out] for input [2B, q, in]."""
        rows, queries, width = input.shape
        if rows > 2:
            input = input.view(-1, 2, queries, width).transpose(0, 1).reshape(2, -1, width)
        if self.bias is None:
            result = torch.bmm(input, self.weight)
        else:
            result = torch.baddbmm(self.bias, input, self.weight)
        if rows > 2:
            out = result.shape[-1]
            result = result.view(2, -1, queries, out).transpose(0, 1).reshape(rows, queries, out)
        return result


class BatchedEmbedding(Embedding):
    """The same embedding of both models: weight [2 V, H], the anti-expert's behind the expert's."""

    offset: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Result [2B, q, H] for ids int64 [2B, q]."""
        pairs = input.view(-1, 2, input.shape[-1]) + self.offset
        return super().forward(pairs.flatten(0, 1))


class BatchedNorm(Module):
    """The same RMS norm of both models: weight [2, 1, H]. Stands before its class."""

    def forward(self, input: Tensor) -> Tensor:
        """Result [2B, ..., H] for input [2B, ..., H]."""
        pairs = input.reshape(input.shape[0] // 2, 2, -1, input.shape[-1])
        result: Tensor = super().forward(pairs)
        return result.view(input.shape)


class BatchedLayerNorm(LayerNorm):
    """The same layer norm of both models: weight and bias [2, 1, H]."""

    def forward(self, input: Tensor) -> Tensor:
        """Result [2B, ..., H] for input [2B, ..., H]."""
        plain = layer_norm(input, self.normalized_shape, None, None, self.eps)
        pairs = plain.view(input.shape[0] // 2, 2, -1, input.shape[-1]) * self.weight
        return (pairs if self.bias is None else pairs + self.bias).view(input.shape)


def batched_pair(expert: Any, anti: Any) -> Any:
    """Expert and anti as one model of rows [2B, q], the expert's and the anti-expert's in turns.

    Args:
        expert, anti: causal LMs of transformers of one class and configuration, on one device.

    Returns:
        A copy of the modules with a configuration of its own, in evaluation mode. Weights that
        differ are held once more, stacked; the others are the expert's tensors.

    Raises:
        PairError: the models differ in more than their weights, or weights differ in a layer of a
            kind that is not known here.
    """
    check_same_architecture(expert, anti)
    tensors = (*expert.parameters(), *expert.buffers())
    pair = copy.deepcopy(expert, {id(t): t for t in tensors}).eval()
    others = dict(anti.named_modules())
    if others.keys() != dict(pair.named_modules()).keys():
        raise PairError("expert and anti must have the same layers")
    for path, module in list(pair.named_modules()):
        ours, theirs = held_tensors(path, module), held_tensors(path, others[path])
        kinds = [_kinds(tensors) for tensors in (ours, theirs)]
        if kinds[0] != kinds[1]:
            raise PairError(
                f"expert and anti must have weights of one kind, got {kinds[0]} and {kinds[1]} in "
                f"{path}"
            )
        if any(t.is_meta for t in (*ours.values(), *theirs.values())):
            raise PairError(
                f"weights to be stacked must be in memory, got some offloaded in {path}"
            )
        differing = {name for name in ours if not same_values(ours[name], theirs[name])}
        if differing:
            _check(path, module, differing)
            both = {n: torch.stack([t, theirs[n]]) for n, t in ours.items()}
            _batch(module, {n: both[n] for n in both if n in module._parameters})
    return pair


def _kinds(tensors: dict[str, Tensor]) -> str:
    kinds = (f"{name} {t.dtype} {list(t.shape)} on {t.device}" for name, t in tensors.items())
    return ", ".join(kinds) or "none"


def _check(path: str, module: Any, differing: set[str]) -> None:
    """Refuse a layer that :func:`_batch` can't let serve both models."""
    kind = type(module)
    known = kind in (Linear, LayerNorm) or isinstance(module, Embedding) or _is_norm(kind)
    # One with more arguments computes more than its name says.
    known = known and len(inspect.signature(kind.forward).parameters) == 2
    if not known or not differing <= set(module._parameters) or "forward" in vars(module):
        raise PairError(
            f"expert and anti may differ in the weights of linear layers, embeddings and norms, "
            f"got {kind.__name__} at {path} with another {', '.join(sorted(differing))}"
        )
    if not all(type(t) is Parameter for t in module._parameters.values() if t is not None):
        raise PairError(f"weights to be stacked must be plain tensors, got others in {path}")


def _is_norm(kind: type[Module]) -> bool:
    # torch's own takes no weight of another shape than what it normalises.
    return kind.__name__.endswith("RMSNorm") and kind is not RMSNorm


def _batch(module: Any, both: dict[str, Tensor]) -> None:
    """Let a layer serve the rows of both models, with weights [2, ...]."""
    kind = type(module)
    # What is one vector in a model is added to, or scales, all of a row's tokens.
    both = {name: t[:, None] if t.dim() == 2 else t for name, t in both.items()}
    if kind is Linear:
        module.__class__ = BatchedLinear
        both["weight"] = both["weight"].transpose(1, 2).contiguous()
    elif isinstance(module, Embedding):
        module.__class__ = type(f"Batched{kind.__name__}", (BatchedEmbedding, kind), {})
        both["weight"] = both["weight"].flatten(0, 1)
        offset = torch.tensor([[0], [module.num_embeddings]], device=both["weight"].device)
        module.register_buffer("offset", offset, persistent=False)
    elif kind is LayerNorm:
        module.__class__ = BatchedLayerNorm
    else:
        norm = (FusedNorm, kind) if is_llama(kind, "RMSNorm") else (kind,)
        module.__class__ = type(f"Batched{kind.__name__}", (BatchedNorm, *norm), {})
    for name, tensor in both.items():
        setattr(module, name, Parameter(tensor, requires_grad=False))
