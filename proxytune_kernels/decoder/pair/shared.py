"""The small pair as one model: the anti-expert's weights, with a LoRA adapter on the expert's rows.

An adapted layer computes y = W x + b for all rows and adds scaling * B (A x) to the expert's alone:
the pair reads W once where two models read it twice. Rows are interleaved, row 2s is the expert's
row of slot s and row 2s + 1 the anti-expert's. No layer has to ask whose a row is: there are no
hooks and no index tensors, and a forward compiles and is captured whole.

The bits are PEFT's: the same products of the same shapes, rounded at the same places. The pair
gives those of PEFT's mixed batch (``adapter_names``, the anti-expert's rows without one), the
expert alone those of the adapted model. These two differ where the adapter has another dtype than
the model (PEFT loads it in fp32 unless told otherwise): a mixed batch rounds the update to the
model's dtype before it is added, the adapted model rounds the sum alone.

Source: Hu et al. 2021, arXiv 2106.09685; peft.tuners.lora.layer.Linear.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import linear

from proxytune_kernels.trio.quantization import plain_tensors

# What a configuration says besides what its model computes.
_LABELS = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"} | {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


# What every module has, and what says nothing of a layer's results.
_BOOKKEEPING = {*vars(Module()), "config", "generation_config", "peft_config", "extra_repr"}
_SETTINGS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)


class PairError(ValueError):
    """An expert and an anti-expert that cannot run as one model."""


class LoRALayer(Module):
    """A linear layer with an update of low rank on all rows.

    Args:
        base: the layer without the update, x [rows, q, in] -> y [rows, q, out].
        lora_A: [r, in].
        lora_B: [out, r].
        bias: [out] of the update, or None.
        scaling: factor of the update.
    """

    row_stride = 1
    """Of how many rows one has the update."""

    bias: Parameter | None

    def __init__(
        self,
        base: Module,
        lora_A: Parameter,
        lora_B: Parameter,
        bias: Parameter | None,
        scaling: float,
    ) -> None:
        super().__init__()
        self.base = base
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.register_parameter("bias", bias)
        self.scaling = scaling

    def update(self, x: Tensor) -> Tensor:
        """scaling * B (A x) [rows, q, out], in the adapter's dtype."""
        # type_as: a microsecond less than to(dtype), in each of a model's layers.
        update = linear(linear(x.type_as(self.lora_A), self.lora_A), self.lora_B, self.bias)
        return update if self.scaling == 1.0 else update * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """Result [rows, q, out] in the layer's dtype."""
        y = self.base(x)
        return (y + self.update(x)).type_as(y)


class PairLoRALayer(LoRALayer):
    """A linear layer with an update of low rank on the rows 0, 2, 4, ..."""

    row_stride = 2

    def forward(self, x: Tensor) -> Tensor:
        """Result [2B, q, out] in the layer's dtype."""
        y = self.base(x)
        y[0::2].add_(self.update(x[0::2]).type_as(y))
        return y


def has_lora(model: Module) -> bool:
    """Whether a model holds LoRA layers of PEFT, merged or not."""
    # Whoever made one has imported it; it takes seconds.
    lora = sys.modules.get("peft.tuners.lora")
    return lora is not None and any(isinstance(m, lora.LoraLayer) for m in model.modules())


def shared_pair(expert: Any, anti: Any) -> tuple[Any, Any]:
    """The pair, and its expert alone, over one set of weights: the anti-expert's and the adapter.

    Args:
        expert: a causal LM of transformers with the layers of one LoRA adapter (PEFT) injected.
        anti: the same model without them; other weights are the same tensors or equal ones.

    Returns:
        The pair, whose rows [2B, q] are the expert's and the anti-expert's in turns, and the
        expert, whose rows [B, q] are all its own. Both are copies of the modules, in evaluation
        mode, that hold the tensors of ``anti`` and the adapter; each has its own configuration.
        The anti-expert alone is ``anti``.

    Raises:
        PairError: the expert is not the anti-expert and an adapter on its linear layers.
    """
    check_same_architecture(expert, anti)
    adapters = _adapters(expert)
    plain = dict(_plain_tensors(anti))
    shared: dict[int, Any] = {}
    for name, tensor in _plain_tensors(expert):
        shared[id(tensor)] = _same(name, tensor, plain.pop(name, None))
    if plain:
        raise PairError(f"expert must have all weights of anti, got none for {next(iter(plain))}")
    copies = []
    for kind in (PairLoRALayer, LoRALayer):
        memo = dict(shared)
        for layer, adapter in adapters.items():
            base = copy.deepcopy(layer.base_layer, memo)
            memo[id(layer)] = base if adapter is None else kind(base, *adapter)
        copies.append(copy.deepcopy(expert, memo).eval())
    pair, alone = copies
    return pair, alone


def check_same_architecture(expert: Any, anti: Any) -> None:
    """Raise PairError unless both models compute the same function of their weights."""
    if type(expert) is not type(anti):
        raise PairError(
            f"expert and anti must be of one class, got {type(expert).__name__} and "
            f"{type(anti).__name__}"
        )
    ours, theirs = expert.config.to_dict(), anti.config.to_dict()
    for key in sorted((ours.keys() | theirs.keys()) - _LABELS):
        if ours.get(key) != theirs.get(key):
            raise PairError(
                f"expert and anti must have one configuration, got {key} {ours.get(key)!r} and "
                f"{theirs.get(key)!r}"
            )


