"""A role's head: its final hidden states, its lm_head, and what it does to the logits."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """What makes one role's logits.

    ``soft_cap * tanh(l / soft_cap)``, with ``l = logit_scale * (hidden @ weight.T + bias)``.
    """

    hidden: Tensor
    """[B, H], fp32, bf16 or fp16: after the model's last norm."""
    weight: Tensor
    """[V, H], of the same dtype, where the model has it: a tied embedding is not copied."""
    bias: Tensor | None = None
    """[V], fp32, bf16 or fp16."""
    logit_scale: float | None = None
    """What Cohere's models multiply by; Granite's divide: 1 / logits_scaling."""
    soft_cap: float | None = None
    """Gemma's final_logit_softcapping."""

    @classmethod
    def of(cls, model: Any, hidden: Tensor) -> Head:
        """The head of a causal LM of transformers, for its final hidden states.

        Args:
            model: what `get_output_embeddings` of gives a plain `torch.nn.Linear`.
            hidden: [B, H], as `model.base_model(...).last_hidden_state[:, -1]`.

        Raises:
            ValueError: the output layer is another, or the configuration changes logits in a way
                that is not known here; names it.
        """
        layer = model.get_output_embeddings()
        if type(layer) is not torch.nn.Linear:
            raise ValueError(
                f"the model's output layer must be a torch.nn.Linear, got {type(layer).__name__}"
            )
        transform = logit_transform(model.config.get_text_config())
        return cls(hidden, layer.weight, layer.bias, **transform)


# By name of the configuration's entry: model types where it means what it says there. All others
# use the name for something else, or not at all.
_SCALES = ("cohere", "cohere2")
_DIVISORS = ("granite", "granitemoe", "granitemoehybrid", "granitemoeshared")
_CHANGES_LOGITS = re.compile(r"logit|lm_head|output_mult|soft_?cap|mup")
_HARMLESS = re.compile(r"attn_|router|_to_keep$|^lm_head_bias$|init_value$|output_logits$")


def logit_transform(config: Any) -> dict[str, float]:
    """What a model's forward does to its logits, by its configuration: arguments of :class:`Head`.

    Raises:
        ValueError: it changes them in a way that is not known here; names it.
    """
    found = {
        name: value
        for name, value in config.to_dict().items()
        if _CHANGES_LOGITS.search(name) and not _HARMLESS.search(name) and value is not None
    }
    known: dict[str, float] = {}
    if "final_logit_softcapping" in found:
        known["soft_cap"] = float(found.pop("final_logit_softcapping"))
    if config.model_type in _SCALES and "logit_scale" in found:
        known["logit_scale"] = float(found.pop("logit_scale"))
    if config.model_type in _DIVISORS and "logits_scaling" in found:
        known["logit_scale"] = 1.0 / float(found.pop("logits_scaling"))
    if found:
        name, value = next(iter(found.items()))
        raise ValueError(
            f"model type {config.model_type!r} has {name} = {value!r}: what that does to logits is "
            "not known here; give hidden, weight, logit_scale and soft_cap to Head"
        )
    return known
