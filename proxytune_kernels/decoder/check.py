"""Whether a model that the decoder runs gives the logits of its own forward.

That transformers can exchange a model's attention does not say that positions, masks and cache are
all in what it passes on. So a decoder runs a few tokens of each member both ways when it is made.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter

from proxytune_kernels.decoder.cache import SlotCache
from proxytune_kernels.decoder.compiled import windows
from proxytune_kernels.decoder.model import Forward, SlotModel, input_device
from proxytune_kernels.decoder.remote import RemoteSlots
from proxytune_kernels.trio.adapters import copy_modules
from proxytune_kernels.trio.llama_cpp import LlamaModel

if TYPE_CHECKING:
    from proxytune_kernels.decoder.runner import Runner

_PROMPT, _CHUNK, _STEP = 5, 3, 1
"""Tokens of the first row; the second row has fewer."""
_NARROW = 32
"""Windows up to here are crossed: a wider one would cost more than a few tokens."""

_ROUNDING, _MOST = 256.0, 0.25
"""Differences d of logits x count as rounding up to rms(d) = 256 u sqrt(layers) rms(x), with u the
spacing of the model's numbers at 1: what each layer rounds off adds up like a random walk, and
trained layers amplify it (5 u sqrt(layers) measured on the shipped trio). Narrow numbers would
allow anything so; a quarter of the logits is no rounding in any dtype."""
_UNITS = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}
"""u of fp32, by what torch may round the inputs of its products to (TF32, bf16)."""
_QUANTIZED = 0.5
"""In place of a quarter where weights are no plain tensors: the products may round activations to
int8, by the largest of their batch."""

_checked: WeakKeyDictionary[Module, set[int]] = WeakKeyDictionary()
"""What was found right, by its first model: see :func:`_fingerprint`."""


class MemberError(ValueError):
    """A model that the decoder would not decode as its own forward says."""


def check_members(models: Mapping[str, Any], runner: Runner) -> None:
    """Hold what a runner runs against the models' own forwards, on a few tokens.

    Two rows of different lengths: a prompt, a chunk behind it, a step; across the narrowest
    attention window if that is at most 32. Of layers that are alike only the first run. What was
    right once is not run again while its modules, parameters and configuration are the same.

    Args:
        models: role -> causal LM, as the runner was made of. They are run, and not changed.
        runner: its slots are empty, and are again.

    Raises:
        MemberError: a role whose logits are others beyond rounding, or whose forward fails.
    """
    texts = {role: Text(model, runner.max_seq_len, runner.slots) for role, model in models.items()}
    gpus = list(range(torch.cuda.device_count())) if runner.device.type == "cuda" else []
    own: dict[tuple[str, int | None], Tensor] = {}
    for roles, part in runner.models.items():
        if isinstance(part, RemoteSlots):
            continue
        seen = _checked.setdefault(models[roles[0]], set())
        pair = None if roles == ("base",) else runner.pair
        key = hash((pair, roles, *(texts[role].key for role in roles), *_ways(part)))
        if key in seen:
            continue
        with torch.random.fork_rng(gpus):
            depth = _depth([models[role] for role in roles])
            try:
                logits = _own_logits_of(roles, models, texts, depth, own)
            except MemberError:
                # A forward that counts its layers by itself.
                depth = None
                logits = _own_logits_of(roles, models, texts, depth, own)
            with _shortened(part.model, depth):
                _check(roles, models, part, texts[roles[0]], logits)
        seen.add(key)
        runner.reset()


def _own_logits_of(
    roles: Sequence[str],
    models: Mapping[str, Any],
    texts: Mapping[str, Text],
    depth: int | None,
    known: dict[tuple[str, int | None], Tensor],
) -> dict[str, Tensor]:
    for role in roles:
        if (role, depth) not in known:
            model = models[role] if depth is None else first_layers(models[role], depth)
            known[role, depth] = own_logits(role, model, texts[role].token_ids)
    return {role: known[role, depth] for role in roles}


def _layers(model: Any) -> tuple[str, str] | None:
    """The path of the module that holds a model's layers, and their name there; None if unclear."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        (path, name)
        for path, owner in model.named_modules()
        for name, child in owner._modules.items()
        if isinstance(child, ModuleList) and len(child) == count
    ]
    return found[0] if len(found) == 1 else None


def _depth(models: Sequence[Any]) -> int | None:
    """How many of their first layers have all kinds that there are; None where that is unclear.

    Layers that are alike need not run: a large model's check takes a few layers' time.
    """
    depths = [kinds_of_layers(model)[0] for model in models]
    return None if None in depths else max(depth for depth in depths if depth is not None)


def kinds_of_layers(model: Any) -> tuple[int | None, list[Any]]:
    """As above of one model, and what tells its layers apart, layer by layer."""
    if (place := _layers(model)) is None:
        return None, []
    path, name = place
    owners = [model.get_submodule(p) for p in _ancestors(path)]
    kinds = [_kind(layer) for layer in owners[-1]._modules[name]]
    # A forward of its own is bound to the module that it was put into.
    if any("forward" in vars(owner) for owner in owners):
        return None, kinds
    return max([2, *(i + 1 for i, kind in enumerate(kinds) if kind not in kinds[:i])]), kinds


