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
from proxytune_kernels.params import check_alpha
from proxytune_kernels.trio import eos_token_ids
from proxytune_kernels.trio.adapters import Source
from proxytune_kernels.trio.checkpoints import (
    LoadOptions,
    check_dtype,
    load_tokenizer,
    read_config,
    resolve,
    text_config,
)
from proxytune_kernels.trio.files import (
    INDEX_FILE,
    LoadError,
    Place,
    file_in,
    find,
    weight_files,
)
from proxytune_kernels.trio.loading import load_models, named_models, read_source
from proxytune_kernels.trio.roles import PAIR, ROLES, check_known
from proxytune_kernels.trio.vocabulary import Agreement, RoleVocabulary, agree

_DTYPES = ("auto", "float32", "bfloat16", "float16")

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
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    target = Path(out)
    named = {"base": base, "expert": expert, "anti": anti}
    sources = _open_sources(source, named, tokenizer, dtype)
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
    sources = _open_sources(source, named, tokenizer, "auto")
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


@dataclass(frozen=True)
class _Checkpoint:
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


@dataclass(frozen=True)
class _Sources:
    """Three checkpoints, the tokenizer they share, and the vocabulary they agree on.

    Args:
        checkpoints: role -> its model, in the order base, expert, anti.
        tokenizer: the base's.
        tokenizer_directory: its files are there; None where it comes out of a GGUF file.
        agreement: the shared vocabulary.
    """

    checkpoints: Mapping[str, _Checkpoint]
    tokenizer: Any
    tokenizer_directory: Path | None
    agreement: Agreement

    def directories(self) -> list[Path]:
        """All that is read from."""
        own = [checkpoint.directory for checkpoint in self.checkpoints.values()]
        return own if self.tokenizer_directory is None else [*own, self.tokenizer_directory]


def _open_sources(
    source: str | Path | None,
    named: Mapping[str, str | Path | None],
    tokenizer: str | Path | None,
    dtype: str,
) -> _Sources:
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
    if settings.get("pairs"):
        raise LoadError("pairs in trio.json must be left out: vLLM serves a trio of one pair")
    if settings.get("quantize"):
        raise LoadError(
            "quantize in trio.json is done as models are opened, which vLLM does not do: name "
            "checkpoints that are quantised in a format of vLLM's (GPTQ, AWQ, compressed-tensors)"
        )
    gguf = settings.get("gguf_file", {})
    check_known("gguf_file", gguf)
    found = {role: Source(role, find(role, reference)) for role, reference in references.items()}
    checkpoints = {r: _checkpoint(each, gguf.get(r), dtype) for r, each in found.items()}
    if tokenizer is None and "tokenizer" in settings:
        tokenizer = resolve(settings["tokenizer"], directory)
    shared = None if tokenizer is None else find("tokenizer", tokenizer)
    homes = {role: shared or each.tokenizer for role, each in found.items()}
    packed = {} if tokenizer is not None else gguf
    tokenizers = {
        role: load_tokenizer(f"tokenizer of {role}", home, gguf_file=packed.get(role))
        for role, home in homes.items()
    }
    _check_prompts(settings.get("prompts", {}), tokenizers)
    agreement = agree(
        {r: RoleVocabulary.of(tokenizers[r], checkpoints[r].width) for r in checkpoints}
    )
    eos_token_ids(_generation_config(checkpoints["base"]), tokenizers["base"], agreement)
    home = None if "base" in packed else homes["base"].directory
    return _Sources(checkpoints, tokenizers["base"], home, agreement)


def _checkpoint(source: Source, gguf_file: str | None, dtype: str) -> _Checkpoint:
    if gguf_file is not None or source.adapted is not None:
        return _opened(source, gguf_file, dtype)
    role, directory = source.role, source.own.directory
    config = read_config(role, directory)
    width = text_config(role, source.own).vocab_size
    if not config.get("architectures"):
        raise LoadError(
            f"{role} must name its architectures in config.json, which vLLM looks models up by, "
            f"got {str(directory)!r} without"
        )
    if ARCHITECTURE in config["architectures"]:
        raise LoadError(f"{role} must be one model, got the exported trio {str(directory)!r}")
    weight_files(role, directory)
    return _Checkpoint(role, directory, config, width)


def _opened(source: Source, gguf_file: str | None, dtype: str) -> _Checkpoint:
    """A model whose weights have to be written anew, in memory."""
    role, directory = source.role, source.own.directory
    options = LoadOptions(dtype=check_dtype(role, dtype), gguf_file=gguf_file)
    model = load_models({role: source}, {role: options}, merge_adapter=True)[role]
    if gguf_file is None and getattr(model.config, "quantization_config", None) is not None:
        raise LoadError(
            f"{role} must be an adapter for plain weights to be merged, got one for quantised "
            f"weights in {str(directory)!r}"
        )
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    width = model.get_output_embeddings().weight.shape[0]
    return _Checkpoint(role, directory, config, width, model)


def _generation_config(base: _Checkpoint) -> Any:
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


def _proxy_tuning(sources: _Sources, pair: Mapping[str, str], alpha: float) -> dict[str, Any]:
    return {
        **pair,
        "alpha": float(alpha),
        "base_architectures": sources.checkpoints["base"].architectures,
        "vocab_size": sources.agreement.vocab_size,
    }


def _write(checkpoint: _Checkpoint, directory: Path, *, copy: bool) -> None:
    """One role's config and weights."""
    directory.mkdir(exist_ok=True)
    if checkpoint.model is not None:
        checkpoint.model.save_pretrained(directory)
        for file in directory.glob("*.safetensors"):
            # It is readable by its owner alone; whoever serves it may be another.
            shutil.copymode(directory / "config.json", file)
        return
    role, home = checkpoint.role, checkpoint.directory
    for name in ("config.json", *_CONFIG_FILES):
        if (home / name).is_file():
            place(file_in(role, home, name), directory / name, copy=True)
    for name in weight_files(role, home):
        # An index is small, and says what the export holds: never a link.
        place(file_in(role, home, name), directory / name, copy=copy or name == INDEX_FILE)


def _write_tokenizer(sources: _Sources, directory: Path) -> None:
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
            place(file_in("tokenizer", home, name), directory / name, copy=True)
    opened = load_tokenizer("tokenizer", Place(str(directory), directory))
    if opened.get_vocab() != sources.tokenizer.get_vocab():
        raise LoadError(
            f"tokenizer must be the same beside the base's config.json, got another vocabulary for "
            f"{str(home)!r} as {type(opened).__name__}"
        )


def _edit_config(directory: Path, sources: _Sources, alpha: float, dtype: str) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    if dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    config["architectures"] = [ARCHITECTURE]
    pair = {role: role for role in PAIR}
    config["proxy_tuning"] = _proxy_tuning(sources, pair, alpha)
    file.write_text(json.dumps(config, indent=2) + "\n")


def _origin(checkpoint: _Checkpoint, copy: bool) -> str:
    if checkpoint.model is not None:
        return f"written anew from {checkpoint.directory}"
    return f"{'copied' if copy else 'linked'} from {checkpoint.directory}"


def _dtype_notes(directory: Path) -> list[str]:
    config = json.loads((directory / "config.json").read_text())
    if config.get("dtype", config.get("torch_dtype")) != "float32":
        return []
    return ["vLLM runs float32 checkpoints in 16 bits unless it is told --dtype float32"]
