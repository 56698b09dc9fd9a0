"""Opens a model or a tokenizer from a directory or hub name, in safetensors or GGUF."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from proxytune_kernels.trio.files import (
    LoadError,
    Place,
    check_field,
    check_gguf,
    file_in,
    read_object,
    reason,
    weight_files,
)
from proxytune_kernels.trio.quantization import packed_as_loaded

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
# What accelerate spreads over all devices by itself.
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja")
# What transformers does to the tensors of a GGUF file, of each by itself.
_ONE_BY_ONE = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor")
# Ends of the names of classes whose checkpoints lack the output layer of a language model.
_OTHER_TASKS = tuple(
    f"For{task}"
    for task in (
        *("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"),
        *("MaskedLM", "RewardModel"),
    )
)


@dataclass(frozen=True)
class LoadOptions:
    """How one role's model is opened.

    Args:
        dtype: of the weights; "auto" is the checkpoint's.
        device: where the weights go; None where ``device_map`` says.
        device_map: what transformers' ``from_pretrained`` takes, or None.
        quantize: ``"int8"``, ``"int4"`` or None.
        gguf_file: name of a GGUF file in the directory, unpacked to ``dtype``.
        trust_remote_code: run modelling code that comes with the checkpoint.
        runtime: what runs the model: ``"transformers"`` or ``"llama.cpp"``.
    """

    dtype: str | torch.dtype = "auto"
    device: str | torch.device | None = "cpu"
    device_map: Any = None
    quantize: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    runtime: str = "transformers"

    def files(self) -> list[str]:
        """Patterns of what a hub name must have beside the files of every checkpoint."""
        return [*([] if self.gguf_file is None else [self.gguf_file]), *self.code()]

    def code(self) -> list[str]:
        """Those of them that a model has which an adapter names."""
        return ["*.py"] if self.trust_remote_code else []


def resolve(reference: str | Path, directory: Path | None) -> str:
    """A path inside ``directory`` if there is one of that name, else the reference as it is."""
    if directory is not None and (directory / reference).exists():
        return str(directory / reference)
    return str(reference)


def check_dtype(role: str, dtype: Any) -> str | torch.dtype:
    """Check a dtype: "auto", a floating-point dtype of torch, or its name."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype of {role} must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return name if name == "auto" else getattr(torch, name)


def check_device_map(role: str, device_map: Any) -> Any:
    """Check a device map: a way to spread the layers, a device, or a mapping of modules to them."""
    if find_spec("accelerate") is None:
        raise LoadError(f"device_map of {role} needs accelerate: pip install accelerate")
    if isinstance(device_map, str) and device_map in _SPREADS:
        return device_map
    mapped = isinstance(device_map, Mapping)
    for place in device_map.values() if mapped else [device_map]:
        if mapped and place == "disk":
            continue
        reason = device_unusable(place)
        if reason is not None:
            raise ValueError(
                f"device_map of {role} must be one of {', '.join(_SPREADS)}, a device, or a "
                f"mapping from module names to devices or 'disk', got {device_map!r}: {reason}"
            )
    return device_map


def device_unusable(device: Any) -> str | None:
    """Why torch can't use a device here; None where it can."""
    try:
        torch.empty(0, device=device)
    # torch built without CUDA answers with an AssertionError.
    except (RuntimeError, TypeError, AssertionError) as error:
        return str(error).split("\n")[0]
    return None


def open_checkpoint(
    role: str, place: Place, options: LoadOptions, *, packed: str | None = None
) -> Any:
    """A transformers causal LM as its checkpoint has it, placed by its device map if there is one.

    Args:
        role: base, expert or anti, for messages.
        place: where it lies.
        options: of these, all but ``device`` and ``quantize``.
        packed: quantise what :func:`~proxytune_kernels.trio.quantization.packed_as_loaded` does.

    Raises:
        LoadError: names the role, the checkpoint and the reason.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    directory = place.directory
    if options.gguf_file is None:
        read_config(role, directory)
        weight_files(role, directory)
    else:
        check_gguf(role, file_in(role, directory, options.gguf_file))
    named: dict[str, Any] = {
        "output_loading_info": True,
        "dtype": options.dtype,
        "trust_remote_code": options.trust_remote_code,
    }
    if options.device_map is not None:
        named["device_map"] = options.device_map
    if options.gguf_file is None:
        # Pickled weights run code when they are opened.
        named["use_safetensors"] = True
    else:
        named |= {
            "gguf_file": options.gguf_file,
            "quantization_config": GgufConfig(dequantize=True),
        }
    placed = " that its device_map can place" if options.device_map is not None else ""
    with opening(role, f"a causal LM{placed}", place.name):
        loaded: Any = (
            AutoModelForCausalLM.from_pretrained(directory, **named)
            if packed is None
            else _open_packed(directory, named, packed)
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise LoadError(
            f"{role} must have all weights of {type(model).__name__}, got {place.name!r} without "
            f"{missing[0]} ({len(missing)} in all)"
        )
    model.config._name_or_path = place.name
    return model


def _open_packed(directory: Path, named: dict[str, Any], quantization: str) -> Any:
    """As ``from_pretrained``, linear layers quantised one by one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    gguf_file = named.get("gguf_file")
    config: Any = AutoConfig.from_pretrained(
        directory, gguf_file=gguf_file, trust_remote_code=named["trust_remote_code"]
    )
    width = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    with packed_as_loaded(quantization, width):
        if gguf_file is not None:
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config)
            tensors = _gguf_tensors(directory / gguf_file, empty)
            if tensors is not None:
                dtype = torch.float32 if named["dtype"] == "auto" else named["dtype"]
                return type(empty).from_pretrained(
                    None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
                )
        return AutoModelForCausalLM.from_pretrained(directory, **named)


