"""The trio: three models, their tokenizers and prompts, and the vocabulary they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from proxytune_kernels.trio.adapters import adapter_parameters, unwrapped
from proxytune_kernels.trio.checkpoints import resolve
from proxytune_kernels.trio.files import LoadError
from proxytune_kernels.trio.llama_cpp import RUNTIME, LlamaModel
from proxytune_kernels.trio.loading import (
    find_sources,
    load_models,
    load_options,
    load_tokenizers,
    named_models,
    read_source,
)
from proxytune_kernels.trio.packed import products
from proxytune_kernels.trio.prompts import PROMPT_STYLES, tokenize
from proxytune_kernels.trio.quantization import quantization_of, weight_bytes, weight_count
from proxytune_kernels.trio.remote import RemoteBase, RemoteModel
from proxytune_kernels.trio.roles import ROLES, check_known, check_roles, kind_of, pair_roles
from proxytune_kernels.trio.vocabulary import Agreement, RoleVocabulary, VocabularyError, agree


@dataclass(frozen=True)
class Trio:
    """Three causal LMs over one vocabulary, ready to decode; or the base alone.

    Made by :func:`load_trio`, or from models in memory by :meth:`from_models`.

    Args:
        models: role -> transformers causal LM, in the order base, expert, anti.
        tokenizers: role -> its tokenizer; the base's decodes the output.
        prompts: role -> ``"plain"`` or ``"chat"`` (see :func:`~trio.prompts.tokenize`).
        agreement: the shared vocabulary.
        eos_token_ids: tokens that end a request.
        pairs: the roles of each further pair, ``(("expert_2", "anti_2"), ...)``. A model that is
            in several pairs has one role: ``("expert_2", "anti")`` has the first pair's anti.
        further: role -> model of these that is none of ``models``.
    """

    models: Mapping[str, Any]
    tokenizers: Mapping[str, Any]
    prompts: Mapping[str, str]
    agreement: Agreement
    eos_token_ids: tuple[int, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    further: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_models(
        cls,
        base: Any,
        expert: Any = None,
        anti: Any = None,
        tokenizer: Any = None,
        *,
        prompts: Mapping[str, str] | None = None,
        pairs: Sequence[tuple[Any, Any]] = (),
    ) -> Trio:
        """Make a trio of models in memory.

        Args:
            base, expert, anti: transformers causal LMs; expert and anti both, or neither. The
                base may be a :class:`proxytune_kernels.RemoteBase`, which is asked here what it can
                do. The expert may be a PEFT model with a LoRA adapter: its causal LM is taken, as a
                copy that shares its tensors, with the adapter's weights in the dtype of their
                layers.
            tokenizer: one for all roles, or a mapping from role to tokenizer.
            prompts: role -> ``"plain"`` (default) or ``"chat"``.
            pairs: (expert, anti) of each further pair, without adapters. They read the prompts of
                expert and anti. Their tokenizers are those of the mapping's "expert_2", "anti_2",
                "expert_3", ... where it has them, else expert's and anti's.

        A request ends at the end-of-sequence tokens of the base's generation_config and of its
        tokenizer. An expert tuned with a chat template may end its turn with another token: pass
        that one in ``stop_token_ids``.

        Raises:
            ValueError: names the argument, what it got and what it wanted.
            VocabularyError: the roles disagree on the meaning of an id.
        """
        if expert is not None:
            expert = unwrapped("expert", expert)
        given = {"base": base, "expert": expert, "anti": anti}
        models = {role: model for role, model in given.items() if model is not None}
        check_roles(models)
        if anti is not None and adapter_parameters(anti):
            # PEFT puts an adapter into the very model that it is given.
            raise ValueError(
                "anti must be the model without the adapter, got one with LoRA layers in it: "
                "give PEFT another one (a copy), or load the anti anew"
            )
        named, further = pair_roles(models, pairs)
        for role, model in further.items():
            if adapter_parameters(model):
                raise ValueError(
                    f"pairs must be of models without LoRA layers, got some in {role}: merge them"
                )
        if tokenizer is None:
            raise ValueError(
                "tokenizer must be a tokenizer or a mapping from role to one, got None"
            )
        tokenizers = {
            r: tokenizer.get(r, tokenizer[kind_of(r)])
            if isinstance(tokenizer, Mapping)
            else tokenizer
            for r in (*models, *further)
        }
        if isinstance(base, RemoteBase):
            models["base"] = RemoteModel(base, tokenizers["base"], expert)
        members = {**models, **further}
        widths = {r: m.get_output_embeddings().weight.shape[0] for r, m in members.items()}
        for role, model in members.items():
            if isinstance(model, LlamaModel):
                model.check_tokenizer(role, tokenizers[role])
        agreement = agree({r: RoleVocabulary.of(tokenizers[r], widths[r]) for r in members})
        eos = eos_token_ids(models["base"].generation_config, tokenizers["base"], agreement)
        own = {role: tokenizers[role] for role in models}
        styles = _prompt_styles(prompts, tuple(models))
        return cls(models, own, styles, agreement, eos, named, further)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles there are: base, expert, anti; or base alone."""
        return tuple(self.models)

    @property
    def members(self) -> dict[str, Any]:
        """All models by role, those of further pairs too."""
        return {**self.models, **self.further}

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

    def check_modules(self, user: str) -> None:
        """Refuse, for ``user``, a trio whose models are not all modules of transformers.

        Raises:
            ValueError: names the role.
        """
        for role, model in self.models.items():
            if isinstance(model, LlamaModel):
                raise ValueError(
                    f"{user} needs models that transformers runs, got {role} in {RUNTIME}"
                )

    def check_one_pair(self, user: str) -> None:
        """Refuse, for ``user``, a trio with further pairs.

        Raises:
            ValueError: says how many there are.
        """
        if self.pairs:
            raise ValueError(f"{user} needs a trio of one pair, got {len(self.pairs)} further ones")

    def tokenize(self, prompt: Any, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Token ids of a prompt for each role; see :func:`~trio.prompts.tokenize`.

        The members of further pairs read those of expert and anti.
        """
        widths: dict[str, int] = {}
        for role, model in self.members.items():
            width = model.get_input_embeddings().weight.shape[0]
            widths[kind_of(role)] = min(width, widths.get(kind_of(role), width))
        return tokenize(prompt, self.tokenizers, self.prompts, widths, add_special_tokens)

    def info(self) -> dict[str, Any]:
        """What was loaded and agreed, as plain values for printing or JSON."""
        return {
            "roles": {role: model_info(model) for role, model in self.members.items()},
            "pairs": [list(pair) for pair in self.pairs],
            "vocab_size": self.vocab_size,
            "vocabulary_notes": list(self.agreement.notes),
            "eos_token_ids": list(self.eos_token_ids),
            "prompts": dict(self.prompts),
        }


def load_trio(
    source: str | Path | None = None,
    *,
    base: str | Path | RemoteBase | None = None,
    expert: str | Path | None = None,
    anti: str | Path | None = None,
    pairs: Sequence[tuple[str | Path, str | Path]] | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] = "auto",
    device: str | torch.device | Mapping[str, str | torch.device] | None = None,
    device_map: Any = None,
    quantize: str | Mapping[str, str | None] | None = None,
    merge_adapter: bool | None = None,
    prompts: Mapping[str, str] | None = None,
    gguf_file: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    runtime: str | Mapping[str, str] | None = None,
) -> Trio:
    """Open a trio and agree its vocabulary.

    Args:
        source: ``"shipped"``, or a directory with a trio.json; or name the roles instead.
        base, expert, anti: a directory (a checkpoint in safetensors or GGUF, or a LoRA adapter in
            PEFT format) or a hub name; they replace the source's. Expert and anti may both be left
            out: the base alone, unsteered. The base may be a :class:`proxytune_kernels.RemoteBase`:
            one behind an API.
        pairs: (expert, anti) of each further pair, which steer as well (docs/pairs.md); what is
            said of the roles expert and anti holds for these. None is what the source says.
        tokenizer: directory or hub name of one for all roles; without it each role's directory has
            its own, and they are compared. That of a remote base is the expert's.
        dtype: of the weights, "auto" for the checkpoint's; or one per role.
        device: or one per role; the CPU if it is not given.
        device_map: what transformers' ``from_pretrained`` takes to spread a model's layers, by
            accelerate: ``"auto"``, or a mapping from module names to devices; or one per role. A
            role has a device or a device map.
        quantize: ``"int8"`` or ``"int4"``, or role -> one of them or None, as
            :func:`proxytune_kernels.quantize` does it; replaces what the source says for a role.
        merge_adapter: False keeps an expert that is a LoRA adapter beside the anti's weights:
            expert and anti then hold the same tensors, and what is said of dtype, device and
            quantisation is the same for both. The adapter must have been trained on the anti. None
            is what the source says, and True if it says nothing.
        prompts: role -> ``"plain"`` or ``"chat"``; replaces the source's, plain if neither says.
        gguf_file: role -> name of the GGUF file in its directory, unpacked to ``dtype``.
        trust_remote_code: run modelling code that comes with a checkpoint.
        runtime: what runs the models, or role -> what runs its: ``"transformers"``, or
            ``"llama.cpp"``, which runs a GGUF file as it is (docs/llama_cpp.md). A role may then be
            the path of the file, without ``gguf_file``. None is what the source says, and
            transformers if it says nothing.

    Raises:
        ValueError: names the argument, what it got and what it wanted.
        LoadError: a model or tokenizer that can't be opened, with the reason.
        RemoteError: a remote base that does not answer, or not as it must.
        VocabularyError: the roles disagree on the meaning of an id; names the first ones.

    Example:
        >>> trio = load_trio("shipped")
        >>> sorted(trio.tokenize("Hello"))
        ['anti', 'base', 'expert']

    Source: Liu et al. 2024, arXiv 2401.08565; docs/loading.md.
    """
    directory, settings = read_source(source)
    references = named_models(settings, directory, base=base, expert=expert, anti=anti)
    if pairs is None:
        said = settings.get("pairs", ())
        pairs = [(resolve(p["expert"], directory), resolve(p["anti"], directory)) for p in said]
    named, added = pair_roles(references, pairs, lambda one, other: str(one) == str(other))
    references |= {role: str(reference) for role, reference in added.items()}
    gguf = {**settings.get("gguf_file", {}), **(gguf_file or {})}
    check_known("gguf_file", gguf)
    quantizations = {**_each("quantize", settings.get("quantize")), **_each("quantize", quantize)}
    runtimes = {**_each("runtime", settings.get("runtime")), **_each("runtime", runtime)}
    for role, reference in references.items():
        if runtimes.get(kind_of(role)) == RUNTIME and Path(reference).is_file():
            references[role], gguf[role] = map(str, (Path(reference).parent, Path(reference).name))
    options = {
        role: load_options(
            kind_of(role),
            dtype=dtype,
            device=device,
            device_map=device_map,
            quantize=quantizations,
            gguf_file={kind_of(role): gguf[role]} if role in gguf else {},
            trust_remote_code=trust_remote_code,
            runtime=runtimes.get(kind_of(role)),
        )
        for role in references
    }
    merge = settings.get("merge_adapter", True) if merge_adapter is None else merge_adapter
    sources = find_sources(references, options)
    models = load_models(sources, options, merge_adapter=merge)
    if tokenizer is None and "tokenizer" in settings:
        tokenizer = resolve(settings["tokenizer"], directory)
    tokenizers = load_tokenizers(sources, options, tokenizer)
    if isinstance(base, RemoteBase):
        models["base"] = base
        # It has the vocabulary of the pair.
        if tokenizers.setdefault("base", tokenizers.get("expert")) is None:
            raise ValueError("tokenizer must be given for a remote base alone, got None")
    styles = {**settings.get("prompts", {}), **(prompts or {})}
    three = {role: model for role, model in models.items() if role in ROLES}
    further = [(models[expert], models[anti]) for expert, anti in named]
    return Trio.from_models(**three, tokenizer=tokenizers, prompts=styles, pairs=further)


def _each(name: str, value: Any) -> dict[str, Any]:
    """Role -> what an argument says of it, for the roles of which it says something."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        check_known(name, value)
        return dict(value)
    return dict.fromkeys(ROLES, value)


def _prompt_styles(prompts: Mapping[str, str] | None, roles: tuple[str, ...]) -> dict[str, str]:
    given = prompts or {}
    check_known("prompts", given)
    for role, style in given.items():
        if style not in PROMPT_STYLES:
            raise ValueError(
                f"prompts of {role} must be one of {', '.join(PROMPT_STYLES)}, got {style!r}"
            )
    return {role: given.get(role, "plain") for role in roles}


def eos_token_ids(generation_config: Any, tokenizer: Any, agreement: Agreement) -> tuple[int, ...]:
    """Tokens that end a request: those of the base's generation_config (or None) and tokenizer.

    Raises:
        LoadError: one is no token id.
        VocabularyError: there are some, and no role can produce any of them.
    """
    named = generation_config.eos_token_id if generation_config is not None else None
    listed = list(named) if isinstance(named, (list, tuple)) else [] if named is None else [named]
    wrong = [i for i in listed if not isinstance(i, int) or isinstance(i, bool) or i < 0]
    if wrong:
        raise LoadError(
            "eos_token_id in the generation config of base must be token ids, of 0 and more, got "
            f"{wrong[0]!r:.80}"
        )
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


def model_info(model: Any) -> dict[str, Any]:
    """Describe a causal LM.

    Returns:
        ``model`` (its class), ``name``, ``parameters``, ``dtype`` (of the activations),
        ``device`` (several, comma-separated, where they are several), ``logits`` (the output
        layer's width), ``quantized`` (``"int8"``, ``"int4"`` or None), ``products`` (see
        :func:`~proxytune_kernels.trio.packed.products`), ``adapter_parameters`` (those of LoRA
        layers that stand beside the weights), ``bytes`` (of all weights, packed ones as they are
        packed).
    """
    if isinstance(model, LlamaModel):
        return model.info()
    return {
        **(model.info() if isinstance(model, RemoteModel) else {}),
        "model": type(model).__name__,
        "name": model.config._name_or_path,
        "parameters": weight_count(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": ", ".join(_places(model)),
        "logits": model.get_output_embeddings().weight.shape[0],
        "quantized": quantization_of(model),
        "products": products(model),
        "adapter_parameters": sum(p.numel() for p in adapter_parameters(model)),
        "bytes": weight_bytes(model),
    }


def _places(model: Any) -> list[str]:
    """The devices that a model's weights are on, and where those lie that are brought there."""
    devices = dict.fromkeys(str(p.device) for p in model.parameters() if p.device.type != "meta")
    if any(p.device.type == "meta" for p in model.parameters()):
        # Among devices that compute, the CPU only keeps weights for them, as the disk does.
        kept = ("disk",) if list(devices) == ["cpu"] else ("cpu", "disk")
        # Accelerate's cpu_offload and disk_offload leave no map.
        mapped = getattr(model, "hf_device_map", {}).values()
        places = [f"offloaded to {place}" for place in mapped if place in kept]
        devices |= dict.fromkeys(places or ["offloaded"])
    return list(devices)
