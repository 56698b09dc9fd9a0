"""Tiny random trios in fp64, where rounding can't change a token, and the loop they are held to."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from proxytune_kernels.decoder import Decoder, RequestOutput, StreamEvent
from proxytune_kernels.ops.backends import backends
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio

VOCAB_SIZE = 262
BACKEND = "cpu" if backends()["cpu"] is None else "reference"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def byte_tokenizer() -> Any:
    """Three special tokens, the 256 bytes, and "st", "op", "stop"."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("s", "t"), ("o", "p"), ("st", "op")]
    vocab = {t: i for i, t in enumerate([*special, *alphabet, "st", "op", "stop"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def word_tokenizer(size: int) -> Any:
    """``size`` words, "w0", "w1", ..., and no special tokens."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def kind(family: str, sizes: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    """A causal LM of transformers' and its configuration, by what their names begin with."""
    named = {"Gemma3": ("ForCausalLM", "TextConfig"), "GPT2": ("LMHeadModel", "Config")}
    model, config = named.get(family, ("ForCausalLM", "Config"))
    made = getattr(transformers, family + config)(**{**sizes, **settings})
    return getattr(transformers, family + model), made


def tiny_llama(seed: int, hidden: int = 32, layers: int = 2, **settings: Any) -> Any:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **settings})).double().eval()


@torch.no_grad()
def noisy_copy(model: Any, scale: float, seed: int) -> Any:
    """A model near another: normal noise of standard deviation ``scale`` on every weight."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in twin.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter += scale * noise
    return twin


def near_trio() -> Trio:
    """A trio whose expert drafts what the target often takes."""
    anti = tiny_llama(6, 16, 1)
    pair = noisy_copy(anti, 0.03, 3), noisy_copy(anti, 0.03, 4)
    return Trio.from_models(*pair, anti, byte_tokenizer())


@contextmanager
def nan_token(trio: Trio, token_id: int) -> Iterator[None]:
    """The base gives NaN after this token: a row that holds it has nothing left to draw."""
    weight = trio.base.model.embed_tokens.weight
    kept = weight[token_id].clone()
    with torch.no_grad():
        weight[token_id] = torch.nan
    try:
        yield
    finally:
        with torch.no_grad():
            weight[token_id] = kept


def by_request(events: Iterable[StreamEvent]) -> dict[int, list[StreamEvent]]:
    by_index = defaultdict(list)
    for event in events:
        by_index[event.index].append(event)
    return by_index


def ended(events: Sequence[StreamEvent]) -> RequestOutput:
    """A request's output: its events say once, at the last, that it ended, and add up to it."""
    output = events[-1].output
    assert output is not None
    assert all(event.output is None for event in events[:-1])
    assert [token_id for event in events for token_id in event.token_ids] == output.token_ids
    assert "".join(event.text for event in events) == output.text
    return output


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def near() -> Trio:
    return near_trio()


@pytest.fixture(scope="session")
def lora_trio(tokenizer: Any) -> Trio:
    """The expert is the anti with an adapter that moves its logits by about their own size."""
    peft = pytest.importorskip("peft")
    anti = tiny_llama(2)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False
    )
    expert = peft.get_peft_model(copy.deepcopy(anti), config).get_base_model().double().eval()
    return Trio.from_models(tiny_llama(0, 48, 3), expert, anti, tokenizer)


@pytest.fixture(scope="session")
def trio(tokenizer: Any) -> Trio:
    """The base has other sizes than the pair, as in real trios."""
    return Trio.from_models(
        tiny_llama(0, 48, 3), tiny_llama(1, 32, 2), tiny_llama(2, 32, 2), tokenizer
    )


@pytest.fixture(scope="session")
def trios(tokenizer: Any) -> dict[str, Trio]:
    """By how much of what the expert drafts is accepted: little, some, all."""

    def model(seed: int) -> Any:
        heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
        return tiny_llama(seed, 16, 1, max_position_embeddings=512, **heads)

    base = model(0)
    pair = noisy_copy(base, 0.05, 1), noisy_copy(base, 0.05, 2)
    return {
        "unrelated": Trio.from_models(base, model(1), model(2), tokenizer),
        "near": Trio.from_models(base, *pair, tokenizer),
        "same": Trio.from_models(base, base, base, tokenizer),
    }


