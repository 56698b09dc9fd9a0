"""Reads trio.json, and opens the models of a trio: adapters merged or apart, placed, quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from proxytune_kernels.trio import adapters
from proxytune_kernels.trio.checkpoints import (
    LoadOptions,
    check_device_map,
    check_dtype,
    load_tokenizer,
    open_checkpoint,
    resolve,
)
from proxytune_kernels.trio.files import LoadError, file_in, find, read_object
from proxytune_kernels.trio.llama_cpp import RUNTIME, LlamaModel
from proxytune_kernels.trio.quantization import QuantizationError, check_quantization, finish
from proxytune_kernels.trio.remote import RemoteBase
from proxytune_kernels.trio.roles import PAIR, ROLES, check_known, check_roles, per_role

TRIO_FILE = "trio.json"
TRIO_FORMAT = 1
# Key of trio.json -> what it wants.
_KEYS = {
    "format": "number",
    **dict.fromkeys((*ROLES, "tokenizer"), "text"),
    "merge_adapter": "flag",
    **dict.fromkeys(("gguf_file", "prompts"), "each"),
    **dict.fromkeys(("quantize", "runtime"), "either"),
    "pairs": "pairs",
}
_WORDS = {
    "number": "an integer",
    "text": "a string",
    "flag": "true or false",
    "each": "an object of a string for each role",
    "either": "a string, or an object of one for each role",
    "pairs": "a list of objects of expert and anti, each a string",
}
RUNTIMES = ("transformers", RUNTIME)
# The expert beside the anti's weights is where and what these are.
_SHARED = ("dtype", "device", "device_map", "quantize")


def read_source(source: str | Path | None) -> tuple[Path | None, dict[str, Any]]:
    """A trio's directory and what its trio.json says; neither for no source.

    Args:
        source: ``"shipped"``, or a directory with a trio.json.

    Raises:
        ValueError: there is no such file.
        LoadError: it says what is not known, or a value is of another type than it must be.
    """
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
    settings = read_object("trio", file_in("trio", directory, TRIO_FILE))
    if settings.get("format") != TRIO_FORMAT:
        raise LoadError(f"{path} must be an object of format {TRIO_FORMAT}")
    for name, value in settings.items():
        if name not in _KEYS:
            raise LoadError(
                f"{path} must have keys among {', '.join(sorted(_KEYS))}, got {name!r:.80}"
            )
        wanted = _KEYS[name]
        if not _is(value, wanted):
            raise LoadError(f"{name} in {path} must be {_WORDS[wanted]}, got {value!r:.80}")
    return directory, settings


def _is(value: Any, kind: str) -> bool:
    """Whether a value of trio.json is of the kind that its key wants."""
    if kind == "each" and isinstance(value, dict):
        return all(item is None or isinstance(item, str) for item in value.values())
    if kind == "pairs":
        return isinstance(value, list) and all(
            isinstance(pair, dict)
            and set(pair) == set(PAIR)
            and all(isinstance(name, str) for name in pair.values())
            for pair in value
        )
    if kind == "either":
        return isinstance(value, str) or _is(value, "each")
    return isinstance(value, {"number": int, "text": str, "flag": bool}.get(kind, ()))


def named_models(
    settings: Mapping[str, Any], directory: Path | None, **named: str | Path | RemoteBase | None
) -> dict[str, str]:
    """Role -> directory or hub name of its model, in the order base, expert, anti.

    Args:
        settings: what trio.json says.
        directory: it is in this one; paths are relative to it.
        named: role -> what replaces trio.json's, or None. A remote base is not opened here, and
            left out.

    Raises:
        ValueError: no base, or one of expert and anti without the other.
    """
    given = {role: named[role] for role in ROLES if named.get(role) is not None}
    references = {
        role: given[role] if role in given else resolve(settings[role], directory)
        for role in ROLES
        if role in given or role in settings
    }
    check_roles(references)
    return {role: str(r) for role, r in references.items() if not isinstance(r, RemoteBase)}


def load_options(
    role: str,
    *,
    dtype: Any,
    device: Any = None,
    device_map: Any,
    quantize: Mapping[str, str | None],
    gguf_file: Mapping[str, str] | None = None,
    trust_remote_code: bool,
    runtime: str | None = None,
) -> LoadOptions:
    """What the arguments of ``load_trio`` say for one role.

    Raises:
        ValueError: names the argument and the role, what it got and what it wanted.
    """
    if quantize.get(role) is not None:
        check_quantization(f"quantize of {role}", quantize[role])
    runtime = RUNTIMES[0] if runtime is None else runtime
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime of {role} must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    dtype = check_dtype(role, per_role("dtype", dtype, role))
    device, device_map = _placement(role, device, device_map)
    if runtime == RUNTIME:
        _check_gguf_alone(role, dtype, device, device_map, quantize, gguf_file)
    return LoadOptions(
        dtype=dtype,
        device=device,
        device_map=device_map,
        quantize=quantize.get(role),
        gguf_file=(gguf_file or {}).get(role),
        trust_remote_code=trust_remote_code,
        runtime=runtime,
    )


def _check_gguf_alone(
    role: str,
    dtype: Any,
    device: Any,
    device_map: Any,
    quantize: Mapping[str, str | None],
    gguf_file: Mapping[str, str] | None,
) -> None:
    """Refuse what says how weights are held where llama.cpp holds them as they are in the file."""
    for name, value, wanted in (
        ("dtype", dtype, "auto"),
        ("device", device, "cpu"),
        ("device_map", device_map, None),
        ("quantize", quantize.get(role), None),
    ):
        if str(value) != str(wanted):
            raise ValueError(
                f"{name} of {role} must be {wanted!r} with runtime {RUNTIME!r}, got {value!r}"
            )
    if not (gguf_file or {}).get(role):
        raise ValueError(f"gguf_file of {role} must name a file with runtime {RUNTIME!r}, got none")


def _placement(role: str, device: Any, device_map: Any) -> tuple[Any, Any]:
    """A role's device, or its device map: one of them is None."""
    each = isinstance(device_map, Mapping) and bool(set(device_map) & set(ROLES))
    if each:
        check_known("device_map", device_map)
    spread = device_map.get(role) if each else device_map
    if spread is None:
        return "cpu" if device is None else per_role("device", device, role), None
    if isinstance(device, Mapping):
        check_known("device", device)
        own = device.get(role)
    else:
        # One device for all roles is for those that the device map does not name.
        own = None if each else device
    if own is not None:
        raise ValueError(
            f"device of {role} must not be given with a device_map of {role}, got {own!r} and "
            f"{spread!r}"
        )
    return None, check_device_map(role, spread)


