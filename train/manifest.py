"""The manifest of a checkpoint: size and sha256 of every file, so that damage is found before loading.

It finds accidents, and keeps a reader to the files that a save wrote. It is no signature: whoever can write
the folder can write a manifest that fits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smollm2.errors import LoadError

SCHEMA = 2  # of the folder; 1 had no schema in its manifest and the moments in training_state.pt
MANIFEST = "manifest.json"
LARGEST = 1 << 24  # bytes of a manifest: a hundred thousand files


class UnlistedError(LoadError):
    """A checkpoint is whole, and holds a file that no save wrote."""


def file_entries(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Size and sha256 of files, by their paths in the folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }


def manifest(files: dict[str, Any]) -> str:
    """The text of manifest.json, whose last entry is the digest of the rest: its own damage shows too."""
    return _sealed({"schema": SCHEMA, "files": files})


def _sealed(content: dict[str, Any]) -> str:
    return as_json({**content, "sha256": hashlib.sha256(as_json(content).encode()).hexdigest()})


def verify(folder: Path) -> int:
    """Compares every file with the manifest; returns their bytes. Raises LoadError naming the first that is
    missing or differs; else UnlistedError for one that is not in the manifest.

    Only plain files that lie in the folder are opened, whatever the manifest names.
    """
    total = 0
    try:
        present = set(_contents(folder))
        text = _read_manifest(folder / MANIFEST)
        found = json.loads(text)
        schema = found.get("schema")
        if schema != SCHEMA:
            wrong = f"expected schema {SCHEMA}, got {schema}"
            raise LoadError(f"{folder / MANIFEST}: {wrong}: written by another version of this program")
        # Byte for byte: a save would not have written the same content in another form.
        if text != _sealed({name: value for name, value in found.items() if name != "sha256"}):
            raise LoadError(f"{folder / MANIFEST}: its sha256 is not that of its content")
        files = found["files"]
        for name, expected in files.items():
            if name not in present:
                raise LoadError(f"{folder}/{name}: expected in a checkpoint, found nothing")
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                raise LoadError(f"{folder / name}: expected {expected['bytes']:,} bytes, got {size:,}")
            if _sha256(folder / name) != expected["sha256"]:
                raise LoadError(f"{folder / name}: its sha256 is not that of the manifest")
            total += size
        for name in sorted(present - {MANIFEST, *files}):
            raise UnlistedError(
                f"{folder}/{name}: not in {MANIFEST}, so that no save wrote it; move it elsewhere"
            )
    except FileNotFoundError as error:
        raise LoadError(f"{error.filename}: expected in a checkpoint, found nothing") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(f"{folder}: not a readable checkpoint ({error})") from None
    return total


def _contents(folder: Path, prefix: str = "") -> Iterator[str]:
    """The paths of all files in a folder and in those below it, and of empty folders, which end in "/".

    Raises LoadError for links, which may lead anywhere, and for pipes and devices, which may block a reader.
    """
    for entry in os.scandir(folder):
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from list(_contents(Path(entry.path), f"{name}/")) or [f"{name}/"]
        elif entry.is_file(follow_symlinks=False):
            yield name
        else:
            kind = "a link" if entry.is_symlink() else "a pipe, socket or device"
            raise LoadError(
                f"{entry.path}: expected a file, found {kind}; put a copy of the file in its place"
            )


def _read_manifest(path: Path) -> str:
    if (size := path.stat().st_size) > LARGEST:
        raise LoadError(f"{path}: expected a manifest of at most {LARGEST:,} bytes, got {size:,}")
    return path.read_text(encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def as_json(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"


def flush(path: Path) -> None:
    """Asks the disk to keep a file, or the names in a folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
