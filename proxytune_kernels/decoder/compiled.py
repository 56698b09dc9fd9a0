"""Forwards of few tokens through torch.compile, and products of one input made at once.

A layer of Llama runs some 40 kernels module by module. Compiled, the norms, the rotary embedding,
the activation and the additions are one kernel each or less, and what is written to the cache is
written by the kernel that computes it; queries, keys and values are one product, and so are gate
and up. docs/decoder.md has the count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.nn.functional import linear

from proxytune_kernels.decoder.cache import CacheStep
from proxytune_kernels.ops.lora import MAX_RANK

StepForward = Callable[[Tensor, CacheStep], Tensor]


class CompiledForwards:
    """A member's forwards, each compiled for one number of rows and of tokens a row.

    All that changes from step to step lies in tensors: tokens, positions, where keys are written.
    The step is made anew within the forward, from these, so that nothing of it is kept. What its
    layers share (lengths, zeros) is given, as compiled code would make it in each layer.

    Args:
        forward: token ids [B, q] and the step -> logits [B, q, V]; its modules must not change.
        heads: query heads of a layer.
        required: what can't be compiled is an error; else ``failed`` says why, from then on.
    """

    def __init__(self, forward: StepForward, heads: int, required: bool) -> None:
        self._forward, self._heads, self._required = forward, heads, required
        self._made: dict[tuple[range, int], tuple[Callable[..., Tensor], Tensor, Tensor]] = {}
        self.failed: str | None = None
        """Why nothing is compiled any more; None while it is."""

    @property
    def count(self) -> int:
        """How many were compiled."""
        return len(self._made)

    def __call__(self, token_ids: Tensor, rows: range, step: CacheStep) -> Tensor | None:
        """Logits [B, q, V] of a step of B rows; None where it can't be compiled.

        Args:
            token_ids: int64 [B or less, q]; rows without any get what was there before.
            rows: the B rows of the cache.
            step: theirs, which says nothing of the host's lengths.
        """
        key = rows, token_ids.shape[1]
        if key not in self._made:
            count = len(rows) * self._heads * -(-key[1] // 16)
            self._made[key] = (
                self._compile(step),
                token_ids.new_zeros(len(rows), key[1]),
                token_ids.new_zeros(count, dtype=torch.int32),
            )
        compiled, inputs, arrivals = self._made[key]
        # Always the same tensor: code is compiled for kinds of tensors, too.
        inputs[: len(token_ids)].copy_(token_ids)
        places = step.position_ids, step.positions, step.write_index
        try:
            return compiled(inputs, *places, step.seq_lens(), arrivals)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._required or not _is_of_the_compiler(error):
                raise
            self.failed = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            return None

    def _compile(self, step: CacheStep) -> Callable[..., Tensor]:
        forward, cache, span = self._forward, step.cache, step.span
        first_row, row_stride = step.first_row, step.row_stride

        def static_forward(
            token_ids: Tensor,
            position_ids: Tensor,
            positions: Tensor,
            write_index: Tensor,
            seq_lens: Tensor,
            arrivals: Tensor,
        ) -> Tensor:
            step = CacheStep(
                cache,
                position_ids,
                positions,
                write_index,
                span,
                first_row=first_row,
                row_stride=row_stride,
                ragged=True,
            )
            step.take(seq_lens, arrivals)
            return forward(token_ids, step)

        compiled: Callable[..., Tensor] = _compile(static_forward, fullgraph=True)
        return compiled


def _is_of_the_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def _compile(function: Any, **options: Any) -> Any:
    # torch.compile files what it makes under the code object. Forwards of several members, rows or
    # tokens share one, and must not even look at each other's: modules are not guarded.
    function.__code__ = function.__code__.replace()
    # Checking thousands of module attributes takes as long as a small model's forward, and the
    # modules are the runner's own, which nobody changes.
    guard_filter = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    options["options"] = {"guard_filter_fn": guard_filter}
    return torch.compile(function, dynamic=False, **options)


def windows(config: Any) -> list[int | None]:
    """The attention windows of a model's layers, each once; None is full attention."""
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None) or ["sliding_attention"]
    return list({window if kind == "sliding_attention" else None: None for kind in types})


class CompiledStep:
    """A role's decoding forward, compiled once for one row and once for several.

    Args:
        forward: token ids [B, 1] and the step -> logits [B, V]; its modules must not change.
        windows: the attention windows of the model's layers; None among them for full attention.
    """

    def __init__(self, forward: StepForward, windows: Sequence[int | None]) -> None:
        def step_forward(token_ids: Tensor, step: CacheStep) -> Tensor:
            return forward(token_ids, step)

        self._windows = windows
        self._compiled: StepForward = _compile(step_forward)

    def __call__(self, token_ids: Tensor, step: CacheStep) -> Tensor:
        """Logits [B, V] of one more token in each of the first B slots."""
        # "Maybe": of two slots, several rows are always two.
        torch._dynamo.maybe_mark_dynamic(step.span, 0)
        if token_ids.shape[0] > 1:
            # Rows that are equally long just now take the ragged rows' graph.
            step.ragged = True
            assert step.write_index is not None
            for tensor in (token_ids, step.position_ids, step.positions, step.write_index):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            # The masks are built here, for all layers, rather than in each layer.
            for window in self._windows:
                torch._dynamo.maybe_mark_dynamic(step.mask(window), (0, 3))
        return self._compiled(token_ids, step)

    def warm_up_lengths(
        self, max_batch_size: int, max_seq_len: int, several: bool = False
    ) -> list[tuple[int, ...]]:
        """Lengths of the rows, batch by batch, that meet every graph once.

        ``several``: a slot has several rows, so that there is no batch of one.
        """
        # Unlike the number of rows: dimensions that are equal by chance are compiled as equal.
        short = min(5, max_seq_len - 1)
        if several:
            return [(short,)]
        # One row has another graph where it has outgrown a window.
        past = [w + 1 for w in self._windows if w is not None and w + 1 < max_seq_len]
        batch = [(short, short - 1)] if max_batch_size > 1 else []
        return [*((length,) for length in (short, *past)), *batch]


