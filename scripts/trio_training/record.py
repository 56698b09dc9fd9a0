"""What a run leaves behind: trio.json, training.json, the hashes in it, the table in the docs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from .batches import END_OF_TEXT
from .recipe import MAX_POSITIONS

RECORD = "training.json"
MANIFEST = {"format": 1, "base": "base", "expert": "expert", "anti": "anti", "tokenizer": "."}
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokenizer so that `AutoTokenizer.from_pretrained(directory)` opens it."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
    ).save_pretrained(directory)
    # transformers 5 writes a class name that 4 does not know; both know this one.
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def file_hashes(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a trio's directory, the record itself excepted."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


def environment() -> dict[str, str]:
    """Return the versions and the machine that a bit-for-bit repetition depends on."""
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def differences(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """Return one line for each key whose value differs between two flat mappings."""
    return [
        f"{key}: {found.get(key, 'absent')} here, {recorded.get(key, 'absent')} in the record"
        for key in sorted({*found, *recorded})
        if found.get(key) != recorded.get(key)
    ]


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as the Markdown table that docs/trio.md holds."""
    lines = [
        "| | answer NLL, held-out pairs | exact match, held-out pairs | exact match, other pairs |",
        "| --- | --- | --- | --- |",
    ]
    for row in results:
        held_out, other = row["held_out_pairs"], row["other_pairs"]
        lines.append(
            f"| {row['name']} | {held_out['answer_nll']:.3f} | {held_out['exact_match']:.1%} "
            f"| {other['exact_match']:.1%} |"
        )
    return "\n".join(lines)
