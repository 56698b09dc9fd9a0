"""Tiny trios, and lm_eval's own transformers model over their plain combination."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from proxytune_kernels.trio import Trio
from tests.decoder.conftest import byte_tokenizer, tiny_llama

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


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What datasets keeps of the tasks' files goes with the tests."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


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


def make_trio(dtype: torch.dtype = torch.float32, tokenizer: Any = None) -> Trio:
    settings: dict[str, Any] = {"max_position_embeddings": CONTEXT, "initializer_range": 0.1}
    sizes = {"base": (48, 3), "expert": (32, 2), "anti": (32, 2)}
    models = {
        role: tiny_llama(seed, hidden, layers, **settings).to(dtype)
        for seed, (role, (hidden, layers)) in enumerate(sizes.items())
    }
    return Trio.from_models(**models, tokenizer=tokenizer or byte_tokenizer())


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


def write_tasks(folder: Path) -> Path:
    """Three local tasks: multiple choice, perplexity of texts, answers to the end of the line."""
    rows = [
        {
            "question": f"What is {i} and {i}{' and so on' * (i % 3)}?",
            "choices": [f"{2 * i}", f"{2 * i} or so", "none", "none of these"],
            "label": i % 4,
            "answer": str(2 * i),
            "text": f"All of {i} is {i}. " * (1 + 5 * (i % 3)),
        }
        for i in range(9)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "{{question}}\n",
    }
    mean: dict[str, Any] = {"aggregation": "mean", "higher_is_better": True}
    lowest: dict[str, Any] = {"aggregation": "weighted_perplexity", "higher_is_better": False}
    tasks: dict[str, dict[str, Any]] = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "num_fewshot": 0,
            "metric_list": [
                {"metric": "word_perplexity", **lowest},
                {"metric": "bits_per_byte", **lowest, "aggregation": "bits_per_byte"},
            ],
        },
        "local_answer": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **task}))
    return folder
