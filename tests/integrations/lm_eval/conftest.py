"""Tiny trios, and lm_eval's own transformers model over their plain combination."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from proxytune_kernels.trio import Trio
from tests.decoder.conftest import byte_tokenizer

os.environ["HF_DATASETS_OFFLINE"] = "1"

CONTEXT = 96
"""Tokens that the tiny models can be given."""

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tokenizer_with_bos() -> Any:
    """A byte tokenizer that begins every text with <s>, and has a chat template."""
    from tokenizers.processors import TemplateProcessing

    backend = byte_tokenizer().backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT,
    )


def tiny(seed: int, hidden: int, layers: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def make_trio(dtype: torch.dtype = torch.float32, tokenizer: Any = None) -> Trio:
    models = (tiny(0, 48, 3, dtype), tiny(1, 32, 2, dtype), tiny(2, 32, 2, dtype))
    return Trio.from_models(*models, tokenizer or byte_tokenizer())


@pytest.fixture(scope="session")
def trio() -> Trio:
    return make_trio()


@pytest.fixture(scope="session")
def trio_with_bos() -> Trio:
    return make_trio(tokenizer=tokenizer_with_bos())


class Composite(nn.Module):
    """What HFLM needs of a transformers model: the combined logits in fp32, and greedy decoding
    of a left-padded batch, by whole forwards."""

    def __init__(self, trio: Trio, alpha: float) -> None:
        super().__init__()
        self.models = nn.ModuleList(trio.models.values())
        self.alpha = alpha
        self.eos = trio.eos_token_ids
        self.config = trio.base.config
        self.device = trio.base.device

    def tie_weights(self) -> None:
        pass

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **keywords: Any) -> Any:
        logits = [m(input_ids, use_cache=False, **keywords).logits.float() for m in self.models]
        if len(logits) == 1:
            return SimpleNamespace(logits=logits[0])
        return SimpleNamespace(logits=logits[0] + self.alpha * (logits[1] - logits[2]))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_length: int,
        stopping_criteria: Any,
        do_sample: bool,
        pad_token_id: int,
        use_cache: bool,
    ) -> Tensor:
        assert not do_sample
        # HFLM does not pass the mask: its padding is the tokenizer's, on the left.
        mask = (input_ids != pad_token_id).long().cummax(dim=1).values
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        while input_ids.shape[1] < max_length and not ended.all():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            x = self(input_ids, attention_mask=mask, position_ids=positions).logits[:, -1]
            token_ids = torch.where(ended, pad_token_id, x.argmax(-1))
            input_ids = torch.cat([input_ids, token_ids[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            ended |= torch.isin(token_ids, torch.tensor(self.eos))
            if all(criterion(input_ids, None) for criterion in stopping_criteria[:1]):
                break
        return input_ids


@pytest.fixture(scope="session")
def make_hflm() -> Callable[..., Any]:
    """(trio, alpha, **arguments of HFLM) -> lm_eval's model over the composite."""
    from lm_eval.models.huggingface import HFLM

    def make(trio: Trio, alpha: float, **arguments: Any) -> Any:
        return HFLM(pretrained=Composite(trio, alpha), tokenizer=trio.tokenizer, **arguments)

    return make


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]
