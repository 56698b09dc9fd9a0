"""Models of a given shape with random weights, made on the device they run on.

A model is built without memory and then filled one layer at a time, so that a base that is
quantised never takes the place of the same base in bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module, Parameter

from benchmarks.gpu.decoder.shapes import BF16, ModelShape

DTYPE = torch.bfloat16
LORA_RANK = 16

_WEIGHT_STD = 0.02  # Llama's initializer_range: activations stay of the order of 1 in any depth
# Of one role's logits; three of them combine to sqrt(3) times that: 2.6, as a real trio's on
# English (docs/benchmarks.md, Logits). Flat logits would take the sampler longer.
_LOGITS_STD = 1.5

Quantize = Callable[[Module], Module]
"""Takes a linear layer with its weights, and gives the layer that takes its place."""


def empty_model(shape: ModelShape) -> Any:
    """A Llama without memory: its parameters are on device "meta"."""
    from transformers import LlamaForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model: Any = LlamaForCausalLM(shape.config())
        return model.to(DTYPE).eval()


def planned_bytes(shape: ModelShape, weights: str) -> int:
    """Bytes of a model's weights before it is built; the scales of int8 ones are left out."""
    model = empty_model(shape)
    narrow = {} if weights == BF16 else _quantisable(model)
    total = sum(_bytes(parameter) for parameter in model.parameters())
    return total - sum(layer.weight.numel() for layer in narrow.values())


def _quantisable(model: Any) -> dict[str, Linear]:
    """The linear layers but the head, by their names in the model."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Linear) and layer is not head
    }


def random_model(
    shape: ModelShape,
    device: str | torch.device,
    seed: int,
    *,
    quantize: Quantize | None = None,
    dtype: torch.dtype = DTYPE,
) -> Any:
    """A Llama with random weights on a device, in evaluation mode.

    Args:
        shape: its dimensions.
        device: where its weights are made.
        seed: of the weights.
        quantize: given each linear layer but the head as soon as it has weights; the layer it
            returns takes its place. None leaves them.
        dtype: of all weights that are not quantised.

    Raises:
        torch.OutOfMemoryError: the device's memory does not suffice.
    """
    model = empty_model(shape)
    generator = torch.Generator(device).manual_seed(seed)
    head = model.get_output_embeddings()
    quantised = set() if quantize is None else set(_quantisable(model))
    # By name: a list of the layers would keep all that were quantised in memory.
    for name in [name for name, _ in model.named_modules()]:
        layer = model.get_submodule(name)
        std = _LOGITS_STD * shape.hidden_size**-0.5 if layer is head else _WEIGHT_STD
        _fill(layer, device, dtype, std, generator)
        if quantize is not None and name in quantised:
            model.set_submodule(name, quantize(layer))
    # Its buffers are computed, not loaded: a filled "meta" tensor would be a wrong angle.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    left = [name for name, t in _tensors(model) if t.device.type == "meta"]
    if left:
        raise RuntimeError(f"a random model must have all its weights, {left[0]} has none")
    return model.requires_grad_(False)


def _fill(
    layer: Module,
    device: str | torch.device,
    dtype: torch.dtype,
    std: float,
    generator: torch.Generator,
) -> None:
    """Give a layer its parameters: matrices are normal, norms' weights 1."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        filled = torch.empty(parameter.shape, dtype=dtype, device=device)
        if isinstance(layer, Linear | Embedding):
            filled.normal_(0.0, std, generator=generator)
        else:
            filled.fill_(1.0)
        setattr(layer, name, Parameter(filled, requires_grad=False))


def adapted_model(model: Any, seed: int) -> Any:
    """A model with a random LoRA adapter (PEFT) on all linear layers, over the same weights.

    The given model stays as it is: its modules are copied, its tensors shared.
    """
    from peft import LoraConfig, get_peft_model

    shared = {id(tensor): tensor for _, tensor in _tensors(model)}
    twin = copy.deepcopy(model, shared)
    settings = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules="all-linear",
        init_lora_weights=False,  # B is not 0: an adapter that adds nothing could be left out
    )
    with torch.random.fork_rng(_cuda_devices(model)):
        torch.manual_seed(seed)
        adapted = get_peft_model(twin, settings, autocast_adapter_dtype=False)
    return adapted.get_base_model().eval().requires_grad_(False)


def _cuda_devices(model: Any) -> list[int]:
    device = next(model.parameters()).device
    return [] if device.type == "cpu" else [device.index or 0]


def _tensors(model: Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def weight_bytes(models: Sequence[Module]) -> int:
    """Bytes of all tensors of some models; those that they share count once."""
    return sum(_bytes(t) for t in _unique(models).values())


def step_bytes(models: Sequence[Any]) -> int:
    """Bytes that a decoding step reads of some models: all but the input embeddings.

    Of an embedding one row a token is read, which is not counted; a head that is the same matrix
    is read whole.
    """
    heads = {id(model.get_output_embeddings().weight) for model in models}
    tensors = _unique(models)
    for model in models:
        embedding = id(model.get_input_embeddings().weight)
        if embedding not in heads:
            tensors.pop(embedding, None)
    return sum(_bytes(t) for t in tensors.values())


def _unique(models: Sequence[Module]) -> dict[int, Tensor]:
    return {id(t): t for model in models for _, t in _tensors(model)}


def _bytes(tensor: Any) -> int:
    """Bytes of a tensor; of its parts where it is a quantised one, made of several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def byte_tokenizer(vocab_size: int) -> Any:
    """A tokenizer made in memory: a token for each byte, and names for the ids that are left.

    Args:
        vocab_size: ids in all, at least 259.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if vocab_size < len(named):
        raise ValueError(f"vocab_size must be at least {len(named)}, got {vocab_size}")
    tokens = named + [f"<{i}>" for i in range(len(named), vocab_size)]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
