"""Where the token cache keeps a source, and source.json, by which a dataset opens again when the hub cannot
be reached.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from smollm2.pretrained.cache import cache_folder
from train.config import RunConfig


def cache_root(config: RunConfig) -> Path | None:
    """The folder that token_cache names, or None. auto: one in the user's cache for data=hub, else none."""
    if config.token_cache == "auto":
        return cache_folder() / "tokens" if config.data == "hub" else None
    return None if config.token_cache == "none" else Path(config.token_cache).expanduser()


def source_folder(root: Path, identity: str, version: str) -> Path:
    """identity: what the source is called, with all that decides its documents; version: its commit, or a
    digest of its content.
    """
    return root / slug(identity) / version


def slug(text: str) -> str:
    """A file name that stands for a text, readable and without collisions."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"


def write_source_record(path: Path, record: dict[str, Any]) -> None:
    """Writes source.json in one piece, with all names by which its commit was ever asked for."""
    known = (_read(path) or {}).get("wanted", [])
    wanted = [*known, *(name for name in record.get("wanted", []) if name not in known)]
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    content = {**record, "wanted": wanted, "opened": time.time()}
    content["sha256"] = _digest(content)
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def find_source_record(root: Path, identity: str, wanted: str | None) -> tuple[Path, dict[str, Any]] | None:
    """The folder and record of the last opened source whose commit is `wanted`, or was asked for by that name
    (None: the newest).
    """
    found = [(path.parent, _read(path) or {}) for path in root.glob(f"{slug(identity)}/*/source.json")]
    matching = [
        (folder, record)
        for folder, record in found
        if record.get("identity") == identity
        and wanted in (record.get("revision"), *record.get("wanted", []))
    ]
    return max(matching, key=lambda one: one[1].get("opened", 0.0), default=None)


def _read(path: Path) -> dict[str, Any] | None:
    """None for a record that is not what was written; one that is there is named."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("sha256") == _digest(record):
            return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        pass
    print(f"token cache: {path} is damaged or of an earlier version; passed over", flush=True)
    return None