def same_values(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal; quantised ones are if all their parts are."""
    if x is y:
        return True
    parts, others = list(plain_tensors(x)), list(plain_tensors(y))
    return len(parts) == len(others) and all(map(torch.equal, parts, others))


def held_tensors(path: str, module: Module) -> dict[str, Tensor]:
    """All that a layer itself holds: parameters, buffers, and tensors that are neither.

    Raises:
        PairError: it holds something else, so that two layers can't be told to be equal.
    """
    kind = type(module)
    for name in ("get_extra_state", "_save_to_state_dict"):
        if getattr(kind, name) is not getattr(Module, name):
            raise PairError(
                f"expert and anti must hold plain weights to run as one model, got "
                f"{kind.__name__} at {path} with a state of its own"
            )
    if module._forward_hooks or module._forward_pre_hooks:
        raise PairError(
            f"expert and anti must have no hooks, got some on {kind.__name__} at {path}"
        )
    held = {**module._parameters, **module._buffers}
    held |= {name: value for name, value in vars(module).items() if name not in _BOOKKEEPING}
    if "_hf_hook" in held:  # accelerate brings in what is elsewhere
        held = {n: v for n, v in held.items() if n not in ("_hf_hook", "_old_forward", "forward")}
    return dict(_tensors_in(f"{kind.__name__} at {path}", held.items()))


def _tensors_in(layer: str, values: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in values:
        inside: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Tensor):
            yield str(name), value
        elif isinstance(value, Mapping):
            inside = ((f"{name}.{key}", part) for key, part in value.items())
        elif isinstance(value, (tuple, list, set, frozenset)):
            inside = ((f"{name}.{i}", part) for i, part in enumerate(value))
        elif isinstance(value, partial):
            inside = [(name, (value.func, value.args, value.keywords))]
        elif not isinstance(value, _SETTINGS) and not _is_stateless(value):
            raise PairError(
                f"expert and anti must hold plain weights to run as one model, got "
                f"{type(value).__name__} as {name} in {layer}"
            )
        yield from _tensors_in(layer, inside)


def _is_stateless(value: Any) -> bool:
    """Whether it is a function that holds nothing."""
    if isinstance(value, BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, ModuleType | type)
    return isinstance(value, FunctionType) and value.__closure__ is None


def _plain_tensors(module: Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """What a model holds without its adapters, by the names of it there."""
    module = getattr(module, "base_layer", module)
    for name, tensor in held_tensors(prefix.removesuffix("."), module).items():
        yield prefix + name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _plain_tensors(child, f"{prefix}{name}.")


def _same(name: str, expert: Tensor, anti: Tensor | None) -> Tensor:
    """The anti-expert's tensor, checked to be the expert's as well."""
    if anti is None:
        raise PairError(f"expert must have no weight but anti's and LoRA layers, got {name}")
    described = [f"{t.dtype} {list(t.shape)} on {t.device}" for t in (expert, anti)]
    if described[0] != described[1]:
        raise PairError(
            f"expert and anti must have equal weights, got {name} of {' and '.join(described)}"
        )
    if not same_values(expert, anti):
        raise PairError(
            f"expert must be anti and an adapter, got other values in {name}: an expert that was "
            f"merged, or tuned as a whole, shares no weights"
        )
    return anti


def _adapters(expert: Module) -> dict[Any, tuple[Any, ...] | None]:
    """Each LoRA layer with what :class:`LoRALayer` takes of it; None where it has no adapter."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapters = {}
    for path, module in expert.named_modules():
        if isinstance(module, LoraLayer):
            adapters[module] = _adapter(path, module)
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise PairError(
                f"expert must be changed by LoRA layers only, got {type(module).__name__} at {path}"
            )
    if not adapters:
        raise PairError("expert must have LoRA layers, got none")
    return adapters


def _adapter(path: str, layer: Any) -> tuple[Any, ...] | None:
    from peft.tuners.lora import Linear

    kind = type(layer).__name__
    if type(layer).forward is not Linear.forward or hasattr(layer.base_layer, "base_layer"):
        raise PairError(f"expert must have LoRA on plain linear layers, got {kind} at {path}")
    if layer.merged or layer.disable_adapters:
        state = "merged" if layer.merged else "disabled"
        raise PairError(f"expert must have its adapter active beside its weights, got it {state}")
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        raise PairError(f"expert must have LoRA layers without hooks, got some at {path}")
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) > 1:
        raise PairError(f"expert must have one active adapter, got {', '.join(names)} at {path}")
    if not names:
        return None
    (name,) = names
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
        raise PairError(f"expert must have plain LoRA, got {variant} at {path}")
    lora_B, scaling = layer.lora_B[name], layer.scaling[name]
    weight, bias = lora_B.weight, lora_B.bias
    # A power of two (alpha / r mostly is one) scales B without rounding, which spares each layer a
    # pass. Not in fp16, whose smallest numbers, 6e-8, are not far enough.
    if math.frexp(scaling)[0] == 0.5 and weight.dtype != torch.float16:
        weight, bias, scaling = _scaled(weight, scaling), _scaled(bias, scaling), 1.0
    return layer.lora_A[name].weight, weight, bias, scaling


def _scaled(parameter: Parameter | None, factor: float) -> Parameter | None:
    if parameter is None or factor == 1.0:
        return parameter
    return Parameter(parameter.detach() * factor, requires_grad=False)
