"""Takes the per-call cost of ``nn.Module`` off the decoder's own copy of a model.

At batch 1 a small model's step is mostly Python: each module call goes through the hook machinery,
and each parameter through ``__getattr__``. The runner's copy has no hooks to serve, so its modules
are called straight. The numbers do not change: the same functions run on the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import linear, rms_norm

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _SlimLinear(Linear):
    def __call__(self, input: Tensor) -> Tensor:
        parameters = self._parameters
        return linear(input, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]


class _SlimNorm:
    """Llama's RMSNorm in one call; in fp32 to the bit what its six calls give."""

    _parameters: dict[str, Tensor]
    variance_epsilon: float

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        if weight.dtype == hidden_states.dtype == torch.float32:
            return rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
        return self.forward(hidden_states)  # type: ignore[attr-defined]


def _is_llama_norm(kind: type[Module]) -> bool:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    # transformers copies this class from model to model: the same code under other names.
    code, llama = kind.forward.__code__, LlamaRMSNorm.forward.__code__
    return (code.co_code, code.co_names, code.co_consts) == (
        llama.co_code,
        llama.co_names,
        llama.co_consts,
    )


def _slim_class(kind: type[Module]) -> type[Module]:
    if kind is Linear:
        return _SlimLinear
    if kind.__name__.endswith("RMSNorm") and _is_llama_norm(kind):
        return type(kind.__name__, (_SlimNorm, kind), {"__module__": kind.__module__})
    body = {"__call__": kind.forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), body)


def _slim_config(config: Any) -> None:
    # Every read of a configuration looks in a map of aliases and in overrides per layer.
    kind = type(config)
    if not config.attribute_map and "_heterogeneity_spec" not in vars(config):
        body = {"__getattribute__": object.__getattribute__, "__module__": kind.__module__}
        config.__class__ = type(kind.__name__, (kind,), body)


def slim(model: Any) -> None:
    """Let the modules of a model that is nobody else's be called without ``nn.Module.__call__``.

    The model must be in eval mode, and stay with the modules and parameters that it has; those of
    a module that accelerate offloads may come and go. A module with hooks, with a ``forward`` of
    its own (as accelerate puts there), or whose class defines another ``__call__``, is called as
    before.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # The latter only adds what training needs.
    calls = (Module.__call__, GradientCheckpointingLayer.__call__)
    classes: dict[Any, type[Module]] = {}
    for module in list(model.modules()):
        kind = type(module)
        plain = kind.__call__ in calls and "forward" not in vars(module)
        if plain and not any(getattr(module, name) for name in _HOOKS):
            if kind not in classes:
                classes[kind] = _slim_class(kind)
            module.__class__ = classes[kind]
        # Found at once, where nn.Module has them found by __getattr__ after a failed look here.
        # Not the buffers: some models register new ones as they run (rope scaling).
        vars(module).update(module._modules)
        # Nor the parameters that accelerate's hook brings in for a call and takes away again.
        if "_hf_hook" not in vars(module):
            vars(module).update(module._parameters)
    _slim_config(model.config)
