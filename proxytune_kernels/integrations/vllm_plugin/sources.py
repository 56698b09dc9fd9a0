"""What an export reads: three checkpoints, their configs, and the vocabulary they share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune_kernels.integrations.vllm_plugin import ARCHITECTURE
from proxytune_kernels.trio import eos_token_ids
from proxytune_kernels.trio.adapters import is_adapter, tokenizer_directory
from proxytune_kernels.trio.checkpoints import LoadError, load_tokenizer, resolve
from proxytune_kernels.trio.loading import load_models, load_options, named_models, read_source
from proxytune_kernels.trio.roles import ROLES, check_known
from proxytune_kernels.trio.vocabulary import Agreement, RoleVocabulary, agree

DTYPES = ("auto", "float32", "bfloat16", "float16")
_INDEX = "model.safetensors.index.json"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Checkpoint:
    """One role's model.

    Args:
        role: base, expert or anti.
        directory: where its files are; of an adapter, the adapter's.
        config: what its config.json says.
        width: number of logits.
        model: the model in memory where its weights have to be written anew (an adapter merged, a
            GGUF file unpacked), or None.
    """

    role: str
    directory: Path
    config: Mapping[str, Any]
    width: int
    model: Any = None

    @property
    def architectures(self) -> list[str]:
        """Of the model, as vLLM looks it up."""
        return list(self.config["architectures"])

    def weight_files(self) -> list[str]:
        """Names of the safetensors files, with their index where there is one.

        Raises:
            LoadError: there are none, or one that the index names is missing.
        """
        names = ["model.safetensors"]
        if (self.directory / _INDEX).is_file():
            index = json.loads((self.directory / _INDEX).read_text())
            names = [_INDEX, *sorted(set(index["weight_map"].values()))]
        for name in names:
            if not (self.directory / name).is_file():
                raise LoadError(
                    f"{self.role} must have its weights in safetensors (one file, or {_INDEX} and "
                    f"what it names), got {str(self.directory)!r} without {name}"
                )
        return names


@dataclass(frozen=True)
class Sources:
    """Three checkpoints, the tokenizer they share, and the vocabulary they agree on.

    Args:
        checkpoints: role -> its model, in the order base, expert, anti.
        tokenizer: the base's.
        tokenizer_directory: its files are there; None where it comes out of a GGUF file.
        agreement: the shared vocabulary.
    """

    checkpoints: Mapping[str, Checkpoint]
    tokenizer: Any
    tokenizer_directory: Path | None
    agreement: Agreement

    def directories(self) -> list[Path]:
        """All that is read from."""
        own = [checkpoint.directory for checkpoint in self.checkpoints.values()]
        return own if self.tokenizer_directory is None else [*own, self.tokenizer_directory]


def open_sources(
    source: str | Path | None,
    named: Mapping[str, str | Path | None],
    tokenizer: str | Path | None,
    dtype: str,
) -> Sources:
    """Find the checkpoints of a trio and agree their vocabulary, as ``load_trio`` does.

    Weights are opened only where they have to be written anew.

    Raises:
        ValueError: names the argument, what it got and what it wanted.
        LoadError: a checkpoint or tokenizer that can't be opened, or that vLLM can't serve.
        VocabularyError: the roles disagree on the meaning of an id; names the first ones.
    """
    directory, settings = read_source(source)
    references = named_models(settings, directory, **named)
    if len(references) != len(ROLES):
        raise ValueError("expert and anti must be given to export a trio, got base alone")
    if settings.get("quantize"):
        raise LoadError(
            "quantize in trio.json is done as models are opened, which vLLM does not do: name "
            "checkpoints that are quantised in a format of vLLM's (GPTQ, AWQ, compressed-tensors)"
        )
    gguf = settings.get("gguf_file", {})
    check_known("gguf_file", gguf)
    places = {role: _local(role, reference) for role, reference in references.items()}
    checkpoints = {r: _checkpoint(r, place, gguf.get(r), dtype) for r, place in places.items()}
    if tokenizer is None and "tokenizer" in settings:
        tokenizer = resolve(settings["tokenizer"], directory)
    homes = {
        role: Path(tokenizer_directory(role, str(places[role])))
        if tokenizer is None
        else _local("tokenizer", str(tokenizer))
        for role in places
    }
    packed = {} if tokenizer is not None else gguf
    tokenizers = {
        role: load_tokenizer(
            f"tokenizer of {role}",
            str(home),
            gguf_file=packed.get(role),
            trust_remote_code=False,
        )
        for role, home in homes.items()
    }
    _check_prompts(settings.get("prompts", {}), tokenizers)
    agreement = agree(
        {r: RoleVocabulary.of(tokenizers[r], checkpoints[r].width) for r in checkpoints}
    )
    eos_token_ids(_generation_config(checkpoints["base"]), tokenizers["base"], agreement)
    home = None if "base" in packed else homes["base"]
    return Sources(checkpoints, tokenizers["base"], home, agreement)


def _local(role: str, reference: str) -> Path:
    """A directory: the one that is named, or a hub name's in the cache, fetched if need be."""
    if Path(reference).is_dir():
        return Path(reference)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(reference, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise LoadError(
            f"{role} must be a directory or hub name, got {reference!r}: {reason}"
        ) from error


def _checkpoint(role: str, directory: Path, gguf_file: str | None, dtype: str) -> Checkpoint:
    if gguf_file is not None or is_adapter(str(directory)):
        return _opened(role, directory, gguf_file, dtype)
    from transformers import AutoConfig

    try:
        config = json.loads((directory / "config.json").read_text())
        width = AutoConfig.from_pretrained(directory).get_text_config().vocab_size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise LoadError(f"{role} must be a causal LM, got {str(directory)!r}: {reason}") from error
    if not config.get("architectures"):
        raise LoadError(
            f"{role} must name its architectures in config.json, which vLLM looks models up by, "
            f"got {str(directory)!r} without"
        )
    if ARCHITECTURE in config["architectures"]:
        raise LoadError(f"{role} must be one model, got the exported trio {str(directory)!r}")
    checkpoint = Checkpoint(role, directory, config, width)
    checkpoint.weight_files()
    return checkpoint


def _opened(role: str, directory: Path, gguf_file: str | None, dtype: str) -> Checkpoint:
    """A model whose weights have to be written anew, in memory."""
    options = load_options(
        role,
        dtype=dtype,
        device=None,
        device_map=None,
        quantize={},
        gguf_file={} if gguf_file is None else {role: gguf_file},
        trust_remote_code=False,
    )
    model = load_models({role: str(directory)}, {role: options}, merge_adapter=True)[role]
    if gguf_file is None and getattr(model.config, "quantization_config", None) is not None:
        raise LoadError(
            f"{role} must be an adapter for plain weights to be merged, got one for quantised "
            f"weights in {str(directory)!r}"
        )
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return Checkpoint(role, directory, config, model.get_output_embeddings().weight.shape[0], model)


def _generation_config(base: Checkpoint) -> Any:
    from transformers import GenerationConfig

    if base.model is not None:
        return base.model.generation_config
    if (base.directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(base.directory)
    return GenerationConfig(eos_token_id=base.config.get("eos_token_id"))


def _check_prompts(styles: Mapping[str, str], tokenizers: Mapping[str, Any]) -> None:
    """Check that all roles read the same prompt: vLLM has one for the three."""
    check_known("prompts", styles)
    given = {role: styles.get(role, "plain") for role in ROLES}
    if len(set(given.values())) > 1:
        each = ", ".join(f"{role} {style}" for role, style in given.items())
        raise LoadError(
            f"prompts must be the same for all roles, since a request of vLLM has one prompt, got "
            f"{each}"
        )
    templates = {getattr(tokenizer, "chat_template", None) for tokenizer in tokenizers.values()}
    if "chat" in given.values() and len(templates) > 1:
        raise LoadError(
            "prompts of 'chat' must come from one template, since a request of vLLM has one "
            "prompt, got tokenizers with different ones"
        )
