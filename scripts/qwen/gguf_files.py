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
    """Write a Qwen2 checkpoint as GGUF, with the metadata and the kinds of weights of another file.

    Matrices of kinds that the gguf package does not quantise to become Q8_0.
    """
    import gguf
    from safetensors import safe_open

    reader: Any = gguf.GGUFReader(like)
    fields = reader.fields
    writer = gguf.GGUFWriter(path, fields["general.architecture"].contents())
    for name, field in fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            kinds = field.types
            inner = kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kinds[0], inner)
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    layers = fields["qwen2.block_count"].contents()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            stem, _, suffix = name.rpartition(".")
            own = f"{names.get_name(stem)}.{suffix}"
            weight, kind = file.get_tensor(name).float().numpy(), kinds[own]
            try:
                writer.add_tensor(own, gguf.quants.quantize(weight, kind), raw_dtype=kind)
            except NotImplementedError:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(own, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
