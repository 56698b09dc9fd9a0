"""One model over rows of a slot cache: prompts into rows, or new tokens behind what they hold."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList
from torch.nn.functional import embedding, linear, rms_norm

from proxytune_kernels.decoder import transfer
from proxytune_kernels.decoder.attention import ATTENTION_NAME
from proxytune_kernels.decoder.cache import CacheStep, SlotCache, cache_keyword
from proxytune_kernels.decoder.compiled import (
    CompiledForwards,
    CompiledStep,
    merge_products,
    windows,
)
from proxytune_kernels.decoder.graphs import power_of_two
from proxytune_kernels.decoder.states import RECURRENT_TYPES, is_recurrent
from proxytune_kernels.trio.adapters import copy_modules
from proxytune_kernels.trio.llama_cpp import LlamaModel

_LAYER_TYPES = {"full_attention", "sliding_attention", "mlp", "moe", *RECURRENT_TYPES}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_model(role: str, model: Module) -> None:
    """Refuse a model whose layers a slot cache cannot serve.

    Raises:
        ValueError: names the role, the model and what it lacks.
    """
    if isinstance(model, LlamaModel):
        return  # which has looked by itself
    name = type(model).__name__
    # Most with recurrent layers don't say so of the attention that they have beside them.
    if not (getattr(model, "_supports_attention_backend", False) or is_recurrent(model)):
        raise ValueError(
            f"{role} must be a model whose attention transformers can exchange, got {name}, "
            f"which does not support that"
        )
    config: Any = model.config
    types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if not types <= _LAYER_TYPES:
        raise ValueError(
            f"{role} must have layers of {' and '.join(sorted(_LAYER_TYPES))} only, "
            f"got {name} with {', '.join(sorted(types - _LAYER_TYPES))}"
        )


def with_slot_attention(model: Module) -> Any:
    """A copy of a model's modules and configuration that shares every weight, with our attention.

    The attention implementation is read from the configuration that a model's layers share. Set on
    the caller's own model it would change what that model does outside the decoder. A model that
    llama.cpp runs has no modules, and is given as it is.
    """
    if isinstance(model, LlamaModel):
        return model
    twin = copy_modules(model).eval()
    twin.set_attn_implementation(ATTENTION_NAME)
    return twin


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids."""
    embeddings = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    # Weights that are loaded as they are needed lie nowhere; accelerate says where they run.
    if device.type == "meta":
        device = torch.device(embeddings._hf_hook.execution_device)
    return device


