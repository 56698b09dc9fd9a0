"""What the steps share: the error the CLI prints, and results that appear whole or not at all."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXTRA_OF_MODULE = {"transformers": "hf", "gguf": "hf", "accelerate": "hf", "peft": "lora"}


class TrioError(Exception):
    """A sentence for the user: what went wrong, what was found, what was wanted."""


def require_modules(*names: str) -> None:
    """Raise TrioError for the first of `names` that is not installed, naming the extra it is in."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            extra = EXTRA_OF_MODULE[name]
            raise TrioError(
                f"{name} is not installed: pip install 'proxytune_kernels[{extra}]' brings it"
            )


def require_space(directory: Path, wanted: int, purpose: str) -> None:
    """Raise TrioError unless `wanted` bytes are free on the disk that holds `directory`."""
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise TrioError(
            f"{directory} has {free / 1e9:.1f} GB free, {purpose} needs {wanted / 1e9:.1f} GB"
        )


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Give an empty directory to fill; it is renamed to `path` when the block ends without error.

    So a directory under its final name is always complete, and a step that finds it may be skipped.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was interrupted
    partial.mkdir(parents=True)
    yield partial
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
