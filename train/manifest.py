"""The manifest of a checkpoint: size and sha256 of every file, so that damage is found before loading."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm2.errors import LoadError

SCHEMA = 2  # of the folder; 1 had no schema in its manifest and the moments in training_state.pt
MANIFEST = "manifest.json"


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
    missing or differs.
    """
    total = 0
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        found = json.loads(text)
        schema = found.get("schema")
        if schema != SCHEMA:
            wrong = f"expected schema {SCHEMA}, got {schema}"
            raise LoadError(f"{folder / MANIFEST}: {wrong}: written by another version of this program")
        # Byte for byte: a save would not have written the same content in another form.
        if text != _sealed({name: value for name, value in found.items() if name != "sha256"}):
            raise LoadError(f"{folder / MANIFEST}: its sha256 is not that of its content")
        for name, expected in found["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                raise LoadError(f"{folder / name}: expected {expected['bytes']:,} bytes, got {size:,}")
            if _sha256(folder / name) != expected["sha256"]:
                raise LoadError(f"{folder / name}: its sha256 is not that of the manifest")
            total += size
    except FileNotFoundError as error:
        raise LoadError(f"{error.filename}: expected in a checkpoint, found nothing") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise LoadError(f"{folder}: not a readable checkpoint ({error})") from None
    return total


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
