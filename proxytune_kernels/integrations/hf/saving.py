"""A trio's directory in transformers' form: names of three checkpoints, and what reads them.

``config.json`` names the checkpoints, ``generation_config.json`` and the tokenizer's files stand
beside it. A checkpoint is named only if it holds the model's weights, tensor for tensor: a model
may have been trained or merged since it was opened. Other models are written into directories of
their own, so that what is saved is what is opened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from proxytune_kernels.integrations.hf.configuration import ProxyTunedConfig
from proxytune_kernels.integrations.hf.inputs import refuse
from proxytune_kernels.trio.adapters import adapter_parameters
from proxytune_kernels.trio.checkpoints import load_tokenizer, resolve
from proxytune_kernels.trio.files import find
from proxytune_kernels.trio.loading import find_sources, load_models, load_options
from proxytune_kernels.trio.quantization import quantization_of
from proxytune_kernels.trio.roles import ROLES, check_known

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class SavedByName:
    """Saving and loading of a model of three models, as a manifest."""

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        config: ProxyTunedConfig | None = None,
        alpha: float | None = None,
        dtype: Any = "auto",
        attn_implementation: Any = None,
        device_map: Any = None,
        quantize: Mapping[str, str | None] | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Open what :meth:`save_pretrained` wrote.

        Args:
            directory: a local one.
            config: what its config.json says, if that has been read.
            alpha: replaces the saved one.
            dtype, device_map, quantize, trust_remote_code: as in
                :func:`proxytune_kernels.load_trio`, for all roles or one per role.
            attn_implementation: of all three models; theirs by default.
            kwargs: other arguments of transformers, left at what they are by default.

        Raises:
            ValueError, LoadError: names what is missing or can't be done.
        """
        refuse("from_pretrained", kwargs)
        if not Path(directory).is_dir():
            raise ValueError(
                f"from_pretrained: directory must be a local one, got {str(directory)!r} "
                "(huggingface_hub.snapshot_download fetches one)"
            )
        config = config or ProxyTunedConfig.from_pretrained(directory)
        if not config.checkpoints:
            raise ValueError(f"{directory} must name its checkpoints in config.json, got none")
        models, tokenizers, generation_config = _open(
            Path(directory),
            config,
            dtype=dtype or "auto",
            device_map=device_map,
            quantize=quantize,
            trust_remote_code=bool(trust_remote_code),
        )
        strength = config.alpha if alpha is None else alpha
        made_of: Any = cls
        model = made_of.from_models(
            **models,
            tokenizer=tokenizers or None,
            alpha=strength,
            prompts=config.prompts if tokenizers else None,
        )
        model.name_or_path = model.config.name_or_path = str(directory)
        if generation_config is not None:
            model.generation_config = generation_config
        # transformers' Auto classes put it into the configuration.
        attn_implementation = attn_implementation or config._attn_implementation
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        return model

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        checkpoints: Mapping[str, str] | None = None,
        write: Collection[str] = (),
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write a manifest that names the three checkpoints, and weights that no checkpoint holds.

        A model that was opened from a checkpoint, and whose weights are still that one's, is named;
        that is found out by reading the checkpoint. Any other is written beside the manifest.

        Args:
            directory: made if it is not there.
            checkpoints: role -> directory or hub name to write into the manifest for it, unread.
                A LoRA adapter's directory for an expert that stands beside the anti's weights; the
                plain checkpoint of a quantised model.
            write: roles whose weights are written, wherever they come from; ``ROLES`` for a
                directory that can be moved to another machine.
            is_main_process: False writes nothing.
            kwargs: other arguments of transformers, left at what they are by default. With
                ``state_dict``, as ``Trainer`` has it, the weights that are written are once more in
                one model.safetensors under this model's names, which is what ``Trainer`` resumes.

        Raises:
            ValueError: a model that is not in a checkpoint and can't be written; says why.
        """
        refuse("save_pretrained", kwargs)
        if is_main_process:
            written = _save(self, Path(directory), checkpoints or {}, write)
            if "state_dict" in kwargs:
                save_model(torch.nn.ModuleDict(written), str(Path(directory, _SINGLE)))


def _save(
    model: Any, directory: Path, named: Mapping[str, str], write: Collection[str]
) -> dict[str, Any]:
    """See :meth:`SavedByName.save_pretrained`; returns the models whose weights it wrote."""
    check_known("checkpoints", named)
    check_known("write", dict.fromkeys(write))
    directory.mkdir(parents=True, exist_ok=True)
    models = model.models
    places: dict[str, str] = {}
    written = set[str]()
    for role in ROLES:
        twin = next((r for r in places if models[r] is models[role]), None)
        if role in named:
            places[role] = _portable(named[role], directory)
        elif twin is not None:
            places[role] = places[twin]
        else:
            found = None if role in write else _checkpoint_of(models[role])
            places[role] = found or _write(role, models[role], directory)
            written |= set() if found else {role}
    config = model.config
    config.checkpoints = places
    config.architectures = [type(model).__name__]
    config.merge_adapter = not adapter_parameters(models["expert"])
    kinds = {role: quantization_of(m) for role, m in models.items()}
    config.quantize = {role: kind for role, kind in kinds.items() if kind is not None} or None
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    for name, tokenizer in _tokenizers_to_write(model.trio):
        tokenizer.save_pretrained(directory / name)
    return {role: models[role] for role in ROLES if role in written}


def _portable(reference: str, directory: Path) -> str:
    """A reference that holds wherever it is read: relative within the directory, else absolute."""
    if (directory / reference).exists() or not Path(reference).exists():
        return reference
    path = Path(reference).resolve()
    inside = path.is_relative_to(directory.resolve())
    return str(path.relative_to(directory.resolve()) if inside else path)


def _checkpoint_of(model: Any) -> str | None:
    """The checkpoint that a model says it comes from, if its weights are that one's."""
    name = model.config._name_or_path
    if not name or quantization_of(model) is not None or adapter_parameters(model):
        return None
    files = _weight_files(name)
    if not files:
        return None
    left = dict(model.state_dict())
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for key, stored in _stored(files):
        mine = left.pop(key, None)
        if mine is None or mine.device.type == "meta" or mine.shape != stored.shape:
            return None
        # In the dtype that it was opened in.
        if not torch.equal(mine.cpu(), stored.to(mine.dtype)):
            return None
    # A weight that another one stands for need not be stored.
    if any(key not in tied for key in left):
        return None
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def _weight_files(name: str) -> list[str]:
    """A checkpoint's safetensors files, without fetching any; none if they aren't here."""
    single = _local_file(name, _SINGLE)
    if single is not None:
        return [single]
    index = _local_file(name, _INDEX)
    return [] if index is None else sorted(map(str, Path(index).parent.glob("*.safetensors")))