_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that take one input in the models of transformers. Where they do not, the results stay
right (see ``_Part``), and the product is made once for each of them."""


class _Product:
    """The product of one input and the weights of several layers."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Result [..., sum of out] for input [..., in]."""
        return linear(x, self.weight, self.bias)


class _AdaptedProduct(_Product):
    """With the layers' adapters of low rank, which one operator adds."""

    def __init__(self, weight: Tensor, bias: Tensor | None, layers: Sequence[Any]) -> None:
        super().__init__(weight, bias)
        first = layers[0]
        self.lora_A = torch.cat([layer.lora_A.detach() for layer in layers])
        self.lora_B = torch.cat([layer.lora_B.detach() for layer in layers])
        self.widths = [len(layer.lora_B) for layer in layers]
        self.scaling, self.row_stride = first.scaling, first.row_stride

    def __call__(self, x: Tensor) -> Tensor:
        """As above; the adapters are on the rows that the layers have them on."""
        y = super().__call__(x)
        torch.ops.proxytune.add_lora(
            y, x, self.lora_A, self.lora_B, self.widths, self.scaling, self.row_stride
        )
        return y


class _Part:
    """A layer whose result is a part of a product that it shares with its neighbours."""

    product: _Product
    place: slice
    is_last: bool

    def forward(self, x: Tensor) -> Tensor:
        """Result [..., out] for input [..., in], a view."""
        product = self.product
        if product.output is None or product.input is not x:
            product.input, product.output = x, product(x)
        output: Tensor = product.output[..., self.place]
        if self.is_last:
            product.input = product.output = None
        return output


def merge_products(model: Module) -> int:
    """Let layers that take one input (queries, keys and values; gate and up) multiply at once.

    Their weights are laid one behind the other, once, and the parameters become views of that: the
    same parameters with the same values, for whoever else holds them too. While one layer is laid
    out, it is there twice. So are weights under the adapters of a shared pair; those of the
    adapters, which are small, are copied. Layers stay as they are that are anything but a plain
    ``Linear`` without hooks (quantised and packed ones, adapters of others), whose parameters are
    not plain, or share their memory with others (tied ones).

    Args:
        model: its modules are changed.

    Returns:
        How many products there are.
    """
    holders = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    count = 0
    for layers in _groups(model):
        bases = [getattr(layer, "base", layer) for layer in layers]
        if any(holders[id(p)] > 1 for base in bases for p in base.parameters()):
            continue
        weight = _laid_out([base.weight for base in bases])
        bias = None if bases[0].bias is None else _laid_out([base.bias for base in bases])
        if weight is None or (bias is None) != (bases[0].bias is None):
            continue
        adapted = bases[0] is not layers[0]
        product = _AdaptedProduct(weight, bias, layers) if adapted else _Product(weight, bias)
        start = 0
        for layer, base in zip(layers, bases, strict=True):
            kind = type(layer)
            layer.__class__ = type(f"Merged{kind.__name__}", (_Part, kind), {})
            layer.product, layer.is_last = product, layer is layers[-1]
            layer.place = slice(start, start + base.out_features)
            start += base.out_features
        count += 1
    return count


def _groups(model: Module) -> Iterator[list[Any]]:
    """Layers that may take one input, by what holds them; then what is left with an adapter."""
    for module in list(model.modules()):
        for names in _TOGETHER:
            layers = [module._modules.get(name) for name in names]
            kinds = {_kind(layer) for layer in layers}
            if len(kinds) == 1 and None not in kinds:
                yield layers
    for module in list(model.modules()):
        if hasattr(module, "lora_A") and not isinstance(module, _Part) and _kind(module):
            yield [module]


def _kind(layer: Any) -> Any:
    """What layers must have in common to be merged; None for one that can't be."""
    from proxytune_kernels.decoder.pair.shared import LoRALayer

    adapter: tuple[Any, ...] = ()
    if isinstance(layer, LoRALayer):
        if layer.bias is not None:
            return None
        rank = len(layer.lora_A)
        if rank > MAX_RANK:
            return None
        adapter = type(layer), layer.scaling, layer.lora_A.dtype, rank
        layer = layer.base
    if type(layer) is not Linear or "forward" in vars(layer):
        return None
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if any(type(p) is not Parameter or p.device.type == "meta" for p in layer.parameters()):
        return None
    weight = layer.weight
    return layer.in_features, weight.dtype, weight.device, layer.bias is None, *adapter


@torch.inference_mode(False)
@torch.no_grad()
def _laid_out(parameters: Sequence[Parameter]) -> Tensor | None:
    """One tensor of parameters [n, ...], which become its parts.

    Those that another decoder has laid out lie there already. None where others share their memory.
    """
    first, end = parameters[0].data, parameters[0].data_ptr()
    storage, adjacent = first.untyped_storage().data_ptr(), True
    for p in parameters:
        adjacent &= p.untyped_storage().data_ptr() == storage and p.data_ptr() == end
        adjacent &= p.is_contiguous()
        end += p.nbytes
    sizes = [len(p) for p in parameters]
    if adjacent:
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    if any(p.untyped_storage().nbytes() != p.nbytes for p in parameters):
        return None
    merged = torch.cat([p.data for p in parameters])
    for p, part in zip(parameters, merged.split(sizes), strict=True):
        p.data = part
    return merged
