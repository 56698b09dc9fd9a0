"""The trio: three models, their tokenizers and prompts, and the vocabulary they share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from proxytune_kernels.loading import check_dtype, load_model, load_tokenizer, resolve
from proxytune_kernels.prompts import PROMPT_STYLES, tokenize
from proxytune_kernels.vocabulary import Agreement, RoleVocabulary, VocabularyError, agree

ROLES = ("base", "expert", "anti")
TRIO_FILE = "trio.json"
TRIO_FORMAT = 1
_TRIO_KEYS = {"format", *ROLES, "tokenizer", "gguf_file", "prompts"}


@dataclass(frozen=True)
class Trio:
    """Three causal LMs over one vocabulary, ready to decode; or the base alone.

    Made by :func:`load_trio`, or from models in memory by :meth:`from_models`.

    Args:
        models: role -> transformers causal LM, in the order base, expert, anti.
        tokenizers: role -> its tokenizer; the base's decodes the output.
        prompts: role -> ``"plain"`` or ``"chat"`` (see :func:`proxytune_kernels.prompts.tokenize`).
        agreement: the shared vocabulary.
        eos_token_ids: tokens that end a request.
    """

    models: Mapping[str, Any]
    tokenizers: Mapping[str, Any]
    prompts: Mapping[str, str]
    agreement: Agreement
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_models(
        cls,
        base: Any,
        expert: Any = None,
        anti: Any = None,
        tokenizer: Any = None,
        *,
        prompts: Mapping[str, str] | None = None,
    ) -> Trio:
        """Make a trio of models in memory.

        Args:
            base, expert, anti: transformers causal LMs; expert and anti both, or neither.
            tokenizer: one for all roles, or a mapping from role to tokenizer.
            prompts: role -> ``"plain"`` (default) or ``"chat"``.

        A request ends at the end-of-sequence tokens of the base's generation_config and of its
        tokenizer. An expert tuned with a chat template may end its turn with another token: pass
        that one in ``stop_token_ids``.

        Raises:
            ValueError: names the argument, what it got and what it wanted.
            VocabularyError: the roles disagree on the meaning of an id.
        """
        given = {"base": base, "expert": expert, "anti": anti}
        models = {role: model for role, model in given.items() if model is not None}
        _check_roles(models)
        if tokenizer is None:
            raise ValueError(
                "tokenizer must be a tokenizer or a mapping from role to one, got None"
            )
        tokenizers = {
            r: tokenizer[r] if isinstance(tokenizer, Mapping) else tokenizer for r in models
        }
        vocabularies = {r: _vocabulary(models[r], tokenizers[r]) for r in models}
        agreement = agree(vocabularies)
        eos = _eos_token_ids(models["base"], tokenizers["base"], agreement)
        return cls(models, tokenizers, _prompt_styles(prompts, tuple(models)), agreement, eos)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles there are: base, expert, anti; or base alone."""
        return tuple(self.models)

    @property
    def base(self) -> Any:
        """The large untuned model."""
        return self.models["base"]

    @property
    def expert(self) -> Any:
        """The small tuned model, or None."""
        return self.models.get("expert")

    @property
    def anti(self) -> Any:
        """The small untuned model, or None."""
        return self.models.get("anti")

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, which decodes the output."""
        return self.tokenizers["base"]

    @property
    def vocab_size(self) -> int:
        """Number of ids that mean the same to all roles; no other id is ever produced."""
        return self.agreement.vocab_size

    def tokenize(self, prompt: Any) -> dict[str, list[int]]:
        """Token ids of a prompt for each role; see :func:`proxytune_kernels.prompts.tokenize`."""
        widths = {
            role: model.get_input_embeddings().weight.shape[0]
            for role, model in self.models.items()
        }
        return tokenize(prompt, self.tokenizers, self.prompts, widths)

    def info(self) -> dict[str, Any]:
        """What was loaded and agreed, as plain values for printing or JSON."""
        return {
            "roles": {role: _model_info(model) for role, model in self.models.items()},
            "vocab_size": self.vocab_size,
            "vocabulary_notes": list(self.agreement.notes),
            "eos_token_ids": list(self.eos_token_ids),
            "prompts": dict(self.prompts),
        }


def load_trio(
    source: str | Path | None = None,
    *,
    base: str | Path | None = None,
    expert: str | Path | None = None,
    anti: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] = "auto",
    device: str | torch.device | Mapping[str, str | torch.device] = "cpu",
    prompts: Mapping[str, str] | None = None,
    gguf_file: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> Trio:
    """Open a trio and agree its vocabulary.

    Args:
        source: ``"shipped"``, or a directory with a trio.json; or name the roles instead.
        base, expert, anti: a directory (a checkpoint in safetensors or GGUF, or a LoRA adapter in
            PEFT format) or a hub name; they replace the source's. Expert and anti may both be left
            out: the base alone, unsteered.
        tokenizer: directory or hub name of one for all roles; without it each role's directory has
            its own, and they are compared.
        dtype: of the weights, "auto" for the checkpoint's; or one per role.
        device: or one per role.
        prompts: role -> ``"plain"`` or ``"chat"``; replaces the source's, plain if neither says.
        gguf_file: role -> name of the GGUF file in its directory, unpacked to ``dtype``.
        trust_remote_code: run modelling code that comes with a checkpoint.

    Raises:
        ValueError: names the argument, what it got and what it wanted.
        LoadError: a model or tokenizer that can't be opened, with the reason.
        VocabularyError: the roles disagree on the meaning of an id; names the first ones.

    Example:
        >>> trio = load_trio("shipped")
        >>> sorted(trio.tokenize("Hello"))
        ['anti', 'base', 'expert']

    Source: Liu et al. 2024, arXiv 2401.08565.
    """
    directory, settings = _read_source(source)
    named = {"base": base, "expert": expert, "anti": anti}
    references = {
        role: str(given) if given is not None else resolve(settings[role], directory)
        for role, given in named.items()
        if given is not None or role in settings
    }
    _check_roles(references)
    gguf = {**settings.get("gguf_file", {}), **(gguf_file or {})}
    _check_known("gguf_file", gguf)
    models = {
        role: load_model(
            role,
            reference,
            dtype=check_dtype(role, _per_role("dtype", dtype, role)),
            device=_per_role("device", device, role),
            gguf_file=gguf.get(role),
            trust_remote_code=trust_remote_code,
        )
        for role, reference in references.items()
    }
    if tokenizer is not None or "tokenizer" in settings:
        shared = (
            str(tokenizer) if tokenizer is not None else resolve(settings["tokenizer"], directory)
        )
        one = load_tokenizer(
            "tokenizer", shared, gguf_file=None, trust_remote_code=trust_remote_code
        )
        tokenizers = dict.fromkeys(models, one)
    else:
        tokenizers = {
            role: load_tokenizer(
                f"tokenizer of {role}",
                reference,
                gguf_file=gguf.get(role),
                trust_remote_code=trust_remote_code,
            )
            for role, reference in references.items()
        }
    styles = {**settings.get("prompts", {}), **(prompts or {})}
    return Trio.from_models(**models, tokenizer=tokenizers, prompts=styles)


def _read_source(source: str | Path | None) -> tuple[Path | None, dict[str, Any]]:
    """The trio's directory and what its trio.json says; neither for no source."""
    if source is None:
        return None, {}
    directory = (
        Path(str(files("proxytune_kernels") / "data" / "trio"))
        if source == "shipped"
        else Path(source)
    )
    path = directory / TRIO_FILE
    if not path.is_file():
        raise ValueError(
            f"source must be 'shipped' or a directory with a {TRIO_FILE}, got {str(source)!r}"
        )
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must hold JSON: {error}") from error
    if not isinstance(settings, dict) or settings.get("format") != TRIO_FORMAT:
        raise ValueError(f"{path} must be an object of format {TRIO_FORMAT}")
    unknown = sorted(set(settings) - _TRIO_KEYS)
    if unknown:
        raise ValueError(
            f"{path} must have keys among {', '.join(sorted(_TRIO_KEYS))}, got {unknown[0]!r}"
        )
    return directory, settings


