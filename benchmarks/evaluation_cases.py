"""What the evaluation benchmark asks: trios, multiple-choice documents, and who answers them."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance

from benchmarks.prompts import TEXT
from benchmarks.trios import open_trio, quiet_loading
from proxytune_kernels import Trio
from proxytune_kernels.integrations.lm_eval_model import ProxyTuneLM

WIDE = "wide"
"""A trio of random weights with the vocabulary and hidden size of SmolLM-135M."""
VOCAB_SIZE = 49_152
ALPHA = 1.0

CONTEXT_TOKENS = (12, 40)
CHOICE_TOKENS = (1, 4)

Document = list[Any]
"""A document's requests, one per choice, all with its context."""


def make_trio(name: str, dtype: str | None, layers: int) -> Trio:
    """``wide`` with a base of ``layers`` layers, or as ``open_trio``."""
    if name != WIDE:
        return open_trio(name, dtype)
    quiet_loading()
    weights = getattr(torch, dtype or "float32")
    base = _llama(0, 576, 1536, 9, 3, layers, weights)
    expert, anti = (_llama(seed, 192, 512, 3, 3, 2, weights) for seed in (1, 2))
    return Trio.from_models(base, expert, anti, _words())


def _llama(
    seed: int, hidden: int, inner: int, heads: int, kv: int, layers: int, dtype: torch.dtype
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def _words() -> Any:
    """A tokenizer whose tokens are words: "w0", "w1", ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", pad_token="w0")


def make_documents(name: str, count: int, choices: int, seed: int = 0) -> list[Document]:
    """Documents with contexts of unequal lengths and choices of one to a few tokens (words)."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(1, VOCAB_SIZE)] if name == WIDE else TEXT.split()

    def text(least: int, most: int) -> str:
        length = rng.randint(least, most)
        if name == WIDE:
            return " ".join(rng.choices(words, k=length))
        first = rng.randrange(len(words) - length)
        return " ".join(words[first : first + length])

    documents = []
    for i in range(count):
        context = text(*CONTEXT_TOKENS)
        ends = [" " + text(*CHOICE_TOKENS) for _ in range(choices)]
        documents.append([Instance("loglikelihood", {}, (context, end), i) for end in ends])
    return documents


def _ours(trio: Trio, batch_size: int) -> Any:
    return ProxyTuneLM(trio, alpha=ALPHA, batch_size=batch_size)


def _hflm(trio: Trio, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM

    # It warns that a model was made before it was given.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = ProxyTunedForCausalLM.from_trio(trio, ALPHA)
    return HFLM(pretrained=model, tokenizer=trio.tokenizer, batch_size=batch_size)


PROVIDERS: Mapping[str, Callable[[Trio, int], Any]] = {"ours": _ours, "HFLM": _hflm}
"""Who answers: ``proxytune``, and lm_eval's transformers model over the three as one."""


def answer(lm: Any, documents: Sequence[Document]) -> list[tuple[float, bool]]:
    """(log-likelihood, is greedy) of every choice."""
    asked = [request for document in documents for request in document]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[tuple[float, bool]] = lm.loglikelihood(asked, disable_tqdm=True)
    return found