def find_sources(
    references: Mapping[str, str], options: Mapping[str, LoadOptions]
) -> dict[str, adapters.Source]:
    """Role -> what it is opened from, for a directory or hub name of each; each is found once.

    Raises:
        LoadError: one is neither.
    """
    return {
        role: adapters.Source(
            role, find(role, reference, *options[role].files()), tuple(options[role].code())
        )
        for role, reference in references.items()
    }


def load_models(
    sources: Mapping[str, adapters.Source],
    options: Mapping[str, LoadOptions],
    *,
    merge_adapter: bool,
) -> dict[str, Any]:
    """The models of a trio in evaluation mode.

    Args:
        sources: role -> what it is opened from. A LoRA adapter (PEFT) stands for the model that it
            names, a path relative to its own or a hub name, with the adapter merged into its
            weights.
        options: role -> how its model is opened.
        merge_adapter: False keeps the expert's adapter apart, over the anti's weights: expert and
            anti are then two models that hold the same tensors.

    Returns:
        role -> transformers causal LM, in the order of ``sources``.

    Raises:
        LoadError: names the role, what was asked for and the reason.
    """
    if merge_adapter:
        return {role: _load(source, options[role]) for role, source in sources.items()}
    expert = sources.get("expert")
    for role in PAIR:
        if role in options and options[role].runtime == RUNTIME:
            raise LoadError(
                f"merge_adapter must be True with runtime {RUNTIME!r} of {role}, got False"
            )
    if expert is None or expert.adapted is None:
        raise LoadError(
            f"merge_adapter=False needs expert to be a directory with a LoRA adapter, "
            f"got {None if expert is None else expert.own.name!r}"
        )
    for name in _SHARED:
        ours, theirs = (getattr(options[role], name) for role in PAIR)
        if ours != theirs:
            raise LoadError(
                f"{name} of expert must be that of anti, whose weights it shares with "
                f"merge_adapter=False, got {ours!r} and {theirs!r}"
            )
    loaded = {r: _load(source, options[r]) for r, source in sources.items() if r not in PAIR}
    loaded |= _load_pair(expert, sources["anti"], options["anti"])
    return {role: loaded[role] for role in sources}


