"""Settings of the whole test run, and what tests of several parts share."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune_kernels.trio import libllama, load_trio
from proxytune_kernels.trio.files import LoadError
from proxytune_kernels.trio.roles import ROLES

# Nothing is fetched from a hub: what a test needs it has or makes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# transformers imports torchao, which notes the kernels that this build of torch lacks.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)


@torch.no_grad()
def proxy_greedy(trio: Any, prompt: str, count: int) -> list[int]:
    """Proxy-tuning by the models' own forwards: no cache, no batch, the argmax of the sum."""
    sequences = {role: list(ids) for role, ids in trio.tokenize(prompt).items()}
    output: list[int] = []
    for _ in range(count):
        base, expert, anti = (
            trio.models[role](torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            for role, ids in sequences.items()
        )
        output.append(int((base + (expert - anti))[: trio.vocab_size].argmax()))
        for ids in sequences.values():
            ids.append(output[-1])
    return output


@pytest.fixture
def trio(tmp_path: Path) -> Path:
    """A copy of the shipped trio's directory, to be changed."""
    shipped = str(files("proxytune_kernels") / "data" / "trio")
    return Path(shutil.copytree(shipped, tmp_path / "trio"))


@pytest.fixture
def plain_greedy() -> Callable[[Any, str, int], list[int]]:
    return proxy_greedy


@dataclass(frozen=True)
class GgufTrio:
    """Role -> a tiny GGUF file, and the model in fp32 of what its Q8_0 weights stand for."""

    files: dict[str, Path]
    models: dict[str, Any]

    def load(self, **options: Any) -> Any:
        named: dict[str, Any] = {**self.files, **options}
        return load_trio(runtime="llama.cpp", **named)


@pytest.fixture(scope="session")
def gguf_trio(tmp_path_factory: pytest.TempPathFactory) -> GgufTrio:
    try:
        libllama.library()
    except LoadError as error:
        pytest.skip(f"no libllama: {error}")
    from tests.trio.checkpoints import make_tokenizer, tiny_qwen2, write_gguf

    root = tmp_path_factory.mktemp("gguf")
    models = {role: tiny_qwen2(seed, 2 - seed % 2) for seed, role in enumerate(ROLES)}
    for role, model in models.items():
        write_gguf(root / f"{role}.gguf", model, make_tokenizer())
    return GgufTrio({role: root / f"{role}.gguf" for role in models}, models)
