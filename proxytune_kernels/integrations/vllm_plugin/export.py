"""Writes a directory that vLLM serves: the base's checkpoint with the pair in it.

    OUT/                    what ``vllm serve OUT`` opens
      config.json           the base's, with our architecture and ``proxy_tuning``
      generation_config.json, the tokenizer's files, weights      the base's
      expert/, anti/        config.json and weights of each

Weights are links unless they are copied. All paths in config.json are relative to it, so a
directory of copies can be moved, or put in a container, as a whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune_kernels.integrations.vllm_plugin import ARCHITECTURE
from proxytune_kernels.integrations.vllm_plugin.directory import check_out, place, replaced
from proxytune_kernels.integrations.vllm_plugin.sources import (
    DTYPES,
    Checkpoint,
    Sources,
    open_sources,
)
from proxytune_kernels.params import check_alpha
from proxytune_kernels.trio.checkpoints import LoadError, load_tokenizer
from proxytune_kernels.trio.roles import PAIR

# Copied where they are there: of every role, and of the tokenizer.
_CONFIG_FILES = ("generation_config.json", "quantize_config.json", "hf_quant_config.json")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class Export:
    """What was written.

    Args:
        directory: what to serve.
        weights: role -> in words, where its weights come from.
        vocab_size: number of ids that mean the same to all roles.
        notes: on the vocabulary and the dtype, for people.
    """

    directory: Path
    weights: Mapping[str, str]
    vocab_size: int
    notes: tuple[str, ...]


def export(
    out: str | Path,
    source: str | Path | None = None,
    *,
    base: str | Path | None = None,
    expert: str | Path | None = None,
    anti: str | Path | None = None,
    tokenizer: str | Path | None = None,
    alpha: float = 1.0,
    dtype: str = "auto",
    copy: bool = False,
    force: bool = False,
) -> Export:
    """Write a directory that vLLM serves with no other flag.

    Args:
        out: the directory, new or empty. It is written whole or not at all.
        source, base, expert, anti, tokenizer: what :func:`proxytune_kernels.load_trio` takes. LoRA
            adapters are merged and GGUF files unpacked, and written; other weights are linked.
        alpha: of requests that do not say one.
        dtype: what config.json says, "auto" for the base's: float32, bfloat16 or float16. vLLM runs
            all three models in it.
        copy: copy the weights, so that the directory needs nothing outside it.
        force: replace an earlier export. Files that it did not write, or that were changed since,
            are never removed: it refuses.

    Raises:
        ValueError: names the argument, what it got and what it wanted.
        LoadError: something that can't be opened, can't be served by vLLM, or is in the way.
        VocabularyError: the roles disagree on the meaning of an id; names the first ones.

    Example:
        >>> export("served", "shipped").vocab_size
        1536

    Source: docs/vllm.md.
    """
    check_alpha(alpha)
    _check_dtype(dtype)
    target = Path(out)
    sources = open_sources(source, {"base": base, "expert": expert, "anti": anti}, tokenizer, dtype)
    check_out(target, sources.directories(), force=force)
    with replaced(target) as staging:
        for role, checkpoint in sources.checkpoints.items():
            _write(checkpoint, staging if role == "base" else staging / role, copy=copy)
        _write_tokenizer(sources, staging)
        _edit_config(staging, sources, alpha, dtype)
    return Export(
        target,
        {role: _origin(checkpoint, copy) for role, checkpoint in sources.checkpoints.items()},
        sources.agreement.vocab_size,
        (*sources.agreement.notes, *_dtype_notes(target)),
    )


def serve_command(
    source: str | Path | None = None,
    *,
    base: str | Path | None = None,
    expert: str | Path | None = None,
    anti: str | Path | None = None,
    tokenizer: str | Path | None = None,
    alpha: float = 1.0,
) -> list[str]:
    """The command that serves a trio where it lies, by ``--hf-overrides``; nothing is written.

    Args:
        source, base, expert, anti, tokenizer, alpha: as :func:`export` takes them.

    Raises:
        ValueError, VocabularyError: as :func:`export`.
        LoadError: also where weights or a tokenizer would have to be written.
    """
    check_alpha(alpha)
    named = {"base": base, "expert": expert, "anti": anti}
    sources = open_sources(source, named, tokenizer, "auto")
    for role, checkpoint in sources.checkpoints.items():
        if checkpoint.model is not None:
            raise LoadError(
                f"{role} must be a checkpoint in safetensors to be served where it lies, got "
                f"{str(checkpoint.directory)!r}, whose weights have to be written: export it"
            )
    places = {r: str(c.directory.resolve()) for r, c in sources.checkpoints.items()}
    directory = places.pop("base")
    command = ["vllm", "serve", directory]
    home = sources.tokenizer_directory
    if home is not None and not home.samefile(directory):
        command += ["--tokenizer", str(home.resolve())]
    changed = {
        "architectures": [ARCHITECTURE],
        "proxy_tuning": _proxy_tuning(sources, places, alpha),
    }
    return [*command, "--hf-overrides", json.dumps(changed)]


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _proxy_tuning(sources: Sources, pair: Mapping[str, str], alpha: float) -> dict[str, Any]:
    return {
        **pair,
        "alpha": float(alpha),
        "base_architectures": sources.checkpoints["base"].architectures,
        "vocab_size": sources.agreement.vocab_size,
    }


def _write(checkpoint: Checkpoint, directory: Path, *, copy: bool) -> None:
    """One role's config and weights."""
    directory.mkdir(exist_ok=True)
    if checkpoint.model is not None:
        checkpoint.model.save_pretrained(directory)
        for file in directory.glob("*.safetensors"):
            # It is readable by its owner alone; whoever serves it may be another.
            shutil.copymode(directory / "config.json", file)
        return
    for name in ("config.json", *_CONFIG_FILES):
        if (checkpoint.directory / name).is_file():
            place(checkpoint.directory / name, directory / name, copy=True)
    for name in checkpoint.weight_files():
        place(checkpoint.directory / name, directory / name, copy=copy)


def _write_tokenizer(sources: Sources, directory: Path) -> None:
    """The base's tokenizer; checked, since a config.json beside it may make it another class.

    Raises:
        LoadError: it opens there with other tokens.
    """
    home = sources.tokenizer_directory
    if home is None:
        sources.tokenizer.save_pretrained(directory)
        return
    for name in _TOKENIZER_FILES:
        if (home / name).is_file():
            place(home / name, directory / name, copy=True)
    opened = load_tokenizer("tokenizer", str(directory), gguf_file=None, trust_remote_code=False)
    if opened.get_vocab() != sources.tokenizer.get_vocab():
        raise LoadError(
            f"tokenizer must be the same beside the base's config.json, got another vocabulary for "
            f"{str(home)!r} as {type(opened).__name__}"
        )


def _edit_config(directory: Path, sources: Sources, alpha: float, dtype: str) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    if dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    config["architectures"] = [ARCHITECTURE]
    pair = {role: role for role in PAIR}
    config["proxy_tuning"] = _proxy_tuning(sources, pair, alpha)
    file.write_text(json.dumps(config, indent=2) + "\n")


def _origin(checkpoint: Checkpoint, copy: bool) -> str:
    if checkpoint.model is not None:
        return f"written anew from {checkpoint.directory}"
    return f"{'copied' if copy else 'linked'} from {checkpoint.directory}"


def _dtype_notes(directory: Path) -> list[str]:
    config = json.loads((directory / "config.json").read_text())
    if config.get("dtype", config.get("torch_dtype")) != "float32":
        return []
    return ["vLLM runs float32 checkpoints in 16 bits unless it is told --dtype float32"]