def _ancestors(path: str) -> list[str]:
    """The paths of a module and of those around it, the model's ("") first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _kind(layer: Module) -> Any:
    """What tells a layer from another: its modules and their settings, but not its number."""
    return [
        (type(m), {k: v for k, v in vars(m).items() if k != "layer_idx" and _is_setting(v)})
        for m in layer.modules()
    ]


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def first_layers(model: Any, depth: int) -> Any:
    """A model of another's first layers, with all its modules and weights; that one stays."""
    place = _layers(model)
    assert place is not None
    path, name = place
    copies: dict[str, Any] = {}
    for at in _ancestors(path):
        above, _, own = at.rpartition(".")
        copies[at] = copy.copy(model.get_submodule(at))
        copies[at]._modules = dict(copies[at]._modules)
        if at:
            copies[above]._modules[own] = copies[at]
    copies[path]._modules[name] = copies[path]._modules[name][:depth]
    return copies[""]


@contextmanager
def _shortened(model: Any, depth: int | None) -> Iterator[None]:
    """Let a model that is nobody else's run its first layers alone."""
    place = None if depth is None else _layers(model)
    if place is None:
        yield
        return
    path, name = place
    owner = model.get_submodule(path)
    whole, direct = owner._modules[name], vars(owner).get(name)
    owner._modules[name] = whole[:depth]
    if direct is not None:
        vars(owner)[name] = direct[:depth]
    try:
        yield
    finally:
        owner._modules[name] = whole
        if direct is not None:
            vars(owner)[name] = direct


def _ways(part: SlotModel) -> tuple[Any, ...]:
    """What of a decoder's options changes how a model runs."""
    return part.compiled, part.packed, part.cache.kernel


class Text:
    """The tokens that a model is tried on, and where they are cut.

    Args:
        model: a causal LM.
        max_seq_len: tokens that a row can have.
        slots: rows that can run at the same time.
    """

    def __init__(self, model: Any, max_seq_len: int, slots: int = 2) -> None:
        reached = [w for w in windows(model.config) if w is not None and w < max_seq_len]
        self.windows = frozenset(reached)
        narrowest = min((w for w in reached if w <= _NARROW), default=0)
        wanted = max(_PROMPT, narrowest + 1) + _CHUNK + _STEP
        self.length = min(wanted, max_seq_len)
        self.step = min(_STEP, self.length - 1)
        self.chunk = min(_CHUNK, self.length - 1 - self.step)
        self.prompt = self.length - self.chunk - self.step
        self.rows = min(2, slots)
        ids = ordinary_ids(model)
        self.token_ids = [
            [ids[(7 * i * i + 5 * i + 31 * row) % len(ids)] for i in range(self.length)]
            for row in range(self.rows)
        ]
        self.key = (self.length, self.rows, self.windows, _fingerprint(model))


def ordinary_ids(model: Any) -> list[int]:
    """Up to 512 ids without those that a configuration names: padding, images and the like."""
    named: set[Any] = set()
    for name, value in model.config.to_dict().items():
        if name.endswith(("_token_id", "_token_index")):
            named.update(value if isinstance(value, list) else [value])
    count = min(model.get_input_embeddings().weight.shape[0], 512 + len(named))
    return [i for i in range(count) if i not in named] or [0]


def _fingerprint(model: Any) -> int:
    """Changes with a model's modules, parameters and configuration, but not with its weights."""
    modules = [(id(m), type(m), id(vars(m).get("forward"))) for m in model.modules()]
    parameters = [(id(p), p.dtype, p.device) for p in model.parameters()]
    return hash((*modules, *parameters, repr(model.config.to_dict())))


@torch.no_grad()
def own_logits(role: str, model: Any, token_ids: Sequence[Sequence[int]]) -> Tensor:
    """Logits fp32 [rows, n, V] by the model's own forward of rows of one length, in evaluation."""
    if any(module.training for module in model.modules()):
        model = copy_modules(model).eval()
    try:
        return Forward(model)(torch.tensor(token_ids, device=input_device(model))).float()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _failed(role, model, "own forward", error) from error


