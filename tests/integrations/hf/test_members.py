"""Members of kinds that a trio of small plain models does not meet: experts, offloaded weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from proxytune_kernels.decoder import Decoder
from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import BACKEND, VOCAB_SIZE, argmax, byte_tokenizer, naive_loop
from tests.decoder.conftest import tiny_llama as llama

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "head_dim": 8,
    "max_position_embeddings": 64, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
PROMPTS = ["hello", "stop it"]


def generated(model: Any, **how: Any) -> list[list[int]]:
    inputs = model.tokenize(PROMPTS)
    made = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, **how
    )
    rows: list[list[int]] = made[:, inputs["input_ids"].shape[1] :].tolist()
    return rows


def naive(trio: Trio) -> list[list[int]]:
    ids = [trio.tokenize(prompt) for prompt in PROMPTS]
    return [naive_loop(trio.models, each, 8, lambda x, _: argmax(x, 1.0)) for each in ids]


def check_every_way(trio: Trio, wanted: list[list[int]]) -> None:
    """The decoder; generate() in it, and over transformers' caches."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = Decoder(trio, 2, backend=BACKEND).generate(PROMPTS, params)
    assert [output.token_ids for output in outputs] == wanted
    model = ProxyTunedForCausalLM.from_trio(trio)
    assert generated(model) == wanted
    assert model.info()["sampling"] == "proxytune_kernels.Decoder"
    assert generated(model, cache_implementation="dynamic") == wanted
    assert "transformers' loop" in model.info()["sampling"]


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 16}),
    ],
)
def test_a_base_of_experts(kind, experts):
    config = getattr(transformers, f"{kind}Config")(**SIZES, **experts)
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}ForCausalLM")(config).eval()  # its products take no fp64
    how = base.config._experts_implementation
    trio = Trio.from_models(base, llama(1), llama(2), byte_tokenizer())
    check_every_way(trio, naive(trio))
    assert base.config._experts_implementation == how


@pytest.mark.parametrize("where", ["cpu", "disk", "map"])
def test_members_that_accelerate_offloads(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain = Trio.from_models(llama(0), llama(1), llama(2), byte_tokenizer())
    wanted = naive(plain)
    models = {role: copy.deepcopy(model) for role, model in plain.models.items()}
    for role, model in models.items():
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        elif where == "disk":
            accelerate.disk_offload(model, tmp_path / role, execution_device=torch.device("cpu"))
        else:
            places = {"model.embed_tokens": "disk", "lm_head": "disk", "model.layers.0": "disk"}
            rest = {"model.layers.1": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
            accelerate.dispatch_model(model, {**places, **rest}, offload_dir=tmp_path / role)
    trio = Trio.from_models(models["base"], models["expert"], models["anti"], byte_tokenizer())
    assert any(p.device.type == "meta" for p in trio.base.parameters())
    check_every_way(trio, wanted)
    assert ProxyTunedForCausalLM.from_trio(trio).device == torch.device("cpu")