class Forward:
    """A causal LM's forward, which gives logits and takes all under the names of the model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = cache_keyword(model.forward)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(
        self, token_ids: Tensor, *, keep: int | Tensor = 0, cache: Any = None, **inputs: Any
    ) -> Tensor:
        """Run tokens int64 [B, q].

        Args:
            token_ids: the tokens.
            keep: of which of them to give the logits: the last ``keep``, all (0), or by index.
            cache: of transformers, or a :class:`CacheStep`; None runs without one.
            inputs: what else the model takes.

        Returns:
            Logits [B, n, V], fp32 or narrower.
        """
        if cache is not None:
            inputs[self._cache] = cache
        if self._keeps:
            inputs["logits_to_keep"] = keep
        output = self._model(input_ids=token_ids, use_cache=cache is not None, **inputs)
        logits: Tensor = output.logits
        if not self._keeps and not (isinstance(keep, int) and keep == 0):
            logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        # The operators take fp32 and narrower.
        return logits.float() if logits.dtype == torch.float64 else logits

    def of_step(self, token_ids: Tensor, step: CacheStep, keep: int | Tensor = 0) -> Tensor:
        """Run tokens int64 [B, q] behind what the rows of a step hold; ``keep`` as above."""
        return self(
            token_ids, keep=keep, cache=step, position_ids=step.position_ids, cache_step=step
        )


class SlotModel:
    """A model, and the rows of a slot cache that are its own: every ``stride``-th from ``first``.

    Args:
        model: from :func:`with_slot_attention`; it is changed.
        cache: its keys and values; another model may have other rows of it.
        first, stride: slot s of this model is row first + s * stride.
        rows_per_slot: 2 for expert and anti as one batch (see
            :func:`~proxytune_kernels.decoder.pair.shared.shared_pair`), whose rows alternate.
        compile: None is no torch.compile; ``"step"`` has it for forwards of one token a row,
            ``"static"`` for all of few tokens, where nothing depends on the host's lengths.
        packed: its weights are packed.
        required: a forward that can't be compiled is an error; else it runs as it is.
    """

    def __init__(
        self,
        model: Any,
        cache: SlotCache,
        *,
        first: int = 0,
        stride: int = 1,
        rows_per_slot: int = 1,
        compile: str | None = None,
        packed: bool = False,
        required: bool = True,
    ) -> None:
        self.forwards: CompiledForwards | None = None
        if compile == "static":
            twin = copy_modules(model)
            merge_products(twin)
            text = model.config.get_text_config(decoder=True)
            heads = getattr(text, "num_attention_heads", 1)
            self.forwards = CompiledForwards(Forward(twin).of_step, heads, required)
            cache.captured = True
        if compile != "step":
            call_directly(model, cache.max_seq_len)
        self.model = model
        self.cache = cache
        self._slots = len(range(first, cache.rows, stride * rows_per_slot))
        self._first, self._stride, self._rows_per_slot = first, stride, rows_per_slot
        self._logits = Forward(model)
        self._token_ids = torch.zeros((cache.rows, 1), dtype=torch.int64, device=cache.device)
        step = compile == "step"
        self._compiled = CompiledStep(self._last, windows(model.config)) if step else None
        self.compiled, self.packed = compile, packed
        self.recurrent = is_recurrent(model)

    def rows(self, slots: int) -> range:
        """The rows of the first ``slots`` slots."""
        end = self._first + slots * self._rows_per_slot * self._stride
        return range(self._first, end, self._stride)

    def forward(self, token_ids: Tensor, offset: int = 0, *, eager: bool = False) -> Tensor:
        """Run q new tokens in each of the first slots; the lengths stay.

        Args:
            token_ids: int64 [B, q], for the first B slots; the same for all rows of a slot.
            offset: how many tokens behind a row's length they go.
            eager: not through torch.compile.

        Returns:
            Logits [B, q, V], or [2 B, q, V] where a slot has two rows.
        """
        slots, width = token_ids.shape
        rows = self.rows(slots)
        if self._rows_per_slot > 1:
            token_ids = token_ids.repeat_interleave(self._rows_per_slot, 0)
        if self.forwards is not None and self.forwards.failed is None and not eager:
            # As many rows as captured steps have: a few forwards are compiled for all.
            padded = self.rows(min(power_of_two(slots, 1), self._slots))
            logits = self.forwards(token_ids, padded, self.cache.step(padded, width, offset))
            if logits is not None:
                return logits[: len(rows)]
        if self._compiled is not None and width == 1 and not eager:
            step = self.cache.step(rows, width, offset, indexed=True)
            # Always the same tensor: a graph is compiled for kinds of tensors, too.
            inputs = self._token_ids[: token_ids.shape[0]].copy_(token_ids)
            return self._compiled(inputs, step)[:, None]
        step = self.cache.step(rows, width, offset)
        if not self.recurrent:
            return self._run(token_ids, step, 0 if width > 1 else 1)
        place = slice(rows.start, rows.stop, rows.step)
        kept = self.cache.states.keep(place, self.cache.active[place])
        logits = self._run(token_ids, step, 0 if width > 1 else 1)
        self.cache.states.put_back(place, kept)
        return logits

    def prompt_numbers(
        self, slots: Sequence[int], token_ids: Sequence[Sequence[int]], last: int = 1
    ) -> list[Tensor]:
        """What :meth:`prefill` wants of its device, on the host: rows, tokens, lengths, ends."""
        rows, lengths = self._prompt_rows(slots, token_ids)
        width = max(lengths)
        prompts = [prompt for prompt in token_ids for _ in range(self._rows_per_slot)]
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        back = range(last - 1, -1, -1)
        ends = sorted({n - j for n in lengths for j in back})
        place = [i * len(ends) + ends.index(n - j) for i, n in enumerate(lengths) for j in back]
        return [torch.tensor(x) for x in (rows, padded, lengths, [n - 1 for n in ends], place)]

    def _prompt_rows(
        self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[int]]:
        """The rows of these slots, and the tokens that go into each."""
        rows = [row for slot in slots for row in self._rows_of(slot)]
        return rows, [len(prompt) for prompt in token_ids for _ in range(self._rows_per_slot)]

    def _rows_of(self, slot: int) -> range:
        return self._rows_between(range(slot, slot + 1))

    def _rows_between(self, slots: range) -> range:
        each = self._rows_per_slot * self._stride
        return range(
            self._first + slots.start * each, self._first + slots.stop * each, self._stride
        )

    def prefill(
        self,
        slots: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        numbers: Sequence[Tensor] | None = None,
        last: int = 1,
    ) -> Tensor:
        """Run whole prompts into empty slots; logits [B, V] after their last tokens.

        Where a slot has two rows both get its prompt, and B is twice the number of slots. After
        the ``last`` several of each, of which it has as many, they are [B, last, V].

        Args:
            slots, token_ids: the slots, and the prompt of each.
            numbers: what :meth:`prompt_numbers` makes of them, on the device; None sends it.
        """
        if self.recurrent and len({*map(len, token_ids)}) > 1:
            each = zip(slots, token_ids, strict=True)
            return torch.cat([self.prefill([slot], [ids], None, last) for slot, ids in each])
        if numbers is None:
            make = partial(self.prompt_numbers, slots, token_ids, last)
            numbers = transfer.to_device(make, self.cache.device)
        row_index, padded, lengths_there, ends, place = numbers
        rows, lengths = self._prompt_rows(slots, token_ids)
        step = self.cache.fresh_step(row_index, max(lengths))
        # Of each row the logits after the last token of any: of rows x lengths the diagonal counts.
        logits = self._run(padded, step, 1 if len(ends) == 1 else ends)
        self.cache.set_lengths(rows, lengths, (row_index, lengths_there))
        if len(ends) == 1:
            return logits[:, 0]
        place = place.to(logits.device, non_blocking=True)
        logits = logits.flatten(0, 1).index_select(0, place)
        return logits if last == 1 else logits.unflatten(0, (-1, last))

    def extend(
        self,
        slots: range,
        token_ids: Sequence[Sequence[int]],
        numbers: Sequence[Tensor] | None = None,
        *,
        every: bool = False,
    ) -> Tensor:
        """Run parts of prompts behind what slots hold; logits [B, V] after their ends.

        Where a slot has two rows both get its part, and B is twice the number of slots.

        Args:
            slots, token_ids: neighbouring slots, and the part of each; of one length, up to
                :data:`~proxytune_kernels.decoder.attention.MAX_NEW` tokens for several slots.
            numbers: the tokens [slots, q] on the device; None sends them.
            every: logits [B, q, V], after each of the tokens.
        """
        rows, width = self._rows_between(slots), len(token_ids[0])
        if numbers is None:
            numbers = transfer.to_device(lambda: [torch.tensor(token_ids)], self.cache.device)
        if self.recurrent and width > 1 and self.cache.lengths[rows[0]]:
            # transformers 5.23's Mamba mixers take no state before several tokens.
            each = [
                self.extend(
                    slots, [[x[i]] for x in token_ids], [numbers[0][:, i, None]], every=True
                )
                for i in range(width)
            ]
            return torch.cat(each, 1) if every else each[-1][:, 0]
        step = self.cache.step(rows, width, prompt=True)
        inputs = numbers[0].repeat_interleave(self._rows_per_slot, 0)
        logits = self._run(inputs, step, 0 if every else 1)
        self.cache.extend(rows, width)
        return logits if every else logits[:, 0]

    def warm_up(self) -> None:
        """Compile plain steps' forwards; the slots must be empty, and are again."""
        if self._compiled is None and self.forwards is None:
            return
        # The layers' memory is taken before, so that no graph is made for its being absent.
        self.prefill([0], [[0]])
        self.cache.release(0, self._rows_per_slot * self._stride)
        if self._compiled is None:
            for slots in range(1, self._slots + 1):
                if slots in (power_of_two(slots, 1), self._slots):
                    self.forward(self._token_ids[:slots])
            return
        several = self._rows_per_slot > 1
        for lengths in self._compiled.warm_up_lengths(self._slots, self.cache.max_seq_len, several):
            rows = self.rows(len(lengths))
            self.cache.extend(rows, lengths[0])
            # The rows differ where there are several.
            last = lengths[-1] if not several else lengths[-1] - 1
            self.cache.extend(rows[-1:], last - lengths[0])
            self.forward(self._token_ids[: len(lengths)])
            for row in rows:
                self.cache.release(row)

    def _last(self, token_ids: Tensor, step: CacheStep) -> Tensor:
        return self._run(token_ids, step, 1)[:, 0]

    def _run(self, token_ids: Tensor, step: CacheStep, keep: int | Tensor) -> Tensor:
        return self._logits.of_step(token_ids, step, keep)


