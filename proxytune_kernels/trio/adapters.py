"""LoRA adapters in PEFT's format: merged into a model's weights, or beside them.

Beside them, the adapted model is a copy of the modules of the model without it that holds the same
tensors, so that the weights are there once for both, and PEFT's LoRA layers stand in the copy.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import Module, Parameter

from proxytune_kernels.trio.checkpoints import resolve
from proxytune_kernels.trio.files import (
    LoadError,
    Place,
    check_safetensors,
    file_in,
    find,
    read_object,
    reason,
)
from proxytune_kernels.trio.quantization import plain_tensors

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter."""
    return (Path(directory) / _CONFIG_FILE).is_file()


def named_checkpoint(role: str, directory: Path) -> str:
    """The checkpoint that an adapter was trained on, as it names it.

    Raises:
        LoadError: the adapter names none, or its weights are not in safetensors.
    """
    weights = file_in(role, directory, _WEIGHTS_FILE)
    if not weights.is_file():
        raise LoadError(
            f"{role} must have its adapter's weights in {_WEIGHTS_FILE}, got {directory} without it"
        )
    check_safetensors(role, weights)
    path = file_in(role, directory, _CONFIG_FILE)
    config = read_object(role, path)
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str):
        raise LoadError(
            f"{role} must be an adapter that names its model, got base_model_name_or_path "
            f"{named!r} in {directory / _CONFIG_FILE}"
        )
    return named


@dataclass(frozen=True)
class Source:
    """What a role is opened from: a checkpoint, or an adapter and the checkpoint that it names.

    Args:
        role: for messages.
        own: the checkpoint or the adapter.
        more: patterns of files that a hub name must have beside those of every checkpoint.
    """

    role: str
    own: Place
    more: tuple[str, ...] = ()

    @cached_property
    def adapted(self) -> str | None:
        """The checkpoint that the adapter names, a path or hub name; None without an adapter."""
        home = self.own.directory
        return resolve(named_checkpoint(self.role, home), home) if is_adapter(home) else None

    @cached_property
    def plain(self) -> Place:
        """The checkpoint without the adapter."""
        return self.own if self.adapted is None else find(self.role, self.adapted, *self.more)

    @property
    def tokenizer(self) -> Place:
        """Where its tokenizer is: an adapter that has none takes that of the model it names."""
        has = (self.own.directory / "tokenizer_config.json").is_file()
        return self.own if has else self.plain


def merged(role: str, model: Any, directory: Path) -> Any:
    """A model with an adapter merged into its weights.

    Args:
        role: for messages.
        model: the one that the adapter was trained on, in memory; it is changed.
        directory: of the adapter.

    Raises:
        LoadError: PEFT is missing, the adapter is not for this model or can't be merged into it, or
            the model is offloaded.
    """
    _check_in_memory(role, model)
    plain = _probe(model)
    with _attaching(role, directory):
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, directory).eval()
        wanted = _probe(adapted)
        whole = adapted.merge_and_unload()
    _check_merged(role, directory, plain, wanted, _probe(whole), whole.dtype)
    return whole


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    """Logits of eight ids from all over the vocabulary, in fp32."""
    width = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, width - 1, 8, device=model.device).long()[None]
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _check_merged(
    role: str,
    directory: Path,
    plain: torch.Tensor,
    wanted: torch.Tensor,
    got: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Check that merging an adapter made the model that PEFT runs with the adapter apart.

    Adapters of tied embeddings and of layers that stand for several are merged without an error,
    and wrongly. Rounding merged weights moves logits by some units in the last place; what goes
    wrong moves them by about as much as the adapter does.
    """
    if got.shape != wanted.shape:
        raise LoadError(
            f"{role} must be an adapter that can be merged, got {str(directory)!r}, which changes "
            "the number of logits"
        )
    off = float((got - wanted).abs().max())
    effect = float((wanted - plain).abs().max()) if plain.shape == wanted.shape else 0.0
    rounding = 4 * torch.finfo(dtype).eps * float(wanted.abs().max())
    if not off <= 0.1 * effect + rounding:
        raise LoadError(
            f"{role} must be an adapter that can be merged, got {str(directory)!r}, whose merged "
            f"model is off by {off:.3g} in a logit (the adapter itself changes them by "
            f"{effect:.3g}): PEFT can't merge it, as with tied embeddings or replicated layers"
        )


def beside(role: str, model: Any, directory: Path) -> Any:
    """A model with a LoRA adapter, over the tensors of the model without it.

    Args:
        role: for messages.
        model: the one that the adapter was trained on, in memory; it stays as it is.
        directory: of the adapter.

    Returns:
        A causal LM of the same class in evaluation mode, PEFT's LoRA layers in the place of those
        that the adapter names. Their weights have the layer's dtype, on a CPU at least fp32; all
        other parameters and buffers are the model's.

    Raises:
        LoadError: PEFT is missing, the adapter is not LoRA, not one for this model or changes more
            than it adds, or the model is offloaded.
    """
    _check_in_memory(role, model)
    twin = copy_modules(model)
    before = _contents(model)
    with _attaching(role, directory):
        from peft import PeftConfig, inject_adapter_in_model, load_peft_weights
        from peft.utils.save_and_load import set_peft_model_state_dict

        config = PeftConfig.from_pretrained(str(directory))
        _check_lora(role, str(config.peft_type.value), directory)
        _check_lora_alone(role, directory)
        if getattr(config, "alora_invocation_tokens", None):
            raise LoadError(
                f"{role} must have an adapter that acts on every token, got one with "
                f"alora_invocation_tokens in {directory}"
            )
        config.inference_mode = True
        inject_adapter_in_model(config, twin)
        _set_adapter_dtypes(twin)
        weights = load_peft_weights(str(directory), device="cpu")
        found: Any = set_peft_model_state_dict(twin, weights)
    missing = [key for key in found.missing_keys if ".lora_" in key]
    if missing or found.unexpected_keys:
        name = (*missing, *found.unexpected_keys)[0]
        what = "no weights for" if missing else "weights for a layer that is not there,"
        raise LoadError(f"{role} must be an adapter for this model, got {what} {name}")
    if _contents(model) != before:
        raise LoadError(
            f"{role} must be an adapter that leaves the model's own weights as they are, got one "
            f"that sets them ({directory}): merge it"
        )
    return twin.eval()


def unwrapped(role: str, model: Any) -> Any:
    """The causal LM inside a PEFT model with a LoRA adapter; any other model as it is.

    It is a copy of the modules that shares all tensors, except that the adapter's weights take the
    dtype of the layer that they belong to, on a CPU at least fp32.

    Raises:
        ValueError: an adapter that is not LoRA.
    """
    peft = sys.modules.get("peft")  # whoever made a PEFT model has imported it
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    for config in model.peft_config.values():
        _check_lora(role, str(config.peft_type.value), type(model).__name__)
    twin = copy_modules(model.get_base_model())
    _set_adapter_dtypes(twin)
    return twin.eval()


def copy_modules(model: Any) -> Any:
    """A copy of a model's modules and configuration that holds the same parameters and buffers.

    What accelerate offloaded stays where it lies, once for both, and the copy's hooks bring it into
    the copy.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)})