def _check_roles(given: Mapping[str, Any]) -> None:
    if "base" not in given:
        raise ValueError("base must be a model, got None")
    if ("expert" in given) != ("anti" in given):
        missing = "anti" if "expert" in given else "expert"
        raise ValueError(f"{missing} must be given with the other of the pair, got None")


def _check_known(name: str, values: Mapping[str, Any]) -> None:
    unknown = sorted(set(values) - set(ROLES))
    if unknown:
        raise ValueError(f"{name} must have keys among {', '.join(ROLES)}, got {unknown[0]!r}")


def _per_role(name: str, value: Any, role: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    _check_known(name, value)
    if role not in value:
        raise ValueError(f"{name} must have an entry for {role}, got {', '.join(value)}")
    return value[role]


def _prompt_styles(prompts: Mapping[str, str] | None, roles: tuple[str, ...]) -> dict[str, str]:
    given = prompts or {}
    _check_known("prompts", given)
    for role, style in given.items():
        if style not in PROMPT_STYLES:
            raise ValueError(
                f"prompts of {role} must be one of {', '.join(PROMPT_STYLES)}, got {style!r}"
            )
    return {role: given.get(role, "plain") for role in roles}


def _vocabulary(model: Any, tokenizer: Any) -> RoleVocabulary:
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    return RoleVocabulary(tokens, model.get_output_embeddings().weight.shape[0])


def _eos_token_ids(base: Any, tokenizer: Any, agreement: Agreement) -> tuple[int, ...]:
    named = base.generation_config.eos_token_id if base.generation_config is not None else None
    listed = [named] if isinstance(named, int) else list(named or ())
    if tokenizer.eos_token_id is not None:
        listed.append(tokenizer.eos_token_id)
    eos = tuple(dict.fromkeys(listed))
    cut = [i for i in eos if i >= agreement.vocab_size]
    if eos and len(cut) == len(eos):
        raise VocabularyError(
            f"base must end its text with a token that all roles have, got {cut} past the shared "
            f"vocabulary of {agreement.vocab_size} ids"
        )
    return tuple(i for i in eos if i < agreement.vocab_size)


def _model_info(model: Any) -> dict[str, Any]:
    weight = next(model.parameters())
    return {
        "model": type(model).__name__,
        "name": model.config._name_or_path,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "logits": model.get_output_embeddings().weight.shape[0],
    }
