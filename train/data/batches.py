"""Stored documents to packed batches, in an order that is a function of (seed, position) alone.

    source -> blocks in seeded order -> token ids, from the cache or from workers -> documents in seeded order
    -> batches [B, T]

The order: in every epoch a seeded permutation of the shards, and in every block a seeded permutation of its
documents. There is no shuffle buffer, so a position is five integers (Cursor), and a run resumed from them
reads exactly what it would have read, on any number of ranks and workers. A mixture has such a position for
each of its sources, and takes their rows in turns (train/data/mixture.py). What is saved is the position of
the batch that was trained on, not of those prepared ahead.

With workers, one thread reads (train/data/blocks.py), processes tokenise (train/data/worker_pool.py), and
another thread packs. Without a token cache every rank reads and tokenises everything, and keeps its rows;
with one, the first rank of each node does it for all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.tokenizer import Tokenizer
from train.data.blocks import EpochEnd, Prefetch, epoch_order, epochs_of, shuffled, stored_blocks, tokenised
from train.data.corpus import Source
from train.data.mixture import (
    MixedBatch,
    MixtureCache,
    MixtureCursor,
    MixtureSource,
    Revision,
    Schedule,
    Share,
    mix,
    order_key,
)
from train.data.packing import START, Batch, Cursor, Segment, gather, pack
from train.data.token_cache import TokenCache
from train.data.tokenise import TokenBlock, as_text, digest, is_held_out
from train.data.worker_pool import WorkerPool

__all__ = [
    "Batch",
    "Cursor",
    "DataState",
    "Document",
    "UniqueCounter",
    "held_out_rows",
    "read_stored",
    "training_batches",
]


@dataclass(frozen=True)
class Document:
    """A usable document."""

    text: str
    digest: int


def read_stored(source: Source, fraction: float, held_out: bool = False) -> Iterator[Document]:
    """The usable documents of one side of the split, in stored order, once. Those of a mixture take turns by
    their weights.
    """
    if isinstance(source, MixtureSource):
        waiting = {
            index: read_stored(part.source, fraction, held_out) for index, part in enumerate(source.parts)
        }
        schedule = Schedule(source.weights)
        while waiting:
            if (index := next(schedule)) in waiting:
                if (document := next(waiting[index], None)) is None:
                    del waiting[index]
                else:
                    yield document
        return
    for shard in range(source.num_shards):
        for block in source.read(shard):
            for stored in block:
                text = as_text(stored)
                if text is not None and is_held_out(key := digest(text), fraction) == held_out:
                    yield Document(text, key)


def training_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    rows: int,
    length: int,
    seed: int = 0,
    validation_fraction: float = 0.0,
    cursor: Cursor | MixtureCursor = START,
    workers: int = 0,
    cache: TokenCache | MixtureCache | None = None,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """Endless batches of the training documents from `cursor` on: this rank's rows / world rows of every
    step's `rows`.

    The same whatever the number of workers, and with or without a cache; the steps are the same whatever the
    number of ranks. Closing the generator ends its threads and processes. With workers=0 there are none, and
    everything is done when a batch is asked for. Raises UsageError when the ranks cannot share the rows
    equally. Where a document cannot be read, a worker died or a whole epoch has no usable document, LoadError
    comes in place of the batch. A mixture's batches are MixedBatch.
    """
    if rows % world or not 0 <= rank < world:
        raise UsageError(
            f"rows of a step (batch_size x grad_accumulation): expected a multiple of the {world} processes, got {rows} (rank {rank}); "
            "change batch_size or grad_accumulation"
        )
    pool = WorkerPool(tokenizer, workers, None if cache is not None else (validation_fraction, False))
    stop = threading.Event()
    share = (rank, world, pin)
    if isinstance(source, MixtureSource):
        at = cursor if isinstance(cursor, MixtureCursor) else source.start
        caches = cache.parts if isinstance(cache, MixtureCache) else [None] * len(source.parts)
        streams = [
            pack(
                _segments(
                    part.source, pool, own, (order_key(seed, part.name), validation_fraction, place), stop
                ),
                1,
                length,
            )
            for part, own, place in zip(source.parts, caches, at.sources, strict=True)
        ]
        mixed: Generator[Batch, None, None] = mix(source, streams, at, rows, *share)
        return _ahead(mixed, pool, cache, stop)
    assert isinstance(cursor, Cursor) and not isinstance(cache, MixtureCache)  # those of one source
    return _ahead(
        pack(_segments(source, pool, cache, (seed, validation_fraction, cursor), stop), rows, length, *share),
        pool,
        cache,
        stop,
    )


def _segments(
    source: Source,
    pool: WorkerPool,
    cache: TokenCache | None,
    order: tuple[int | str, float, Cursor],
    stop: threading.Event,
) -> Iterator[Segment]:
    """order: seed, held-out fraction, position. Starts to read when the first segment is asked for."""
    seed, fraction, cursor = order
    # A reader ahead of the tokeniser ahead of the loop: a slow network delays neither as long as something is
    # in hand.
    stored = Prefetch(
        stored_blocks(source, epoch_order(source, seed, cursor), cache, stop), stop, 2, pool.workers > 0
    )
    yield from training_segments(source, tokenised(stored, pool, cache, stop), seed, fraction, cursor)


def _ahead(
    steps: Generator[Batch, None, None],
    pool: WorkerPool,
    cache: TokenCache | MixtureCache | None,
    stop: threading.Event,
) -> Generator[Batch, None, None]:
    """The same batches, prepared ahead where there are workers; what they come from is closed at the end."""
    batches = Prefetch(steps, stop, 4, pool.workers > 0)
    try:
        yield from batches
    finally:
        stop.set()
        batches.close()
        pool.close()
        if cache is not None:
            cache.release()


def training_segments(
    source: Source, blocks: Iterable[Any], seed: int | str, fraction: float, cursor: Cursor
) -> Iterator[Segment]:
    """The training documents of each block in seeded order. Raises LoadError when a whole epoch has none."""
    usable = invalid = carried = 0
    for item in blocks:
        if isinstance(item, EpochEnd):
            if item.whole and not usable:
                raise LoadError(
                    f"data: expected documents to train on, found none ({invalid} empty or not text, the others held out); "
                    "check the files and text_column, or lower validation_fraction"
                )
            usable = invalid = 0
            continue
        where, block = item.cursor, item.tokens
        key = f"{seed}/{where.epoch}/{item.shard}/{where.block}"
        order = np.array(shuffled(len(block.lengths), key), np.int64)
        first, token = (
            (cursor.document, cursor.token)
            if where == dataclasses.replace(cursor, document=0, token=0)
            else (0, 0)
        )
        keep = (block.lengths > 0) & ~is_held_out(block.digests, fraction)
        segment, trailing = _segment(source, item, order, keep, first, token, carried)
        usable, invalid = usable + len(segment.index), invalid + int(block.unusable.sum())
        carried = trailing
        yield segment


def _segment(
    source: Source, item: Any, order: np.ndarray, keep: np.ndarray, first: int, token: int, carried: int
) -> tuple[Segment, int]:
    """The documents of a block at `order` that are kept, from place `first` and its token `token` on.

    carried: unusable documents since the last kept one of earlier blocks. Also returns those behind the last
    kept one of this.
    """
    block: TokenBlock = item.tokens
    offsets = np.cumsum(block.lengths) - block.lengths
    index = first + np.flatnonzero(keep[order[first:]])
    chosen = order[index]
    lengths, begins = block.lengths[chosen], offsets[chosen]
    passed = np.cumsum(block.unusable[order[first:]])
    unusable = np.diff(passed[index - first], prepend=-carried)
    trailing = (int(passed[-1]) if len(passed) else 0) - (
        int(passed[index[-1] - first]) if len(index) else -carried
    )
    inside = np.cumsum(lengths) - lengths
    if token and len(index):
        if index[0] != first or token >= lengths[0]:
            raise LoadError(
                f"data: the position to continue from ({item.cursor}, document {first}, token {token}) is not in the data"
            )
        begins, lengths = begins.copy(), lengths.copy()
        begins[0], lengths[0], inside = begins[0] + token, lengths[0] - token, inside - token
    epochs = epochs_of(source, item.cursor, item.shard, item.epoch_part, index / max(1, len(order)))
    return Segment(
        item.cursor,
        gather(block.tokens, begins, lengths),
        inside,
        index,
        block.digests[chosen],
        unusable,
        epochs,
    ), trailing


def held_out_segments(source: Source, blocks: Iterable[Any], fraction: float) -> Iterator[Segment]:
    """The held-out documents of each block, in stored order."""
    for item in blocks:
        if not isinstance(item, EpochEnd):
            keep = (item.tokens.lengths > 0) & is_held_out(item.tokens.digests, fraction)
            yield _segment(source, item, np.arange(len(keep)), keep, 0, 0, 0)[0]


def held_out_rows(
    source: Source,
    tokenizer: Tokenizer,
    fraction: float,
    rows: int,
    length: int,
    cache: TokenCache | MixtureCache | None = None,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Up to `rows` rows of held-out documents: ids [R, length] int64 and doc_start [R, length] int32, with R
    <= rows.

    The same rows at every evaluation. R is 0 when the held-out documents do not fill one row. With a cache
    the blocks that they are in are tokenised whole and kept; without one, only the held-out documents are
    tokenised. Of a mixture: rows of every source, by weight.
    """
    if isinstance(source, MixtureSource):
        schedule = Schedule(source.weights)
        deque(itertools.islice(schedule, rows), maxlen=0)
        caches = cache.parts if isinstance(cache, MixtureCache) else [None] * len(source.parts)
        found = [
            held_out_rows(part.source, tokenizer, fraction, count, length, own, workers)
            for part, own, count in zip(source.parts, caches, schedule.given, strict=True)
        ]
        return torch.cat([ids for ids, _ in found]), torch.cat([starts for _, starts in found])
    assert not isinstance(cache, MixtureCache)
    ids, starts = [torch.empty((0, length), dtype=torch.int64)], [torch.empty((0, length), dtype=torch.int32)]
    if fraction > 0 and rows > 0:
        stop, pool = (
            threading.Event(),
            WorkerPool(tokenizer, workers, None if cache is not None else (fraction, True)),
        )
        stored = Prefetch(stored_blocks(source, epoch_order(source, None), cache, stop), stop, 2, workers > 0)
        try:
            with closing(tokenised(stored, pool, cache, stop)) as blocks:
                for batch in pack(held_out_segments(source, blocks, fraction), 1, length):
                    ids.append(batch.input_ids)
                    starts.append(batch.doc_start)
                    if len(ids) > rows:
                        break
        finally:
            stop.set()
            stored.close()
            pool.close()
            if cache is not None:
                cache.release()
    return torch.cat(ids), torch.cat(starts)


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

    sources: of a mixture, by name. Its epochs are those of the source that was repeated most, and its unique
    documents are counted over all sources: one that two of them have counts once.
    """

    fingerprint: str
    revision: Revision = None
    cursor: Cursor | MixtureCursor = Cursor()
    documents: int = 0  # begun, repetitions in later epochs included
    invalid: int = 0
    epochs: float = 0.0
    unique: UniqueCounter = field(default_factory=UniqueCounter)
    sources: dict[str, SourceCounts] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source) -> DataState:
        """Before the first batch."""
        names = [part.name for part in source.parts] if isinstance(source, MixtureSource) else []
        cursor = source.start if isinstance(source, MixtureSource) else START
        return cls(source.fingerprint, source.revision, cursor)._with_sources(
            {name: SourceCounts() for name in names}
        )

    def _with_sources(self, sources: dict[str, SourceCounts]) -> DataState:
        self.sources, self.unique.parts = sources, [counts.unique for counts in sources.values()]
        return self

    def consume(self, batch: Batch) -> None:
        """Counts a batch that has been trained on."""
        self.cursor, self.epochs = batch.cursor, batch.epochs
        if isinstance(batch, MixedBatch):
            for counts, share in zip(self.sources.values(), batch.shares, strict=True):
                counts.consume(share)
            self.epochs = max(counts.epochs for counts in self.sources.values())
        self.documents += len(batch.digests)
        self.invalid += batch.invalid
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


def _cursor(saved: dict[str, Any]) -> Cursor | MixtureCursor:
    if "sources" not in saved:
        return Cursor(**saved)
    return MixtureCursor(tuple(saved["rows"]), tuple(Cursor(**one) for one in saved["sources"]))
