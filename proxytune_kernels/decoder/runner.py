"""Runs the models of a trio: prompts into slots, or new tokens behind what the slots hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.decoder import packing, transfer
from proxytune_kernels.decoder.attention import choose_kernel, register_attention
from proxytune_kernels.decoder.cache import Layer, SlotCache
from proxytune_kernels.decoder.llama_cpp import LlamaSlots
from proxytune_kernels.decoder.model import (
    SlotModel,
    check_model,
    input_device,
    with_slot_attention,
)
from proxytune_kernels.decoder.pair import pair_models
from proxytune_kernels.decoder.remote import RemoteSlots
from proxytune_kernels.decoder.states import is_recurrent
from proxytune_kernels.ops.attention import MAX_HEAD_SIZE
from proxytune_kernels.trio.llama_cpp import RUNTIME, LlamaModel
from proxytune_kernels.trio.remote import RemoteModel
from proxytune_kernels.trio.roles import PAIR, ROLES

Roles = tuple[str, ...]


class Runner:
    """All roles' models over their caches; a slot has its own length in each role.

    A step runs the rows of all slots up to the last one in use, also those whose request does not
    run in a role. What these rows write lies behind their length, where nobody reads it.

    Args:
        models: role -> causal LM, in the order base, expert, anti, then those of further pairs,
            each of which runs by itself; or base alone. Their modules are not changed: the runner
            works on copies that share every weight. Where forwards are compiled, weights of
            products of one input become views of one tensor, same values.
        max_batch_size, max_seq_len, pair, compile, streams, pack_weights: as in
            :class:`~proxytune_kernels.decoder.decoder.Decoder`.
        slack: places past ``max_seq_len`` for drafts that will be rolled back.
        exact: the host knows every length, as it does unless it runs ahead of the device.
        drafts: the expert also runs alone.
        layers: of each role, where they are known before they write: their memory is taken at once.
            What is compiled for captured steps wants them.

    Raises:
        ValueError: a model that can't be served, or a pair that can't run as asked.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        max_batch_size: int,
        max_seq_len: int,
        *,
        pair: str | None = None,
        compile: bool | None = False,
        streams: int = 3,
        pack_weights: bool = False,
        slack: int = 0,
        exact: bool = True,
        drafts: bool = False,
        layers: Mapping[str, Sequence[Layer]] | None = None,
    ) -> None:
        register_attention()
        local = {role: m for role, m in models.items() if not isinstance(m, RemoteModel)}
        for role, model in local.items():
            check_model(role, model)
            for option, wanted in (("compile", compile), ("pack_weights", pack_weights)):
                if wanted and isinstance(model, LlamaModel):
                    raise ValueError(
                        f"{option} must be False where llama.cpp runs {role}, got True"
                    )
            if compile and is_recurrent(model):
                raise ValueError(
                    f"compile must be False where {role} has recurrent layers, got True"
                )
            if compile and _is_offloaded(model):
                raise ValueError(
                    f"compile must be False where weights are offloaded, as those of {role} are: "
                    f"compiled code has no place for the hooks that bring them in"
                )
        self.device = input_device(models["base"])
        self._no_kernel: dict[str, str | None] = {}
        layers = layers or {}
        kernels = {
            role: self._choose_kernel(role, model, layers.get(role, ()))
            for role, model in local.items()
        }
        self.eager = self._why_eager(local, kernels, compile, layers)
        # Memory that is taken as a layer first writes would be taken by what is compiled.
        static = set(kernels.values()) == {"triton"} and set(local) <= set(layers)
        way = None if self.eager else "static" if static else "step"
        # Stacked weights are neither compiled for nor packed unless asked for.
        may_batch = not compile and not pack_weights
        self.pair, trees = pair_models(models, pair, may_batch=may_batch)
        if "base" in local:
            trees["base",] = with_slot_attention(local["base"])
        self._trees = trees
        self.models: dict[Roles, SlotModel] = {}
        self._rows: dict[str, tuple[SlotCache, int, int]] = {}
        caches: dict[Roles, SlotCache] = {}
        # By the weight they are of: roles that share weights share these.
        self._packed: dict[int, Tensor] = {}
        self.packed_bytes = 0
        further: list[Roles] = [(role,) for role in models if role not in ROLES]
        trees |= {part: with_slot_attention(models[part[0]]) for part in further}
        joined = [PAIR] if PAIR in trees else []
        for roles in [("base",), *joined, ("expert",), ("anti",), *further]:
            if roles not in trees and roles != ("base",):
                continue
            if isinstance(trees.get(roles), LlamaModel):
                drafting = drafts and roles == ("expert",)
                own = LlamaSlots(trees[roles], max_batch_size, max_seq_len, slack, drafting)
                self.models[roles], caches[roles] = own, own.cache
                self._rows[roles[0]] = own.cache, 0, 1
                continue
            joint = PAIR in trees and set(roles) <= set(PAIR)
            key = PAIR if joint else roles
            if key not in caches:
                caches[key] = SlotCache(
                    max_batch_size * len(key),
                    max_seq_len,
                    input_device(models[roles[0]]),
                    slack=slack,
                    exact=exact,
                    kernel=kernels.get(roles[0], "sdpa"),
                )
            for role in roles:
                self._rows[role] = (caches[key], key.index(role), len(key))
            if roles not in trees:
                self.models[roles] = RemoteSlots(models["base"], caches[key])
                continue
            first, stride = (PAIR.index(roles[0]), 2) if joint and len(roles) == 1 else (0, 1)
            if pack_weights:
                self.packed_bytes += packing.pack_weights(trees[roles], self._packed)
            self.models[roles] = SlotModel(
                trees[roles],
                caches[key],
                first=first,
                stride=stride,
                rows_per_slot=len(roles),
                # Beside a joint forward the expert alone only drafts, the anti alone only checks.
                compile=way if key == roles or (drafts and roles == ("expert",)) else None,
                packed=pack_weights,
                required=bool(compile),
            )
        self.recurrent = any(map(is_recurrent, local.values()))
        self._caches = list(caches.values())
        with torch.inference_mode():
            for role, (cache, first_row, _) in self._rows.items():
                if first_row == 0 and role in layers:
                    cache.reserve(layers[role])
        # 1 for the slots whose request runs in a role: only their lengths move.
        self.active = {
            role: cache.active[first::stride] for role, (cache, first, stride) in self._rows.items()
        }
        self._parts: dict[Roles, list[Roles]] = {}
        devices = {cache.device for cache in self._caches}
        # The base runs on the current stream, the others beside it.
        self._sides: list[Any] | None = None
        if _one_cuda_device(devices):
            self._sides = [torch.cuda.Stream(self.device) for _ in range(streams - 1)]

    def _choose_kernel(self, role: str, model: Any, layers: Sequence[Layer]) -> str:
        if isinstance(model, LlamaModel):
            self._no_kernel[role] = None
            return RUNTIME
        kernel, self._no_kernel[role] = choose_kernel(input_device(model), model.dtype)
        if any(part.size > MAX_HEAD_SIZE for layer in layers for part in layer):
            kernel = "sdpa"  # the others go no further
        return kernel

    def _why_eager(
        self,
        models: Mapping[str, Any],
        kernels: Mapping[str, str],
        wanted: bool | None,
        layers: Mapping[str, Sequence[Layer]],
    ) -> str | None:
        """Why forwards are not compiled, as a sentence; None where they are."""
        if wanted is not None:
            return None if wanted else "not asked for"
        if self.device.type != "cuda":
            return f"the models are on {self.device}, where they are compiled if asked for"
        for role, model in models.items():
            if is_recurrent(model):
                return f"{role} has recurrent layers"
            if kernels[role] != "triton":
                return f"{role} attends through {kernels[role]}, which is compiled if asked for"
            if _is_offloaded(model) or any("_hf_hook" in vars(m) for m in model.modules()):
                return f"{role} is spread over devices by hooks"
            if role not in layers:
                return f"{role} does not show its layers' keys and values before it runs"
        return None

    def compiled(self) -> str:
        """How many forwards are compiled, or why none is."""
        if self.eager is not None:
            return f"none: {self.eager}"
        forwards = [m.forwards for m in self.models.values() if m.forwards is not None]
        failed = [f.failed for f in forwards if f.failed is not None]
        number = sum(f.count for f in forwards if f.failed is None)
        if failed:
            return f"{number or 'none'}: {failed[0]}"
        if not forwards:
            return "plain steps"
        return f"{number} forwards" if number else "forwards, as they come"

    @property
    def static(self) -> bool:
        """Whether all that is compiled takes everything from tensors, as captured steps must."""
        return all(model.compiled != "step" for model in self.models.values())

    def parts(self, roles: Roles) -> list[Roles]:
        """How these roles run: joint forwards and single ones, the base first."""
        if roles not in self._parts:
            joint = PAIR in self.models and set(PAIR) <= set(roles)
            parts: list[Roles] = [(r,) for r in roles if not joint or r not in PAIR]
            self._parts[roles] = [*parts, PAIR] if joint else parts
        return self._parts[roles]

    @torch.inference_mode()
    def forward(self, roles: Roles, token_ids: Tensor, offset: int = 0) -> dict[str, Tensor]:
        """Run q tokens int64 [B, q] in each of the first B slots; per role logits [B, q, V].

        The lengths stay (see :meth:`advance`); arguments as in :meth:`SlotModel.forward`.
        """

        def run(part: Roles) -> Tensor:
            model = self.models[part]
            return model.forward(token_ids.to(model.cache.device), offset)

        return self._run(self.parts(roles), run)

    @torch.inference_mode()
    def prefill(
        self, slots: Sequence[int], prompts: Mapping[str, Sequence[Sequence[int]]], last: int = 1
    ) -> dict[str, Tensor]:
        """Run whole prompts into empty slots; per role the logits [B, V] for the next tokens.

        After the ``last`` several tokens of each they are [B, last, V].

        Args:
            slots: B empty slots.
            prompts: per role B prompts; those of two roles may differ.
        """
        parts = self._parts_of(prompts)
        models = self.models
        sent = self._send(parts, lambda p: models[p].prompt_numbers(slots, prompts[p[0]], last))
        return self._run(parts, lambda p: models[p].prefill(slots, prompts[p[0]], sent[p], last))

    @torch.inference_mode()
    def extend(
        self, slots: range, prompts: Mapping[str, Sequence[Sequence[int]]], *, every: bool = False
    ) -> dict[str, Tensor]:
        """Run parts of prompts behind what slots hold; per role the logits [B, V] after them.

        Args:
            slots: B neighbouring slots that do not run yet.
            prompts: per role B parts of one length; see :meth:`SlotModel.extend`.
            every: logits [B, q, V], after each of their q tokens.
        """
        parts = self._parts_of(prompts)
        sent = self._send(parts, lambda p: [torch.tensor(prompts[p[0]])])

        def run(part: Roles) -> Tensor:
            return self.models[part].extend(slots, prompts[part[0]], sent[part], every=every)

        return self._run(parts, run)

    def _send(
        self, parts: Sequence[Roles], make: Callable[[Roles], list[Tensor]]
    ) -> dict[Roles, list[Tensor]]:
        """What each part needs, on its device: one copy to each device."""
        by_device: dict[torch.device, list[Roles]] = {}
        for part in parts:
            by_device.setdefault(self.models[part].cache.device, []).append(part)
        sent: dict[Roles, list[Tensor]] = {}
        for device, there in by_device.items():
            tensors = transfer.to_device(partial(_made, make, there), device)
            each = len(tensors) // len(there)
            sent |= {part: tensors[i * each : (i + 1) * each] for i, part in enumerate(there)}
        return sent

    def _parts_of(self, prompts: Mapping[str, Any]) -> list[Roles]:
        """As :meth:`parts`; roles with different prompts run apart."""
        roles = tuple(prompts)
        if set(PAIR) <= set(roles) and prompts["expert"] != prompts["anti"]:
            return [(role,) for role in roles]
        return self.parts(roles)

    def _side_by_side(self, run: Callable[[Roles], Tensor], parts: Sequence[Roles]) -> list[Tensor]:
        """Run the first part on the current stream, the rest on those beside it, and join them."""
        sides = (self._sides or [])[: len(parts) - 1]
        if not sides:
            return [run(part) for part in parts]
        main = torch.cuda.current_stream(self.device)
        for side in sides:
            side.wait_stream(main)
        try:
            results = [run(parts[0])]
            for i, part in enumerate(parts[1:]):
                with torch.cuda.stream(sides[min(i, len(sides) - 1)]):
                    results.append(run(part))
        finally:
            # After an error, too: what was launched goes on, in memory that others may get.
            for side in sides:
                main.wait_stream(side)
        for result in results[1:] if not torch.cuda.is_current_stream_capturing() else ():
            # Made on another stream and read on this one: its memory must not be reused before.
            result.record_stream(main)
        return results

    def _run(self, parts: Sequence[Roles], run: Callable[[Roles], Tensor]) -> dict[str, Tensor]:
        """Run the parts; each role's logits, on the base's device."""
        found = {}
        for part, x in zip(parts, self._side_by_side(run, parts), strict=True):
            local = x.to(self.device, non_blocking=True)
            for i, role in enumerate(part):
                found[role] = local[i :: len(part)]
        return found

    def cannot_capture(self) -> str | None:
        """Why steps can't be CUDA graphs, as a sentence; None where they can be tried."""
        if any(isinstance(model, RemoteSlots) for model in self.models.values()):
            return "the base answers from elsewhere"
        if self.recurrent:
            return "there are recurrent layers"
        if self._sides is not None:
            return None
        places = dict.fromkeys(str(cache.device) for cache in self._caches)
        if all(place.startswith("cuda") for place in places):
            return f"the models lie on several devices ({', '.join(places)})"
        return f"CUDA graphs need a CUDA device, and the models are on {', '.join(places)}"

    def capture(self, wanted: bool = True) -> None:
        """Let steps be captured: from now on nothing in them depends on the host's lengths.

        Not ``wanted``: they can't be after all, and reach no further than their rows.
        """
        for cache in self._caches:
            cache.captured = wanted
        for model in self.models.values():
            model.cache.captured |= model.forwards is not None
        # Graphs read the weights where they lie now. Another decoder of these models may lay them
        # out anew (see compiled.merge_products): the old memory must not be given away.
        trees = self._trees.values() if wanted else ()
        self._captured_weights = [p.data for tree in trees for p in tree.parameters()]

    def attention(self) -> dict[str, str]:
        """What attends to the cache in steps, by the first of the roles that share one."""
        found = {}
        for role, reason in self._no_kernel.items():
            kernel = self._rows[role][0].kernel
            if kernel == "sdpa":
                kernel += f": {reason or f'a head is larger than {MAX_HEAD_SIZE}'}"
            found[role] = kernel
        return found

    def start(self, slots: Tensor, roles: Sequence[str]) -> None:
        """Let the lengths of slots, int64 [B], move on in these roles."""
        for role in roles:
            self.active[role].index_fill_(0, slots, 1)

    def advance(self, slots: int, counts: Tensor | None) -> None:
        """Move the first slots' lengths on by ``counts``, int64 [B], on the device; None is by 1.

        Slots that run in a role alone move; the host learns of it by :meth:`advance_host`.
        """
        for cache in self._caches:
            per_slot = cache.rows // self.slots
            moved = counts
            if counts is not None:
                moved = counts.to(cache.device, non_blocking=True).repeat_interleave(per_slot)
            cache.advance(slots * per_slot, moved)

    def advance_host(self, slot: int, roles: Sequence[str], count: int) -> None:
        """Tell the host that a slot is longer by ``count`` in these roles."""
        for role in roles:
            cache, first, stride = self._rows[role]
            cache.lengths[first + slot * stride] += count

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile all there is to compile; the slots must be empty, and are again."""
        for model in self.models.values():
            model.warm_up()

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Move a slot's content to an empty slot."""
        for cache in self._caches:
            rows = cache.rows // self.slots
            cache.move(source * rows, target * rows, rows)

    @torch.inference_mode()
    def copy(self, source: int, target: int, lengths: Mapping[str, int]) -> None:
        """Copy the first tokens of a slot, as many as each role has, into an empty slot."""
        for role, count in lengths.items():
            cache, first, stride = self._rows[role]
            cache.copy(first + source * stride, first + target * stride, count)

    @torch.inference_mode()
    def release(self, slot: int, keep: int = 0) -> None:
        """Empty a slot, but for the first ``keep`` tokens of what each role holds."""
        for cache in self._caches:
            rows = cache.rows // self.slots
            cache.release(slot * rows, rows, keep)

    @torch.inference_mode()
    def reset(self) -> None:
        """Empty all slots, whatever they hold."""
        for cache in self._caches:
            cache.reset()

    def lengths(self, role: str) -> list[int]:
        """Tokens of each slot in a role, as far as the host knows."""
        cache, first, stride = self._rows[role]
        return cache.lengths[first::stride]

    @property
    def slots(self) -> int:
        """Requests that can run at the same time."""
        return len(self.active["base"])

    @property
    def max_seq_len(self) -> int:
        """Tokens that a slot can hold."""
        return self._caches[0].max_seq_len

    @property
    def capacity(self) -> int:
        """Places in a row."""
        return self._caches[0].capacity

    def state(self) -> list[Tensor]:
        """What a step changes beside keys and values: the lengths on the devices."""
        return [cache.device_lengths for cache in self._caches]

    def cache_bytes(self) -> int:
        """Bytes reserved for keys and values."""
        return sum(cache.nbytes() for cache in self._caches)


def _is_offloaded(model: Any) -> bool:
    return any(p.device.type == "meta" for p in model.parameters())


def _made(make: Callable[[Roles], list[Tensor]], parts: Sequence[Roles]) -> list[Tensor]:
    return [tensor for part in parts for tensor in make(part)]


def _one_cuda_device(devices: set[torch.device]) -> bool:
    return len(devices) == 1 and next(iter(devices)).type == "cuda"