def _local_file(name: str, file: str) -> str | None:
    return cached_file(
        name,
        file,
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _stored(files: list[str]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                yield key, opened.get_tensor(key)


def _write(role: str, model: Any, directory: Path) -> str:
    kind = quantization_of(model)
    apart = "a LoRA adapter beside its weights" if adapter_parameters(model) else None
    reason = apart or (kind and f"{kind} weights")
    if reason:
        raise ValueError(
            f"checkpoints must name where {role} was opened from, since it has {reason}, which are "
            f"made when it is opened: save_pretrained(..., checkpoints={{{role!r}: ...}})"
        )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError(f"checkpoints must name {role}, whose weights are offloaded")
    model.save_pretrained(directory / role)
    return role


def _tokenizers_to_write(trio: Any) -> Iterator[tuple[str, Any]]:
    """Directory within the manifest's -> tokenizer: the base's, and those that are others."""
    if trio is None:
        return
    base = trio.tokenizers["base"]
    yield ".", base
    for role, tokenizer in trio.tokenizers.items():
        if tokenizer is not base and _parts(tokenizer) != _parts(base):
            yield f"{role}_tokenizer", tokenizer


def _parts(t: Any) -> tuple[Any, ...]:
    """What tells a tokenizer from another."""
    return type(t), t.get_vocab(), t.chat_template, t.special_tokens_map


def _open(
    directory: Path,
    config: Any,
    *,
    dtype: Any,
    device_map: Any,
    quantize: Mapping[str, str | None] | None,
    trust_remote_code: bool,
) -> tuple[dict[str, Any], dict[str, Any], GenerationConfig | None]:
    """Open what a manifest names.

    Returns:
        Role -> model; role -> tokenizer, empty if none was saved; the generation config, if any.
    """
    references = {r: resolve(config.checkpoints[r], directory) for r in ROLES}
    kinds = {**(config.quantize or {}), **(quantize or {})}
    said = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
    options = {role: load_options(role, quantize=kinds, **said) for role in ROLES}
    sources = find_sources(references, options)
    merges = bool(config.merge_adapter) or sources["expert"].adapted is None
    models = load_models(sources, options, merge_adapter=merges)
    tokenizers = {}
    if (directory / "tokenizer_config.json").is_file():
        for role in ROLES:
            own = directory / f"{role}_tokenizer"
            place = find(f"tokenizer of {role}", own if own.is_dir() else directory)
            tokenizers[role] = load_tokenizer(
                f"tokenizer of {role}", place, trust_remote_code=trust_remote_code
            )
    saved = (directory / "generation_config.json").is_file()
    return models, tokenizers, GenerationConfig.from_pretrained(directory) if saved else None
