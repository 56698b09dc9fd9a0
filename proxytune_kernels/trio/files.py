"""Files from outside: where a checkpoint lies, what its files are called, and what they hold.

Nothing here trusts a name or a byte of a checkpoint. A name that a file gives must be that of a
file beside it, a link must not lead out of the directory, JSON has a size and a depth, and weights
are safetensors or GGUF by what they hold, not by what they are called.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# The largest tokenizer.json that is known has 40 MB, the largest index 10 MB.
_JSON_BYTES = 1 << 28


class LoadError(ValueError):
    """A model, a tokenizer or one of their files cannot be opened."""


def reason(error: BaseException) -> str:
    """What an exception says, on one line of at most 500 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]}..."


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies.

    Args:
        name: as it was named, a directory or hub name: what messages and ``info()`` say.
        directory: its files are here.
    """

    name: str
    directory: Path


def find(role: str, reference: str | Path, *more: str) -> Place:
    """The directory of a checkpoint: the one that is named, or the cached snapshot of a hub name.

    Args:
        role: for messages.
        reference: a directory or hub name. What a hub name lacks in the cache is fetched.
        more: patterns of files to fetch beside those of every checkpoint.

    Raises:
        LoadError: there is neither.
    """
    if Path(reference).is_dir():
        return Place(str(reference), Path(reference))
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(str(reference), allow_patterns=[*_HUB_FILES, *more])
        return Place(str(reference), Path(directory))
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{role} must be a directory or hub name, got {str(reference)!r}: {reason(error)}"
        ) from error


def file_in(role: str, directory: Path, name: Any) -> Path:
    """The path of a file that something from outside names.

    Args:
        role: for messages.
        directory: the file must be in it. In the hub's cache, whose snapshots are links, the blobs
            beside the snapshots count as the directory.
        name: the file's name, without any directory.

    Raises:
        LoadError: the name has a directory in it, or leads out of the directory by a link.
    """
    plain = isinstance(name, str) and name.isprintable() and Path(name).name == name
    if not plain or "\\" in name or name in ("", ".."):
        raise LoadError(
            f"{role} must name files by their plain names, got {name!r:.200} in {directory}"
        )
    home = directory.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    path = directory / name
    if not any(path.resolve().is_relative_to(place) for place in homes):
        raise LoadError(
            f"{role} must have its files in {directory}, got a link out of it, {name!r}: put the "
            "file itself there"
        )
    return path


def read_object(role: str, path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        LoadError: it can't be read, is larger than 256 MB, or is not one object in JSON.
    """
    wanted = f"{path.name} of {role} must hold an object in JSON"
    try:
        size = path.stat().st_size
        if size > _JSON_BYTES:
            raise LoadError(f"{wanted} of at most {_JSON_BYTES} bytes, got {size} in {path}")
        value = json.loads(path.read_bytes())
    # An integer of thousands of digits is a ValueError, thousands of brackets are the other.
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{wanted}, got {path}: {reason(error)}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{wanted}, got {type(value).__name__} in {path}")
    return value


def check_field(
    role: str, path: Path, values: dict[str, Any], name: str, wanted: str, fits: bool
) -> None:
    """Check one value of a JSON file; ``wanted`` says in words what it must be."""
    if not fits:
        raise LoadError(
            f"{name} in {path.name} of {role} must be {wanted}, got {values.get(name)!r:.80} "
            f"in {path}"
        )


def weight_files(role: str, directory: Path) -> list[str]:
    """Names of a checkpoint's safetensors files, with their index where there is one.

    Raises:
        LoadError: there are none, one that the index names is missing or not in the directory, or
            one does not hold safetensors.
    """
    names: list[Any] = [WEIGHTS_FILE]
    index: list[str] = []
    if not (directory / WEIGHTS_FILE).is_file() and (directory / INDEX_FILE).is_file():
        index = [INDEX_FILE]
        path = file_in(role, directory, INDEX_FILE)
        values = read_object(role, path)
        shards = values.get("weight_map")
        named = list(shards.values()) if isinstance(shards, dict) else []
        fits = bool(named) and all(isinstance(name, str) for name in named)
        check_field(role, path, values, "weight_map", "an object of names of files", fits)
        names = sorted(set(named))
    for name in names:
        path = file_in(role, directory, name)
        if not path.is_file():
            raise LoadError(
                f"{role} must have its weights in safetensors (one file, or {INDEX_FILE} and "
                f"what it names), got {str(directory)!r} without {name}"
            )
        check_safetensors(role, path)
    return [*index, *names]


def check_safetensors(role: str, path: Path) -> None:
    """Check that a file is named and holds safetensors, whole.

    Raises:
        LoadError: another format, a header that doesn't fit the file, or a truncated file.
    """
    from safetensors import SafetensorError, safe_open

    wanted = f"{role} must have its weights in safetensors"
    if path.suffix != ".safetensors":
        # transformers and PEFT choose how to open a file by this.
        raise LoadError(f"{wanted}, got {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{wanted}, got {str(path)!r}: {reason(error)}") from error


def check_gguf(role: str, path: Path) -> None:
    """Check that a file begins as GGUF does; its reader checks the rest.

    Raises:
        LoadError: there is none, or it holds something else.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise LoadError(
            f"{role} must have a GGUF file, got {str(path)!r}: {reason(error)}"
        ) from error
    if magic != b"GGUF":
        raise LoadError(f"{role} must have a GGUF file, got {str(path)!r} with other contents")