def _tensors(model: Any) -> Iterator[Any]:
    """A model's parameters and buffers, and accelerate's maps of those that are elsewhere."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for part in getattr(hook, "hooks", [hook]):
            for name in ("weights_map", "tied_params_map"):
                if (tensors := getattr(part, name, None)) is not None:
                    yield tensors


def adapter_parameters(model: Any) -> list[Parameter]:
    """The weights of a model's LoRA layers."""
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]


def first_difference(model: Any, other: Any) -> str | None:
    """The name of the first weight in which two models differ; None if they have the same."""
    ours, theirs = model.state_dict(), other.state_dict()
    for name in ours.keys() | theirs.keys():
        if name not in ours or name not in theirs:
            return name
        one, two = ours[name], theirs[name]
        if one.dtype != two.dtype or not torch.equal(one.cpu(), two.cpu()):
            return name
    return None


@contextmanager
def _attaching(role: str, directory: Path) -> Iterator[None]:
    """Turn what goes wrong in PEFT into one sentence, and a warning that weights lack into it."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # Of a layer with quantised weights: it could not be merged, and is not.
            warnings.filterwarnings("ignore", message=r".*without `get_apply_tensor_subclass`")
            # peft 0.21 asks transformers 5.23 for an attribute by its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            yield
    except ImportError as error:
        raise LoadError(
            f"{role} is a LoRA adapter, which needs peft ({error}): "
            "pip install 'proxytune_kernels[lora]'"
        ) from error
    except (LoadError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # PEFT has no class of its own for what an adapter's files can cause
        raise LoadError(
            f"{role} must be an adapter for this model, got {str(directory)!r}: {reason(error)}"
        ) from error


def _check_in_memory(role: str, model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise LoadError(
                f"{role} must have the weights that its adapter goes to in memory, got {name} "
                "offloaded by device_map"
            )


def _check_lora(role: str, kind: str, where: object) -> None:
    if kind != "LORA":
        raise LoadError(f"{role} must have a LoRA adapter to keep it apart, got {kind} in {where}")


def _check_lora_alone(role: str, directory: Path) -> None:
    with safe_open(directory / _WEIGHTS_FILE, framework="pt") as file:
        others = [name for name in file.keys() if ".lora_" not in name]  # noqa: SIM118
    if others:
        raise LoadError(
            f"{role} must have nothing but LoRA weights to keep them apart, got "
            f"{others[0].removeprefix('base_model.model.')} in {directory}: merge it"
        )


def _contents(model: Any) -> list[tuple[int, int]]:
    """Where each tensor of a model lies, and the sum of its bytes.

    Some ways to initialise an adapter (OLoRA) write to the weights unseen by autograd.
    """
    tensors = (plain for t in (*model.parameters(), *model.buffers()) for plain in plain_tensors(t))
    return [(tensor.data_ptr(), _sum_of_bytes(tensor)) for tensor in tensors]


def _sum_of_bytes(tensor: torch.Tensor) -> int:
    flat = tensor.detach().contiguous().reshape(-1)
    words = flat.view(torch.int32 if flat.numel() * flat.element_size() % 4 == 0 else torch.uint8)
    return int(words.sum(dtype=torch.int64))


def _set_adapter_dtypes(model: Any) -> None:
    """Give each adapter the dtype in which its two small products are fastest.

    On a CPU that is fp32, though the layer's be bf16: a product of rank 16 and one or two rows
    takes 4 to 15 us, in bf16 35 to 60. On a GPU each cast is a kernel of its own: the layer's.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight
        on_cpu = weight.device.type == "cpu"
        dtype = torch.promote_types(weight.dtype, torch.float32) if on_cpu else weight.dtype
        _cast_adapter(layer, dtype)


def _cast_adapter(layer: Module, dtype: torch.dtype) -> None:
    """Give the parameters of a LoRA layer, but not of the layer inside it, another dtype."""
    for name, child in layer.named_children():
        if name == "base_layer":
            continue
        for module in child.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype != dtype:
                    module._parameters[key] = Parameter(
                        parameter.detach().to(dtype), requires_grad=parameter.requires_grad
                    )