class _GgufTensor:
    """A tensor of a GGUF file, unpacked whenever it is asked for."""

    dtype = torch.float32

    def __init__(self, tensor: Any, processor: Any) -> None:
        self._tensor, self._processor = tensor, processor

    def __getitem__(self, index: Any) -> torch.Tensor:
        import gguf

        values = gguf.dequantize(self._tensor.data, self._tensor.tensor_type)
        values = self._processor.process(weights=values, name=self._tensor.name).weights
        # A view of the file cannot be written to.
        return torch.tensor(values)[index]


def _gguf_tensors(path: Path, model: Any) -> dict[str, _GgufTensor] | None:
    """A model's weights by their names; None where transformers must put them together.

    transformers unpacks most kinds of files as a whole, before a model gets the first tensor.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as unpacking

    reader: Any = gguf.GGUFReader(path)
    kind = reader.fields["general.architecture"].contents()
    processor = unpacking.TENSOR_PROCESSORS.get(kind, unpacking.TensorProcessor)
    if processor.__name__ not in _ONE_BY_ONE or kind not in unpacking.GGUF_SUPPORTED_ARCHITECTURES:
        return None
    made: Any = processor(config=model.config.to_dict())
    names = unpacking.get_gguf_hf_weights_map(model, made)
    return {names[t.name]: _GgufTensor(t, made) for t in reader.tensors if t.name in names}


def read_config(role: str, directory: Path) -> dict[str, Any]:
    """What the config.json of a causal LM holds.

    Raises:
        LoadError: it or generation_config.json is no object, or it is of a model for another task.
    """
    path = file_in(role, directory, "config.json")
    config = read_object(role, path)
    given = config.get("architectures")
    names = [] if given is None else given
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
    check_field(role, path, config, "architectures", "a list of names", fits)
    check_field(
        *(role, path, config, "architectures", "those of a causal LM"),
        not any(name.endswith(_OTHER_TASKS) for name in names),
    )
    generation = directory / "generation_config.json"
    if generation.is_file():
        read_object(role, file_in(role, directory, generation.name))
    return config


def text_config(
    role: str, place: Place, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The configuration of a checkpoint's language model, with its ``vocab_size``.

    Raises:
        LoadError: it is not one of a causal LM.
    """
    from transformers import AutoConfig

    if gguf_file is None:
        read_config(role, place.directory)
    named = {} if gguf_file is None else {"gguf_file": gguf_file}
    with opening(role, "a causal LM", place.name):
        config: Any = AutoConfig.from_pretrained(
            place.directory, trust_remote_code=trust_remote_code, **named
        )
        return config.get_text_config(decoder=True)


@contextmanager
def opening(name: str, what: str, reference: str) -> Iterator[None]:
    """Turn what transformers raises into one sentence.

    A file from outside can make it raise anything, from a TypeError to a RecursionError, so all
    kinds are meant, except that there is no memory.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise LoadError(
            f"{name} must be {what} (a directory or hub name), got {reference!r}: {reason(error)}"
        ) from error


def load_tokenizer(
    name: str, place: Place, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A tokenizer from where it lies; ``name`` says whose in messages."""
    from transformers import AutoTokenizer

    directory = place.directory
    named = {} if gguf_file is None else {"gguf_file": file_in(name, directory, gguf_file).name}
    for file in directory.iterdir():
        if file.suffix in _TOKENIZER_SUFFIXES:
            file_in(name, directory, file.name)
    settings = directory / "tokenizer_config.json"
    if settings.is_file():
        values = read_object(name, settings)
        files, longest = values.get("fast_tokenizer_files"), values.get("model_max_length")
        for file_name in files if isinstance(files, list) else ():
            file_in(name, directory, file_name)
        fits = longest is None or isinstance(longest, (int, float))
        check_field(name, settings, values, "model_max_length", "a number", fits)
    with opening(name, "a tokenizer", place.name):
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, **named
        )
    template = getattr(tokenizer, "chat_template", None)
    each = list(template.values()) if isinstance(template, dict) else [template]
    if template is not None and not all(isinstance(text, str) for text in each):
        raise LoadError(
            f"chat_template of {name} must be text, or an object of texts, got {template!r:.80} in "
            f"{place.name!r}"
        )
    tokenizer.name_or_path = place.name
    return tokenizer