class _DirectLinear(Linear):
    def __call__(self, input: Tensor) -> Tensor:
        parameters = self._parameters
        return linear(input, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]


class FusedNorm:
    """Llama's RMSNorm in one call or two, on a CPU to the bit. It stands before Llama's class."""

    _parameters: dict[str, Tensor]
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Result [..., H] for hidden states [..., H]."""
        weight, width = self._parameters["weight"], hidden_states.shape[-1:]
        if hidden_states.dtype == weight.dtype == torch.float32 and weight.shape == width:
            return rms_norm(hidden_states, width, weight, self.variance_epsilon)
        if hidden_states.dtype == torch.float64:  # which Llama's takes in fp32
            return super().forward(hidden_states)  # type: ignore[misc]
        return weight * rms_norm(hidden_states, width, None, self.variance_epsilon)


class _RotaryTable:
    """Llama's rotary embedding, looked up: it computes each position's cosine and sine once."""

    rope_type: str
    num_positions: int
    _tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if "dynamic" in self.rope_type or self.rope_type == "longrope":
            # A longer text gives all its positions other frequencies.
            return self.forward(x, position_ids)  # type: ignore[attr-defined]
        if self._tables is None or self._tables[0].dtype != x.dtype:
            positions = torch.arange(self.num_positions, device=x.device)
            cos, sin = self.forward(x, positions[None])  # type: ignore[attr-defined]
            self._tables = cos[0], sin[0]
        cos, sin = self._tables
        return embedding(position_ids, cos), embedding(position_ids, sin)


def is_llama(kind: type[Module], name: str) -> bool:
    """Whether a class computes what Llama's class ``Llama<name>`` does.

    transformers copies these classes from model to model: the same code under other names.
    """
    from transformers.models.llama import modeling_llama

    if not kind.__name__.endswith(name):
        return False
    llama = getattr(modeling_llama, f"Llama{name}")
    code, wanted = (inspect.unwrap(c.forward).__code__ for c in (kind, llama))
    return (code.co_code, code.co_names, code.co_consts) == (
        wanted.co_code,
        wanted.co_names,
        wanted.co_consts,
    )


def _direct_class(kind: Any) -> type[Module]:
    if kind is Linear:
        return _DirectLinear
    forward: Any = kind.forward
    bases: tuple[type, ...] = (kind,)
    if is_llama(kind, "RMSNorm"):
        forward, bases = FusedNorm.forward, (FusedNorm, kind)
    elif is_llama(kind, "RotaryEmbedding"):
        forward, bases = _RotaryTable.__call__, (_RotaryTable, kind)
    elif forward.__code__.co_name == "forward_with_checkpointing":
        forward = forward.__wrapped__  # which only adds what training needs
    body = {"__call__": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, bases, body)


def _direct_config(config: Any) -> None:
    # Every read of a configuration looks in a map of aliases and in overrides per layer.
    kind = type(config)
    if not config.attribute_map and "_heterogeneity_spec" not in vars(config):
        body = {"__getattribute__": object.__getattribute__, "__module__": kind.__module__}
        config.__class__ = type(kind.__name__, (kind,), body)


def call_directly(model: Any, num_positions: int) -> None:
    """Let the modules of a model that is nobody else's be called without ``nn.Module.__call__``.

    At batch 1 a small model's step is mostly Python: each module call goes through the hook
    machinery, and each parameter through ``__getattr__``. The decoder's copy has no hooks to serve,
    so its modules are called straight. The numbers do not change: the same functions run on the
    same tensors.

    A list of layers is a tuple to the modules that run them: transformers takes a slice of it in
    each forward.

    The model must be in eval mode, and stay with the modules and parameters that it has; those of
    a module that accelerate offloads may come and go. A module with hooks, with a ``forward`` of
    its own (as accelerate puts there), or whose class defines another ``__call__``, is called as
    before.

    Args:
        model: is changed.
        num_positions: no token is at this position, or at one behind it.
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
                classes[kind] = _direct_class(kind)
            module.__class__ = classes[kind]
            if isinstance(module, _RotaryTable):
                module.num_positions = num_positions
        # Found at once, where nn.Module has them found by __getattr__ after a failed look here.
        # Not the buffers: some models register new ones as they run (rope scaling).
        for name, child in module._modules.items():
            vars(module)[name] = tuple(child) if type(child) is ModuleList else child
        # Nor the parameters that accelerate's hook brings in for a call and takes away again.
        if "_hf_hook" not in vars(module):
            vars(module).update(module._parameters)
    _direct_config(model.config)
