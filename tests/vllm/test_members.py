"""Each member opens as its own checkpoint says: quantised, in two bytes, without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

import torch
from safetensors.torch import load_file, save_file

from tests.vllm.trios import ask, generate, logits, save_model, save_trio, write_trio

PROMPT = list(b"hello world")
# vLLM's int8 kernels for a CPU with AMX take two bytes only.
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def quantised(directory: Path, to: Path) -> Path:
    """A checkpoint with the weights of its layers in int8, one scale for each output."""
    shutil.copytree(directory, to)
    tensors = load_file(to / "model.safetensors")
    for name, weight in list(tensors.items()):
        if name.endswith("proj.weight"):
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[name.replace("weight", "weight_scale")] = scale
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "quantization_config": INT8}))
    return to


def methods(model: Any) -> dict[str, str]:
    return {
        role: type(member.model.layers[0].mlp.down_proj.quant_method).__name__
        for role, member in model.members.items()
    }


def test_the_expert_is_quantised(make_llm, tmp_path):
    anti = save_model(tmp_path, "anti")
    expert = quantised(save_model(tmp_path, "expert"), tmp_path / "int8")
    [alone] = generate(make_llm(expert, dtype="bfloat16"), [PROMPT], [None], 16)
    trio = write_trio(tmp_path / "trio", {"base": anti, "expert": expert, "anti": anti})
    llm = make_llm(trio, dtype="bfloat16")
    assert llm.llm_engine.apply_model(methods)[0] == {
        "base": "UnquantizedLinearMethod",
        "expert": "CompressedTensorsLinearMethod",
        "anti": "UnquantizedLinearMethod",
    }
    # anti + (expert - anti)
    steered, base = generate(llm, [PROMPT] * 2, [1.0, 0.0], 16)
    assert steered == alone != base


def test_the_base_is_quantised_and_weights_are_dummies(make_llm, tmp_path):
    members = {role: save_model(tmp_path, role) for role in ("expert", "anti")}
    base = quantised(save_model(tmp_path, "llama"), tmp_path / "int8")
    trio = write_trio(tmp_path / "trio", {"base": base, **members})
    llm = make_llm(trio, load_format="dummy", dtype="bfloat16")
    assert llm.llm_engine.apply_model(methods)[0] == {
        "base": "CompressedTensorsLinearMethod",
        "expert": "UnquantizedLinearMethod",
        "anti": "UnquantizedLinearMethod",
    }
    assert len(generate(llm, [PROMPT], [None], 16)[0]) == 16


def test_a_dtype_of_two_bytes(make_llm, tmp_path):
    """Alpha's bits travel in two columns; what it gives is near the fp32 reference."""
    trio = save_trio(tmp_path, "llama")
    llm = make_llm(trio, dtype="bfloat16")
    alphas = [1.0, -0.37, 0.1]
    outputs = ask(llm, [PROMPT] * len(alphas), alphas, 1, logprobs=5)
    for alpha, output in zip(alphas, outputs, strict=True):
        exact = logits(trio, PROMPT, alpha, torch.float64)
        # transformers' own forwards in bf16 are as far from the exact ones.
        error = float((logits(trio, PROMPT, alpha, torch.bfloat16) - exact).abs().max())
        wanted = exact[-1].log_softmax(-1)
        for token, said in output.logprobs[0].items():
            assert abs(said.logprob - float(wanted[token])) <= 4 * error
