"""Turn a GGUF file into a checkpoint directory: bf16 safetensors and a tokenizer.

Done once: transformers takes most of a minute to read a quantised GGUF, and a second or two to
read what this writes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from scripts.qwen.common import new_directory


def convert(gguf: Path, directory: Path) -> None:
    """Write the model and tokenizer in the file `gguf` to `directory`, dequantised to bfloat16."""
    # transformers joins the two to find the file; an empty first half it takes for a hub name
    folder, name = str(gguf.parent.resolve()), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    with new_directory(directory) as partial:
        save_checkpoint(model, tokenizer, partial)
        # GGUF has no field for the NFC normaliser that Qwen2Tokenizer brings; written a second
        # time it is in tokenizer.json too, for readers of that file alone.
        AutoTokenizer.from_pretrained(partial).save_pretrained(partial)


def save_checkpoint(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write a transformers model (safetensors) and its tokenizer to `directory`."""
    model.save_pretrained(directory)  # type: ignore[operator]
    tokenizer.save_pretrained(directory)