def load_tokenizers(
    sources: Mapping[str, adapters.Source],
    options: Mapping[str, LoadOptions],
    shared: str | Path | None,
) -> dict[str, Any]:
    """Role -> tokenizer: its own, or the one of the directory or hub name ``shared``.

    Raises:
        LoadError: one can't be opened.
    """
    trusted = any(each.trust_remote_code for each in options.values())
    if shared is not None:
        code = next((each.code() for each in options.values()), ())
        place = find("tokenizer", shared, *code)
        one = load_tokenizer("tokenizer", place, trust_remote_code=trusted)
        return dict.fromkeys(("base", *sources), one)
    return {
        role: load_tokenizer(
            f"tokenizer of {role}",
            source.tokenizer,
            gguf_file=options[role].gguf_file,
            trust_remote_code=trusted,
        )
        for role, source in sources.items()
    }


def _load(source: adapters.Source, options: LoadOptions) -> Any:
    if options.runtime == RUNTIME:
        assert options.gguf_file is not None
        return LlamaModel(source.role, source.own, options.gguf_file)
    on_cpu = options.device is not None and torch.device(options.device).type == "cpu"
    packed = options.quantize if on_cpu else None
    return _place(source.role, _open(source, options, packed), options)


def _load_pair(
    expert: adapters.Source, source: adapters.Source, options: LoadOptions
) -> dict[str, Any]:
    anti = _open(source, options)
    _check_same_checkpoint(expert, anti, source.own.name, options)
    anti = _place("anti", anti, options)
    return {"expert": adapters.beside("expert", anti, expert.own.directory), "anti": anti}


def _open(source: adapters.Source, options: LoadOptions, packed: str | None = None) -> Any:
    if source.adapted is None:
        return open_checkpoint(source.role, source.own, options, packed=packed)
    model = open_checkpoint(source.role, source.plain, replace(options, gguf_file=None))
    return adapters.merged(source.role, model, source.own.directory)


def _place(role: str, model: Any, options: LoadOptions) -> Any:
    if options.quantize is not None:
        try:
            finish(model, options.quantize, device=options.device)
        except QuantizationError as error:
            raise LoadError(f"quantize of {role}: {error}") from error
    elif options.device is not None:
        model.to(options.device)
    return model.eval()


def _check_same_checkpoint(
    expert: adapters.Source, anti: Any, reference: str, options: LoadOptions
) -> None:
    """Check that the expert's adapter was trained on the anti, by its name or by its weights."""
    named = str(expert.adapted)
    if named == reference or (
        Path(named).exists() and Path(reference).exists() and Path(named).samefile(reference)
    ):
        return
    wanted = f"anti must be the model that expert's adapter names, {named!r}, or have its weights"
    plain = replace(options, device="cpu", device_map=None, gguf_file=None)
    try:
        other = open_checkpoint("expert", expert.plain, plain)
    except LoadError as error:
        raise LoadError(f"{wanted}, got {reference!r}; to compare them, {error}") from error
    differing = adapters.first_difference(anti, other)
    if differing is not None:
        raise LoadError(f"{wanted}, got {reference!r} with another {differing}")
