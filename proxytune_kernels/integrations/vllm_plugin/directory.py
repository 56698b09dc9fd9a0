"""A directory that is written whole or not at all, and replaced only where it is still as written.

`RECORD` names the files and, for each, what it was: the target of a link, or size and time of a
file. An earlier export is taken away by this record alone, so nothing else in it is lost.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proxytune_kernels.trio.files import LoadError

RECORD = "proxytune_export.json"


def check_out(out: Path, sources: list[Path], *, force: bool) -> None:
    """Check that a directory can be written.

    Args:
        out: it need not exist.
        sources: directories that are read; none may lie in it.
        force: an earlier export may be there.

    Raises:
        LoadError: it holds a source, it is a file, or it has files that are not an export's.
    """
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise LoadError(f"out must not hold what is exported, got {str(out)!r} with {source}")
    if os.path.lexists(out) and not out.is_dir():
        raise LoadError(f"out must be a directory, got the file {str(out)!r}")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / RECORD).is_file():
        raise LoadError(
            f"out must be new, empty, or an earlier export, got {str(out)!r} with files"
        )
    if not force:
        raise LoadError(f"out must be new or empty, got {str(out)!r} with an earlier export: force")
    _recorded(out)


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A new directory beside ``out`` to write to; its files are moved to ``out`` at the end.

    Raises:
        LoadError: an earlier export there was changed, or a file of another's is in the way.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield staging
        record = {name: _described(staging / name) for name in _files(staging)}
        (staging / RECORD).write_text(json.dumps({"files": record}, indent=1) + "\n")
        _move(staging, out, [*record, RECORD])
    finally:
        shutil.rmtree(staging)


def place(source: Path, target: Path, *, copy: bool) -> None:
    """Link a file by its absolute path, or copy it."""
    if copy:
        shutil.copyfile(source, target)
    else:
        target.symlink_to(source.resolve())


def _files(directory: Path) -> list[str]:
    """Files and links in a directory, relative to it."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


def _described(path: Path) -> dict[str, Any]:
    if path.is_symlink():
        return {"link": os.readlink(path)}
    stat = path.stat()
    return {"bytes": stat.st_size, "time_ns": stat.st_mtime_ns}


def _recorded(out: Path) -> list[str]:
    """Files of an earlier export that are there.

    Raises:
        LoadError: one is no longer what was written.
    """
    try:
        record = json.loads((out / RECORD).read_text())["files"]
        written = dict(record.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"out must have the {RECORD} of an earlier export: {error}") from error
    names = [name for name in written if os.path.lexists(out / name)]
    for name in names:
        inside = (out / name).parent.resolve().is_relative_to(out.resolve())
        if not inside or _described(out / name) != written[name]:
            raise LoadError(
                f"out must be as it was exported, got {str(out / name)!r} changed since: remove it"
            )
    return names


def _move(staging: Path, out: Path, names: list[str]) -> None:
    """Move files to where they belong, in place of an earlier export's."""
    old = [*_recorded(out), RECORD] if (out / RECORD).is_file() else []
    folders = {Path(name).parent for name in names}
    blocked = [n for n in names if os.path.lexists(out / n) and n not in old]
    blocked += [str(f) for f in folders if (out / f).is_symlink() and f != Path(".")]
    blocked += [str(f) for f in folders if (out / f).exists() and not (out / f).is_dir()]
    if blocked:
        raise LoadError(f"out must not have another's {blocked[0]!r}, got {str(out)!r}")
    for name in old:
        (out / name).unlink()
    for folder in sorted(folders):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        # Within one file system, as staging is beside out.
        (staging / name).rename(out / name)
