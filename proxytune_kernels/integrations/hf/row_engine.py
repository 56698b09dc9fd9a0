"""Whether the decoder can run a model's three members, and the rows that it runs them over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.nn import Parameter

from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.integrations.hf.rows import Rows

_ROOM = 1024
"""Tokens past the prompt that a row has room for at first, at most; it grows by doubling."""


class RowEngine:
    """Makes :class:`Rows` for a model's three members, as long as they stay what they are.

    Args:
        models: role -> causal LM. They are not changed: the engine's modules share every weight,
            but for pairs so small that both models' weights are stacked, which copies them.
    """

    def __init__(self, models: Mapping[str, Any]) -> None:
        self._models = models
        self._runner: Runner | None = None
        self._refusal: str | None = None
        self._built_of: list[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own: the engine's modules are of classes made as it runs.
        return {"_models": self._models, "_runner": None, "_refusal": None, "_built_of": None}

    def refusal(self) -> str | None:
        """Why the engine can't run these models as they are now, as a sentence; None if it can."""
        for role, model in self._models.items():
            if model.training:
                return f"{role} is in training mode"
            if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
                return f"{role} has forward hooks, which the engine would not call"
        state = [part for model in self._models.values() for part in _state(model)]
        if state != self._built_of:
            self._build()
            self._built_of = state
        return self._refusal

    def rows(self, batch_size: int, prompt_length: int, max_length: int) -> Rows:
        """An empty cache for a batch; after :meth:`refusal` has said None."""
        assert self._runner is not None
        return Rows(self._runner.resized(batch_size, min(max_length, prompt_length + _ROOM)))

    @property
    def pair(self) -> str | None:
        """How expert and anti run, once they have; see :class:`proxytune_kernels.Decoder`."""
        return None if self._runner is None else self._runner.pair

    def _build(self) -> None:
        self._runner, self._refusal = None, None
        try:
            runner = Runner(self._models, 1, 1)
            # What attention can't serve shows in the first forward.
            runner.prefill([0], {role: [[0]] for role in self._models})
        except (ValueError, NotImplementedError) as error:
            self._refusal = str(error)
        else:
            self._runner = runner


def _state(model: Any) -> Iterator[Any]:
    """What the engine's modules are built of; once it changes they are built anew."""
    for parameter in model.parameters():
        version = 0 if parameter.is_inference() else parameter._version
        # A packed (quantised) weight has no memory of its own.
        place = parameter.data_ptr() if type(parameter) is Parameter else 0
        yield id(parameter), version, place, parameter.dtype, parameter.device