EIGHT = 8


@pytest.fixture(scope="session")
def eight() -> Trio:
    """Of eight tokens; its logits, about 2 apart, depend on the whole text."""
    settings: dict[str, Any] = {
        "vocab_size": EIGHT, "num_attention_heads": 2, "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    base = tiny_llama(3, 8, 1, **settings)
    return Trio.from_models(
        base, noisy_copy(base, 0.15, 1), noisy_copy(base, 0.15, 2), word_tokenizer(EIGHT)
    )


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    def make(trio: Trio, max_batch_size: int = 4, **options: Any) -> Decoder:
        return Decoder(trio, max_batch_size, **{"backend": BACKEND, **options})

    return make


def as_asked(x: Tensor, params: SamplingParams, prompt: Sequence[int], output: list[int]) -> Tensor:
    """vLLM's order, over the whole vocabulary: masks, bias, repetition, frequency, presence."""
    x, free = x.clone(), x.clone()
    if params.allowed_token_ids:
        x[[i for i in range(len(x)) if i not in set(params.allowed_token_ids)]] = -torch.inf
    text = [*(prompt if params.bad_words_prompt else ()), *output]
    words = [list(word) for word in params.bad_words if not isinstance(word, str)]
    x[[word[0] for word in words if len(word) == 1]] = -torch.inf
    if len(output) < params.min_tokens:
        x[list(params.stop_token_ids)] = -torch.inf
    if only := params.allowed_at.get(len(output)):
        x = free.where(torch.isin(torch.arange(len(x)), torch.tensor(only)), -torch.inf)
    for word in words:
        if word[:-1] == text[len(text) - len(word) + 1 :] and len(word) > 1:
            x[word[-1]] = -torch.inf
    for token_id, value in params.logit_bias.items():
        x[token_id] += value
    for token_id in {*output, *(prompt if params.penalty_prompt else ())}:
        r = torch.tensor(params.repetition_penalty)
        x[token_id] = x[token_id] / r if x[token_id] > 0 else x[token_id] * r
    for token_id, count in Counter(output).items():
        x[token_id] -= torch.tensor(params.frequency_penalty) * count
        x[token_id] -= params.presence_penalty
    return x


def argmax(logits: dict[str, Tensor], alpha: float) -> int:
    combined = logits["base"]
    if "expert" in logits:
        combined = combined + alpha * (logits["expert"] - logits["anti"])
    return int(combined.argmax())


@torch.no_grad()
def naive_loop(
    models: Mapping[str, Any],
    prompts: Mapping[str, Sequence[int]],
    count: int,
    pick: Callable[[dict[str, Tensor], int], int],
) -> list[int]:
    """Proxy-tuning as one would write it first: no cache, no batch, whole forwards.

    ``pick`` gets each role's last logits [V] and the position, and returns the next token.
    """
    sequences = {role: list(prompts[role]) for role in models}
    output: list[int] = []
    for position in range(count):
        logits = {
            role: model(torch.tensor([sequences[role]]), use_cache=False).logits[0, -1]
            for role, model in models.items()
        }
        output.append(pick(logits, position))
        for sequence in sequences.values():
            sequence.append(output[-1])
    return output


@pytest.fixture
def naive() -> Callable[..., list[int]]:
    return naive_loop


@pytest.fixture(scope="session")
def greedy() -> Callable[..., list[int]]:
    """The naive loop with the argmax: (models, prompts, alpha, count) -> token ids."""

    def run(
        models: Mapping[str, Any], prompts: Mapping[str, Sequence[int]], alpha: float, count: int
    ) -> list[int]:
        return naive_loop(models, prompts, count, lambda logits, _: argmax(logits, alpha))

    return run
