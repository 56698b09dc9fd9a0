"""Checkpoints for tests of what opens them: tokenizers, adapters, GGUF files, their JSON files."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SHIPPED = Path(str(files("proxytune_kernels") / "data" / "trio"))
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def edit(file: Path, **settings: Any) -> None:
    """Change entries of a JSON file; None takes one away."""
    changed = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))


def make_adapter(directory: Path, model: Path, name: str | None = None, **settings: Any) -> Path:
    """A LoRA adapter that does something, its weights fp32, for the model in a directory."""
    import peft

    torch.manual_seed(3)
    named = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    plain = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    peft.get_peft_model(plain, peft.LoraConfig(**named)).save_pretrained(str(directory))
    edit(directory / "adapter_config.json", base_model_name_or_path=name or str(model))
    return directory


def make_tokenizer(*, swap: bool = False, chat: bool = True, extra: tuple[str, ...] = ()) -> Any:
    tokens = ["<pad>", "<s>", "</s>", *ALPHABET]
    if swap:
        tokens[10], tokens[11] = tokens[11], tokens[10]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


def tiny_qwen2(seed: int = 0, layers: int = 2) -> Qwen2ForCausalLM:
    """A random model of widths that Q8_0 takes, which are multiples of 32."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
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
