"""Damage to files, drawn from a seeded generator: bytes as a disk or an attacker changes them, JSON values as
an editor or a broken exporter does.

    damaged = mutate(path.read_bytes(), random.Random(7))    # never equal to what it was given
    damaged = mutate_json(json.loads(text), random.Random(7))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

HUGE = (-1, 0, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
# What stands for any value of a JSON file; the lists and strings have sizes that a reader should not mind.
STRANGE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 0.5, 1e-300, 1e300, float("nan"), float("inf"), 2**31, 2**63, 10**400,
    "", "0", "x" * 10_000, "../../etc/passwd", "\ud800", "\x00", [], {}, [0], [[]], {"": None}, [0] * 10_000,
)  # fmt: skip


def mutate(data: bytes, random: Random) -> bytes:
    """The bytes with one change, never equal to the original. data: at least one byte."""
    while True:
        changed = random.choice(BYTE_CHANGES)(data, random)
        if changed != data:
            return changed


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def _insert(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + random.randbytes(random.choice((1, 8, 100))) + data[start:]


def _remove(data: bytes, random: Random) -> bytes:
    start, end = _range(data, random)
    return data[:start] + data[end:]


def _repeat(data: bytes, random: Random) -> bytes:
    start, end = _range(data, random)
    return data[:end] + data[start:]


def _zero(data: bytes, random: Random) -> bytes:
    start, end = _range(data, random)
    return data[:start] + bytes(end - start) + data[end:]


def _exchange(data: bytes, random: Random) -> bytes:
    """Two neighbouring ranges change places."""
    start, middle = _range(data, random)
    end = min(len(data), 2 * middle - start)
    return data[:start] + data[middle:end] + data[start:middle] + data[end:]


def _enormous(data: bytes, random: Random) -> bytes:
    """A number of 4 or 8 bytes, little-endian and aligned as counts and lengths often are."""
    width = random.choice((4, 8))
    start = random.randrange(0, len(data), 4)
    number = (random.choice(HUGE) % 256**width).to_bytes(width, "little")
    return (data[:start] + number + data[start + width :])[: max(len(data), start + 1)]


def _range(data: bytes, random: Random) -> tuple[int, int]:
    start = random.randrange(len(data))
    return start, min(len(data), start + random.choice((1, 4, 8, 64)))


BYTE_CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    _flip, _truncate, _insert, _remove, _repeat, _zero, _exchange, _enormous,
)  # fmt: skip


def mutate_json(value: Any, random: Random) -> Any:
    """A copy of a JSON object or list with one change at a random place: an entry removed, renamed, doubled,
    exchanged with another, or replaced. value: with at least one entry.
    """
    changed = copy.deepcopy(value)
    places = list(_places(changed))
    parent, key = random.choice(places)
    kind = random.choice(("remove", "rename", "scale", "exchange", "replace", "replace"))
    if kind == "remove":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{key}_"] = parent.pop(key)
    elif kind == "scale" and isinstance(parent[key], (int, float)) and parent[key]:
        parent[key] *= random.choice((-1, 2, 3, 1000, 10**9))
    elif kind == "exchange":
        other, at = random.choice([(p, k) for p, k in places if p is parent])
        parent[key], other[at] = other[at], parent[key]
    else:
        parent[key] = copy.deepcopy(random.choice(STRANGE))
    return changed


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key or index) of a JSON value, outer ones first."""
    if not isinstance(value, (dict, list)):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        yield from _places(inner)
