"""How far training has read, and what it has seen: what a checkpoint keeps of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from train.data.packing import Batch, Share
from train.data.source import START, Cursor, MixtureCursor, Position, Revision, Source, start_of


class UniqueCounter:
    """Counts distinct documents by their digests, in bounded memory.

    Exact up to `limit` documents. Beyond, only digests that end in k zero bits are kept, k growing as needed,
    and the count is 2^k times theirs (adaptive sampling, Flajolet 1990): a relative error of about 1 /
    sqrt(limit / 2), and `exact` is False.
    """

    def __init__(self, limit: int = 1 << 20, parts: Sequence[UniqueCounter] = ()) -> None:
        """parts: counters of single sources, which are saved with this one."""
        self.limit, self.parts = limit, list(parts)
        self.zero_bits = 0
        self._kept: set[int] = set()

    def add(self, digests: Iterable[int] | np.ndarray) -> None:
        keys = digests if isinstance(digests, np.ndarray) else np.array(list(digests), np.uint64)
        self._kept.update(self._selected(keys).tolist())
        while len(self._kept) > self.limit:
            self.zero_bits += 1
            kept = np.fromiter(self._kept, np.uint64, len(self._kept))
            self._kept = set(self._selected(kept).tolist())

    def _selected(self, keys: np.ndarray) -> np.ndarray:
        return keys[keys & np.uint64((1 << self.zero_bits) - 1) == 0] if self.zero_bits else keys

    @property
    def count(self) -> int:
        return len(self._kept) << self.zero_bits

    @property
    def exact(self) -> bool:
        return self.zero_bits == 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: 8 bytes a document."""
        kept = np.fromiter(sorted(self._kept), dtype=np.uint64, count=len(self._kept))
        parts = {"parts": [part.state() for part in self.parts]} if self.parts else {}
        return {"digests": torch.from_numpy(kept.view(np.int64)), "zero_bits": self.zero_bits, **parts}

    def load(self, state: dict[str, Any]) -> None:
        self.zero_bits = int(state["zero_bits"])
        self._kept = set(state["digests"].numpy().view(np.uint64).tolist())
        for part, saved in zip(self.parts, state.get("parts", []), strict=True):
            part.load(saved)


@dataclass
class SourceCounts:
    """What training has read of one source of a mixture."""

    rows: int = 0
    documents: int = 0
    invalid: int = 0
    epochs: float = 0.0
    unique: UniqueCounter = field(default_factory=UniqueCounter)

    def consume(self, share: Share) -> None:
        self.rows += share.rows
        self.documents += len(share.digests)
        self.invalid += share.invalid
        self.epochs = share.epochs if share.rows else self.epochs
        self.unique.add(share.digests)


@dataclass
class DataState:
    """How far training has read, as it is saved: position, counts, and what identifies the data.

    sources: of a mixture, by name; none for a single source. The epochs of a mixture are those of the source
    that was repeated most. A document that two of its sources have counts once in `unique`.
    """

    fingerprint: str
    revision: Revision = None
    cursor: Position = START
    documents: int = 0  # begun, repetitions in later epochs included
    invalid: int = 0
    padding: int = 0  # tokens, of rows of conversations
    truncated: int = 0  # conversations that were longer than a row
    validation: str = ""  # fingerprint of validation_paths; none of them, or an older checkpoint: empty
    held_out_rows: int = 0  # asked for in an evaluation; 0: not known, as in older checkpoints
    epochs: float = 0.0
    unique: UniqueCounter = field(default_factory=UniqueCounter)
    sources: dict[str, SourceCounts] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source) -> DataState:
        """Before the first batch."""
        return cls(source.fingerprint, source.revision, start_of(source))._with_sources(
            {part.name: SourceCounts() for part in source.parts if part.name is not None}
        )

    def _with_sources(self, sources: dict[str, SourceCounts]) -> DataState:
        self.sources, self.unique.parts = sources, [counts.unique for counts in sources.values()]
        return self

    def consume(self, batch: Batch) -> None:
        """Counts a batch that has been trained on."""
        self.cursor, self.epochs = batch.cursor, batch.epochs
        if self.sources:
            for counts, share in zip(self.sources.values(), batch.shares, strict=True):
                counts.consume(share)
            self.epochs = max(counts.epochs for counts in self.sources.values())
        self.documents += len(batch.digests)
        self.invalid += batch.invalid
        self.padding += sum(share.padding for share in batch.shares)
        self.truncated += sum(share.truncated for share in batch.shares)
        self.unique.add(batch.digests)

    def by_source(self) -> dict[str, float | int]:
        """Of each source of a mixture: its share of all tokens so far, its epochs and its unique examples, as
        `share/NAME` and so on.
        """
        rows = sum(counts.rows for counts in self.sources.values()) or 1
        found: dict[str, float | int] = {}
        for name, counts in self.sources.items():
            found[f"share/{name}"] = round(counts.rows / rows, 6)
            found[f"epochs/{name}"] = round(counts.epochs, 4)
            found[f"unique_examples/{name}"] = counts.unique.count
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything but the digests, which `unique.state()` holds."""
        sources = {name: _plain(counts) for name, counts in self.sources.items()}
        return {**_plain(self), "cursor": dataclasses.asdict(self.cursor), "sources": sources}

    @classmethod
    def from_json(cls, data: dict[str, Any], unique: dict[str, Any]) -> DataState:
        sources = {name: SourceCounts(**counts) for name, counts in data.get("sources", {}).items()}
        state = cls(**{**data, "cursor": _cursor(data["cursor"]), "sources": {}})._with_sources(sources)
        state.unique.load(unique)
        return state


def _plain(counts: Any) -> dict[str, Any]:
    """The fields of a dataclass without its counter of unique documents."""
    return {
        entry.name: getattr(counts, entry.name)
        for entry in dataclasses.fields(counts)
        if entry.name != "unique"
    }


def _cursor(saved: dict[str, Any]) -> Position:
    if "sources" not in saved:
        return Cursor(**saved)
    return MixtureCursor(tuple(saved["rows"]), tuple(Cursor(**one) for one in saved["sources"]))
