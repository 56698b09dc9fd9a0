"""Writes a GGUF file, for tests of what reads one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def tiny_qwen2() -> Qwen2ForCausalLM:
    """A random model of widths that Q8_0 takes, which are multiples of 32."""
    config = Qwen2Config(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return Qwen2ForCausalLM(config).eval()


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """Write a Qwen2 model, matrices in Q8_0; the model's own become what Q8_0 makes of them."""
    import gguf

    config, q8 = model.config, gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, "ab"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        values, kind = weight.numpy(), None
        if weight.dim() == 2:
            values, kind = gguf.quants.quantize(values, q8), q8
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(values, q8)))
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
