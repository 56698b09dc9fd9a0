"""The trio as GGUF files for llama.cpp: base and anti as downloaded, the expert written anew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from scripts.qwen.download import LARGE, SMALL, TrioError, new_directory

DIRECTORY = "gguf"
"""Of the files, inside the trio's."""
FILES = {"base": LARGE.name, "expert": "expert.gguf", "anti": SMALL.name}


def make(out: Path) -> Path:
    """Write OUT/gguf, a trio that ``load_trio`` opens; the downloads in it are links to OUT/.cache.

    Raises:
        TrioError: what it is made of is not there.
    """
    for role in ("base", "anti"):
        if not (out / ".cache" / FILES[role]).is_file():
            raise TrioError(
                f"there is no {out / '.cache' / FILES[role]}: make the trio without --clean"
            )
    if not (out / "expert" / "model.safetensors").is_file():
        raise TrioError(
            f"there is no merged expert in {out / 'expert'}: make the trio with --merge"
        )
    with new_directory(out / DIRECTORY) as partial:
        for role in ("base", "anti"):
            os.link(out / ".cache" / FILES[role], partial / FILES[role])
        write_like(partial / FILES["anti"], out / "expert", partial / FILES["expert"])
        settings = {
            "format": 1,
            **dict.fromkeys(FILES, "."),
            "gguf_file": FILES,
            "runtime": "llama.cpp",
            "tokenizer": "../base",
        }
        (partial / "trio.json").write_text(json.dumps(settings, indent=1) + "\n")
    return out / DIRECTORY


def write_like(like: Path, checkpoint: Path, path: Path) -> None:
    """Write a Qwen2 checkpoint as GGUF: metadata of another file, matrices in Q8_0.

    Those of the anti are mostly Q5_0. The tuned expert's, rounded to that, changed the likeliest
    token at 6 to 8% of positions.
    """
    import gguf
    from safetensors import safe_open

    reader: Any = gguf.GGUFReader(like)
    fields, q8 = reader.fields, gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, fields["general.architecture"].contents())
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for name, field in fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[0] if inner else None)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, fields["qwen2.block_count"].contents())
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            stem, _, suffix = name.rpartition(".")
            weight = file.get_tensor(name).float().numpy()
            matrix = weight.ndim == 2
            values = gguf.quants.quantize(weight, q8) if matrix else weight
            writer.add_tensor(
                f"{names.get_name(stem)}.{suffix}", values, raw_dtype=q8 if matrix else None
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
