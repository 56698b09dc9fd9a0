"""Trios of Llama 2's shapes with random weights, made on the device they run on.

How long a step takes depends on shapes and dtypes, not on what the weights are; so nothing has to
be downloaded, and no disk is touched. A model is built without memory and then filled one layer at
a time, so that a base that is quantised never takes the place of the same base in bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module, Parameter, Sequential

from proxytune_kernels import Trio

VOCAB_SIZE = 32_000
DTYPE = torch.bfloat16
LORA_RANK = 16

SEPARATE, SHARED = "separate", "shared"
"""The pair's weights: two models of their own, or one and a LoRA adapter on it."""

_SEEDS = {"base": 0, "expert": 1, "anti": 2, "adapter": 3}
_WEIGHT_STD = 0.02  # Llama's initializer_range: activations stay of the order of 1 in any depth
# Of one role's logits; three of them combine to sqrt(3) times that: 2.6, as a real trio's on
# English (docs/benchmarks.md, Logits). Flat logits would take the sampler longer.
_LOGITS_STD = 1.5

Quantize = Callable[[Module], Module]
"""Takes a linear layer with its weights, and gives the layer that takes its place."""


@dataclass(frozen=True)
class ModelShape:
    """A Llama's dimensions.

    Source: Touvron et al. 2023, arXiv 2307.09288, and the published configurations.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int = VOCAB_SIZE
    context: int = 4096
    tied: bool = False

    def config(self) -> Any:
        """The transformers configuration; embedding and head are one matrix where they are tied."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=self.tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )


LLAMA_7B = ModelShape(4096, 11_008, 32, 32, 32)
LLAMA_13B = ModelShape(5120, 13_824, 40, 40, 40)
LLAMA_70B = ModelShape(8192, 28_672, 80, 64, 8)


@dataclass(frozen=True)
class TrioShape:
    """A base and a pair in bf16; the base may have its weights, and they alone, in int8."""

    name: str
    """As on the command line and in the results."""
    title: str
    base: ModelShape
    pair: ModelShape
    int8_base: bool = False


TRIOS = {
    shape.name: shape
    for shape in (
        TrioShape("13b", "Llama 13B + 7B + 7B, bf16", LLAMA_13B, LLAMA_7B),
        TrioShape("70b", "Llama 70B int8 + 7B + 7B bf16", LLAMA_70B, LLAMA_7B, int8_base=True),
    )
}
"""By the name of ``--trios``, the most important first."""


def build_trios(shape: TrioShape, device: str) -> dict[str, Trio]:
    """Both trios of a shape, with random weights; they share base and anti-expert."""
    quantize = int8_linear if shape.int8_base else None
    base = random_model(shape.base, device, _SEEDS["base"], quantize=quantize)
    expert, anti = (random_model(shape.pair, device, _SEEDS[role]) for role in ("expert", "anti"))
    tokenizer = byte_tokenizer(shape.base.vocab_size)
    return with_shared_pair(Trio.from_models(base, expert, anti, tokenizer))


def with_shared_pair(trio: Trio) -> dict[str, Trio]:
    """A trio, and the same with a random adapter on its anti-expert as its expert."""
    expert = adapted_model(trio.anti, _SEEDS["adapter"])
    shared = Trio.from_models(trio.base, expert, trio.anti, dict(trio.tokenizers))
    return {SEPARATE: trio, SHARED: shared}


def int8_linear(layer: Module) -> Module:
    """A linear layer with its weights in int8, a scale a row, as torchao has them."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = Sequential(layer)
    quantize_(holder, Int8WeightOnlyConfig(set_inductor_config=False))
    return holder[0]


def empty_model(shape: ModelShape) -> Any:
    """A Llama without memory: its parameters are on device "meta"."""
    from transformers import LlamaForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model: Any = LlamaForCausalLM(shape.config())
        return model.to(DTYPE).eval()


def random_model(
    shape: ModelShape,
    device: str | torch.device,
    seed: int,
    *,
    quantize: Quantize | None = None,
    dtype: torch.dtype = DTYPE,
) -> Any:
    """A Llama with random weights on a device, in evaluation mode.

    ``quantize`` is given each linear layer but the head as soon as it has weights, and gives the
    layer that takes its place.
    """
    model = empty_model(shape)
    generator = torch.Generator(device).manual_seed(seed)
    head = model.get_output_embeddings()
    # By name: a list of the layers would keep all that were quantised in memory.
    for name in [name for name, _ in model.named_modules()]:
        layer = model.get_submodule(name)
        std = _LOGITS_STD * shape.hidden_size**-0.5 if layer is head else _WEIGHT_STD
        for own, parameter in list(layer.named_parameters(recurse=False)):
            filled = torch.ones(parameter.shape, dtype=dtype, device=device)
            if isinstance(layer, Linear | Embedding):  # norms' weights are 1
                filled.normal_(0.0, std, generator=generator)
            setattr(layer, own, Parameter(filled, requires_grad=False))
        if quantize is not None and isinstance(layer, Linear) and layer is not head:
            model.set_submodule(name, quantize(layer))
    # Its buffers are computed, not loaded: a filled "meta" tensor would be a wrong angle.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()
    return model.requires_grad_(False)


def adapted_model(model: Any, seed: int) -> Any:
    """A model with a random LoRA adapter (PEFT) on all linear layers, over the same weights.

    The given model stays as it is: its modules are copied, its tensors shared.
    """
    from peft import LoraConfig, get_peft_model

    twin = copy.deepcopy(model, {id(tensor): tensor for _, tensor in _tensors(model)})
    settings = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules="all-linear",
        init_lora_weights=False,  # B is not 0: an adapter that adds nothing could be left out
    )
    device = next(model.parameters()).device
    with torch.random.fork_rng([] if device.type == "cpu" else [device.index or 0]):
        torch.manual_seed(seed)
        adapted = get_peft_model(twin, settings, autocast_adapter_dtype=False)
    return adapted.get_base_model().eval().requires_grad_(False)


def _tensors(model: Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _unique(models: Sequence[Module]) -> dict[int, Tensor]:
    return {id(t): t for model in models for _, t in _tensors(model)}


def weight_bytes(models: Sequence[Module]) -> int:
    """Bytes of all tensors of some models; those that they share count once."""
    return sum(map(_bytes, _unique(models).values()))


def step_bytes(models: Sequence[Any]) -> int:
    """Bytes that a decoding step reads of some models: all but the input embeddings.

    Of an embedding one row a token is read, which is not counted; a head that is the same matrix
    is read whole.
    """
    heads = {id(model.get_output_embeddings().weight) for model in models}
    embeddings = {id(model.get_input_embeddings().weight) for model in models} - heads
    return sum(_bytes(t) for at, t in _unique(models).items() if at not in embeddings)


def _bytes(tensor: Any) -> int:
    """Bytes of a tensor; of its parts where it is a quantised one, made of several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def byte_tokenizer(vocab_size: int) -> Any:
    """A tokenizer made in memory: a token for each byte, and names for the ids that are left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = named + [f"<{i}>" for i in range(len(named), vocab_size)]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
