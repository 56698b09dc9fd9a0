"""Where a trio to be comes from: base and anti by name; and the trio.json that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from proxytune_kernels.trio.adapters import Source
from proxytune_kernels.trio.checkpoints import LoadOptions, check_dtype, resolve, text_config
from proxytune_kernels.trio.loading import (
    TRIO_FILE,
    TRIO_FORMAT,
    find_sources,
    load_models,
    load_options,
    load_tokenizers,
    named_models,
    read_source,
)
from proxytune_kernels.trio.roles import ROLES
from proxytune_kernels.trio.vocabulary import Agreement, RoleVocabulary, agree

EXPERT = "expert"
"""The directory of the expert, in that of the trio."""


@dataclass(frozen=True)
class Untuned:
    """A base and an anti-expert, which stands for the expert too as long as there is none.

    Made by :func:`open_untuned`, which opens no weights.

    Args:
        settings: what the trio.json says that they were named by; empty without one.
        references: role -> directory or hub name.
        sources: role -> what it is opened from.
        options: role -> how.
        tokenizers: role -> tokenizer.
        tokenizer: the one directory or hub name of all of them, or None.
        widths: role -> number of ids.
        agreement: the vocabulary that they share.
        max_length: tokens that both models read at most; None where neither says.
        dtype: of the anti-expert's checkpoint, as its configuration says.
    """

    settings: Mapping[str, Any]
    references: Mapping[str, str]
    sources: Mapping[str, Source]
    options: Mapping[str, LoadOptions]
    tokenizers: Mapping[str, Any]
    tokenizer: str | None
    widths: Mapping[str, int]
    agreement: Agreement
    max_length: int | None
    dtype: torch.dtype | None

    def open_anti(self, dtype: str, device: str) -> Any:
        """The anti-expert's model, to be tuned.

        Raises:
            LoadError: it can't be opened.
        """
        options = replace(self.options["anti"], dtype=check_dtype("anti", dtype), device=device)
        models = load_models({"anti": self.sources["anti"]}, {"anti": options}, merge_adapter=True)
        return models["anti"]

    def write_trio(self, out: Path, styles: Mapping[str, str], *, merged: bool) -> None:
        """Write the trio.json of base, anti and the expert that is in ``out``.

        Args:
            out: directory of the trio.
            styles: role -> how it reads prompts.
            merged: the expert is a checkpoint; else an adapter, kept beside the anti's weights.
        """
        trio: dict[str, Any] = {
            "format": TRIO_FORMAT,
            "base": lasting(self.references["base"]),
            "expert": EXPERT,
            "anti": lasting(self.references["anti"]),
        }
        if self.tokenizer is not None:
            trio["tokenizer"] = lasting(self.tokenizer)
        if not merged:
            trio["merge_adapter"] = False
        for key in ("gguf_file", "quantize"):
            given = self.settings.get(key)
            each = given if isinstance(given, Mapping) else dict.fromkeys(ROLES, given)
            # What is tuned is tuned as it is: not quantised.
            kept = ("base", "anti") if key == "gguf_file" else ("base",)
            if own := {role: each[role] for role in kept if each.get(role) is not None}:
                trio[key] = own
        if set(styles.values()) != {"plain"}:
            trio["prompts"] = dict(styles)
        (out / TRIO_FILE).write_text(json.dumps(trio, indent=1) + "\n", encoding="utf-8")


def open_untuned(
    source: str | Path | None = None,
    *,
    base: str | Path | None = None,
    anti: str | Path | None = None,
    tokenizer: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Untuned:
    """Find a base and an anti-expert, open their tokenizers, and agree their vocabulary.

    Args:
        source, base, anti, tokenizer, trust_remote_code: as :func:`proxytune_kernels.load_trio`
            takes them; an expert that the source names is not looked at.

    Raises:
        ValueError, LoadError, VocabularyError: as :func:`proxytune_kernels.load_trio`.
    """
    directory, settings = read_source(source)
    if anti is None and "anti" not in settings:
        raise ValueError("anti must be a model, got None: it is what is tuned")
    small = resolve(settings["anti"], directory) if anti is None else str(anti)
    references = named_models(settings, directory, base=base, expert=small, anti=small)
    gguf = {role: name for role, name in settings.get("gguf_file", {}).items() if role != "expert"}
    if "anti" in gguf:
        gguf["expert"] = gguf["anti"]
    options = {
        role: load_options(
            *(role,), dtype="auto", device_map=None, quantize={}, gguf_file=gguf,
            trust_remote_code=trust_remote_code,
        )
        for role in references
    }  # fmt: skip
    sources = find_sources(references, options)
    if tokenizer is None and "tokenizer" in settings:
        tokenizer = resolve(settings["tokenizer"], directory)
    tokenizers = load_tokenizers(sources, options, tokenizer)
    configs = {
        role: text_config(
            role,
            found.plain,
            gguf_file=options[role].gguf_file,
            trust_remote_code=trust_remote_code,
        )
        for role, found in sources.items()
    }
    widths = {role: config.vocab_size for role, config in configs.items()}
    contexts = [getattr(config, "max_position_embeddings", None) for config in configs.values()]
    return Untuned(
        settings=settings,
        references=references,
        sources=sources,
        options=options,
        tokenizers=tokenizers,
        tokenizer=None if tokenizer is None else str(tokenizer),
        widths=widths,
        agreement=agree({r: RoleVocabulary.of(tokenizers[r], widths[r]) for r in widths}),
        max_length=min((length for length in contexts if length), default=None),
        dtype=getattr(configs["anti"], "dtype", None),
    )


def lasting(reference: str) -> str:
    """A reference that holds from anywhere: a directory's absolute path, or a hub name."""
    return str(Path(reference).resolve()) if Path(reference).is_dir() else reference