@torch.inference_mode()
def _through_cache(part: SlotModel, text: Text) -> list[tuple[str, int, int, Tensor]]:
    """(what was run, row, position of its last token, logits [roles, V]), call by call."""
    slots = list(range(text.rows))
    # A prompt of another length, where there is room for one.
    lengths = [text.prompt, max(1, text.prompt // 2)][: text.rows]
    prompts = [ids[:n] for ids, n in zip(text.token_ids, lengths, strict=True)]
    found: list[tuple[str, int, int, Tensor]] = []

    def take(what: str, rows: Sequence[int], logits: Tensor) -> None:
        each = logits.float().unflatten(0, (len(rows), -1))
        found.extend((what, r, lengths[r] - 1, x) for r, x in zip(rows, each, strict=True))

    take("prompt", slots, part.prefill(slots, prompts))
    if text.chunk:
        chunk = text.token_ids[0][text.prompt : text.prompt + text.chunk]
        lengths[0] += text.chunk
        take("chunk", [0], part.extend(range(1), [chunk]))
    if text.step:
        new = [[ids[n]] for ids, n in zip(text.token_ids, lengths, strict=True)]
        # What is compiled is compiled later: a first request should wait for it.
        logits = part.forward(torch.tensor(new, device=part.cache.device), eager=True)
        lengths = [n + 1 for n in lengths]
        take("step", slots, logits[:, -1])
    return found


def _check(
    roles: Sequence[str],
    models: Mapping[str, Any],
    part: SlotModel,
    text: Text,
    own: Mapping[str, Tensor],
) -> None:
    part.cache.windows = set()
    try:
        found = _through_cache(part, text)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _failed(roles[0], models[roles[0]], "forward over the decoder's cache", error) from (
            error
        )
    _check_windows(roles[0], models[roles[0]], part.cache, text.windows)
    for i, role in enumerate(roles):
        model = models[role]
        if (wrong := _first_difference(model, i, found, own[role])) is None:
            continue
        what, row, position, difference, bound = wrong
        raise MemberError(
            f"{role} must give over the decoder's cache the logits of its own forward, got "
            f"{type(model).__name__}, whose logits differ by {difference:.3g} (root mean square) "
            f"after a {what} of row {row} up to position {position}, where rounding explains "
            f"{bound:.3g}: {_instead(model)}"
        )


def _instead(model: Any) -> str:
    """What its user can do."""
    unchecked = "(check=False leaves out this check, and the tokens may be wrong)"
    if isinstance(model, LlamaModel):
        return unchecked
    return f"use ProxyTunedForCausalLM, which runs it as it is {unchecked}"


def _check_windows(role: str, model: Any, cache: SlotCache, wanted: frozenset[int]) -> None:
    """Refuse a model that masks what is out of its window, and does not tell us its window."""
    passed, cache.windows = cache.windows, None
    if passed is not None and not wanted <= passed:
        raise MemberError(
            f"{role} must pass its attention window to its layers' attention, got "
            f"{type(model).__name__} with a window of {min(wanted - passed)} tokens, which "
            f"it keeps in a mask: give max_seq_len up to the window, or {_instead(model)}"
        )


def _failed(role: str, model: Any, what: str, error: Exception) -> MemberError:
    return MemberError(
        f"{role} must be a model that the decoder can run, got {type(model).__name__}, "
        f"whose {what} raises {type(error).__name__}: {error}: {_instead(model)}"
    )


def _first_difference(
    model: Any, place: int, found: Sequence[tuple[str, int, int, Tensor]], own: Tensor
) -> tuple[str, int, int, float, float] | None:
    """What was run, row, position, difference and bound of the first logits beyond rounding."""
    for what, row, position, logits in found:
        difference, bound = compare(model, logits[place], own[row, position])
        if not difference <= bound:  # NaN, too
            return what, row, position, difference, bound
    return None


def compare(model: Any, logits: Tensor, own: Tensor) -> tuple[float, float]:
    """The root mean square of a difference of logits [..., V], and what rounding explains of it."""
    logits = logits.to(own.device)
    same = (own == logits) | (own.isnan() & logits.isnan())
    difference = torch.where(same, 0, own - logits).square().mean().sqrt()
    size = own.nan_to_num(0, 0, 0).square().mean().sqrt()
    return float(difference), _bound(model) * float(size)


def check_causal(role: str, model: Any) -> None:
    """Refuse a model whose logits depend on the tokens behind theirs.

    Raises:
        MemberError: names the role, the model and the numbers; or its forward fails.
    """
    ids = Text(model, 2 * _PROMPT).token_ids
    whole = own_logits(role, model, ids)[:, : _PROMPT - 1]
    part = own_logits(role, model, [row[: _PROMPT - 1] for row in ids])
    difference, bound = compare(model, part, whole)
    if not difference <= bound:
        raise MemberError(
            f"{role} must be a causal model, got {type(model).__name__}, whose logits differ by "
            f"{difference:.3g} (root mean square) with the tokens behind theirs, where rounding "
            f"explains {bound:.3g}"
        )


def _bound(model: Any) -> float:
    """Of rms(x), see :data:`_ROUNDING`."""
    weights = list(model.parameters())  # none where another runtime holds them
    plain = all(type(p) is Parameter and p.is_floating_point() for p in weights)
    if not (weights and plain) or any(
        isinstance(v, torch.ScriptObject) for m in model.modules() for v in vars(m).values()
    ):
        return _QUANTIZED
    unit = max(torch.finfo(model.dtype).eps, _UNITS[torch.get_float32_matmul_precision()])
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    return min(_ROUNDING * unit * math.sqrt(layers or 1), _MOST)
