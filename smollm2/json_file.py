"""Reads JSON files that others wrote: bounded in size and depth, and unambiguous."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smollm2.errors import LoadError

SIZE_LIMIT = 2**24  # bytes; a hundred times what a configuration or an index takes


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises LoadError, naming the file, for anything else.

    Refused beside what is no JSON: NaN and infinities, which the format does not have; a name that an object
    gives two values; files above SIZE_LIMIT; lists in lists in lists without end; pipes and devices, which
    could block for ever.
    """
    try:
        if not path.exists():
            raise LoadError(f"{path}: no such file")
        if not path.is_file():
            raise ValueError("it is a folder, a pipe or a device")
        size = path.stat().st_size
        if size > SIZE_LIMIT:
            raise ValueError(f"expected at most {SIZE_LIMIT} bytes, got {size}")
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=_unambiguous, parse_constant=_no_constant)
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: not a readable JSON file ({error})") from None
    except RecursionError:
        raise LoadError(f"{path}: not a readable JSON file (nested too deeply)") from None
    if not isinstance(data, dict):
        raise LoadError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    for name, value in pairs if len(data) < len(pairs) else ():
        if data[name] != value:
            raise ValueError(f"{name!r} is given twice: {value!r:.40} and {data[name]!r:.40}")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
