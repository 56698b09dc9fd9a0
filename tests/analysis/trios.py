"""A trio whose every probability is known by arithmetic: a table says what follows what."""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from proxytune_kernels.trio import Trio

WORDS = "<end> 3 + 4 = 7 so sorry a b c d e f g <script>".split()
V = len(WORDS)
ID = {word: i for i, word in enumerate(WORDS)}

EXPERT = {("3", "+"): 45, ("+", "4"): 15, ("4", "="): 15, ("=", "7"): 45, ("7", "<end>"): 15}
BASE = {("3", "4"): 15, ("=", "7"): 45, ("=", "3"): 15}
"""What is that many times as likely behind a word as the rest, which are equally likely."""


def tokenizer() -> Any:
    """One token for a word and the space before it."""
    names = {word if i == 0 else f"\u2581{word}": i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(names, unk_token="\u2581g"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@torch.no_grad()
def model(table: dict[tuple[str, str], int]) -> Any:
    """A model that knows the last token alone: its layer adds nothing."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=V, intermediate_size=V, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, rms_norm_eps=1e-12,
        bos_token_id=None, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    made.model.layers[0].self_attn.o_proj.weight.zero_()
    made.model.layers[0].mlp.down_proj.weight.zero_()
    made.model.embed_tokens.weight.copy_(torch.eye(V))
    made.lm_head.weight.zero_()
    for (before, behind), times in table.items():
        # The norm makes sqrt(V) of the 1 in a token's embedding.
        made.lm_head.weight[ID[behind], ID[before]] = math.log(times) / math.sqrt(V)
    return made


def hand_made(prompts: dict[str, str] | None = None) -> Trio:
    """Base and expert by their tables; to the anti-expert all words are equally likely."""
    words = tokenizer()
    words.chat_template = " so{{ messages[0]['content'] }}"
    return Trio.from_models(model(BASE), model(EXPERT), model({}), tokenizer=words, prompts=prompts)
