"""The training text: docstrings of permissively licensed packages, pinned by version and hash."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SHORTEST_DOCSTRING = 120  # characters; one-liners hold little but parameter names
DOCUMENT_LENGTH = 4000  # characters; long files are cut so that a shuffle mixes them
HELD_OUT_DOCUMENTS = 40  # per corpus, never trained on


class TextMismatch(Exception):
    """The installed packages do not yield the text the shipped trio was trained on."""


@dataclass(frozen=True)
class Source:
    """One package's docstrings.

    Args:
        package: the distribution's name, the same as its import name for all of these.
        version: the public version it is pinned to (a local suffix such as `+cpu` is ignored).
        licence: SPDX identifier of the package's licence.
        folders: folders inside the package that are read, `.` for all of it.
        sha256: of the extracted documents, joined by NUL, in UTF-8.
    """

    package: str
    version: str
    licence: str
    folders: tuple[str, ...]
    sha256: str


SOURCES = {
    source.package: source
    for source in (
        Source(
            "sympy",
            "1.14.0",
            "BSD-3-Clause",
            (".",),
            "a1d48c21031732c1da38424af43528ecc8900e3a3599b804284c75b25e5a5450",
        ),
        Source(
            "networkx",
            "3.6.1",
            "BSD-3-Clause",
            (".",),
            "ec5c9b080610614e26ea4eff2dd5b278ea60786466d65b7c063997f452d09224",
        ),
        Source(
            "numpy",
            "2.4.6",
            "BSD-3-Clause",
            # Not `distutils`, which only the wheels for Python 3.11 hold.
            ("_core", "fft", "lib", "linalg", "ma", "polynomial", "random"),
            "04442cffcbe439ccae342f976d903064ba5a431b4267ecaca6ec9719371bab84",
        ),
        Source(
            "torch",
            "2.13.0",
            "BSD-3-Clause",
            ("nn", "optim", "distributions"),
            "6e9867ed44ddb0db9ebd2dde8a1ea6e8d760227aede1a0735a44117d552aae50",
        ),
    )
}


def docstrings(code: str) -> Iterator[str]:
    """Yield the docstrings of a module's source in the order of `ast.walk`, dedented, in ASCII."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        # clean=False: `inspect.cleandoc` changed between Python versions
        raw = ast.get_docstring(node, clean=False)
        if raw is None:
            continue
        first, _, rest = raw.expandtabs().partition("\n")
        lines = [first.strip(), *textwrap.dedent(rest).splitlines()]
        text = "\n".join(line.rstrip() for line in lines).strip()
        text = text.encode("ascii", "ignore").decode()
        if len(text) >= SHORTEST_DOCSTRING:
            yield text


def read_source(source: Source) -> list[str]:
    """Return the package's documents: its files' docstrings, in pieces of `DOCUMENT_LENGTH`."""
    spec = importlib.util.find_spec(source.package)
    if spec is None or spec.origin is None:
        raise TextMismatch(
            f"the text of {source.package} {source.version} is needed, and {source.package} is not "
            f"installed: pip install {source.package}=={source.version}"
        )
    root = Path(spec.origin).parent
    files = sorted(
        {
            path.relative_to(root).as_posix()
            for folder in source.folders
            for path in (root / folder).rglob("*.py")
        }
    )
    documents = []
    for name in files:
        if "tests" in name.split("/"):
            continue
        text = "\n\n".join(docstrings((root / name).read_text(encoding="utf-8")))
        documents += [
            text[at : at + DOCUMENT_LENGTH] for at in range(0, len(text), DOCUMENT_LENGTH)
        ]
    return documents


def digest(documents: Iterable[str]) -> str:
    """Return the SHA-256 of documents joined by NUL, which none of them contains."""
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Documents for training, documents held out, and what they were made from (for the record)."""

    training: list[str]
    held_out: list[str]
    provenance: list[dict[str, str | int]]


def load_corpus(packages: Iterable[str], allow_other_text: bool = False) -> Corpus:
    """Read the named sources, check them against their pins, and split off the held-out documents.

    Args:
        packages: keys of `SOURCES`.
        allow_other_text: train on what is installed; the result then differs from the shipped trio.

    Raises:
        TextMismatch: a package is missing, or its text is not the pinned text.
    """
    documents: list[str] = []
    provenance: list[dict[str, str | int]] = []
    for package in packages:
        source = SOURCES[package]
        found = read_source(source)
        sha256 = digest(found)
        version = importlib.metadata.version(package)
        if sha256 != source.sha256 and not allow_other_text:
            raise TextMismatch(
                f"the docstrings of the installed {package} {version} hash to {sha256[:16]}... "
                f"and the shipped trio was trained on those of {package} {source.version} "
                f"({source.sha256[:16]}...): pip install {package}=={source.version}, or pass "
                "--allow-other-text to train a different trio"
            )
        documents += found
        provenance.append(
            {
                "package": package,
                "version": version,
                "licence": source.licence,
                "folders": " ".join(source.folders),
                "documents": len(found),
                "characters": sum(map(len, found)),
                "sha256": sha256,
            }
        )
    # An order that depends on nothing but the text.
    documents.sort(key=lambda document: hashlib.sha256(document.encode()).digest())
    return Corpus(documents[HELD_OUT_DOCUMENTS:], documents[:HELD_OUT_DOCUMENTS], provenance)
