"""Stored documents to packed batches, in an order that is a function of (seed, position) alone.

    source -> blocks in seeded order -> token ids, from the cache or from workers -> documents in seeded order -> batches [B, T]

The order: in every epoch a seeded permutation of the shards, and in every block a seeded permutation of its documents. There is no
shuffle buffer, so a position is five integers (Cursor), and a run resumed from them reads exactly what it would have read, on any
number of ranks and workers. What is saved is the position of the batch that was trained on, not of those prepared ahead.

With workers, one thread reads (train/blocks.py), processes tokenise (train/worker_pool.py), and another thread packs. Without a token
cache every rank reads and tokenises everything, and keeps its rows; with one, the first rank of each node does it for all of them.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smollm2.cli import LoadError, UsageError
from smollm2.tokenizer import Tokenizer
from train.blocks import EpochEnd, Prefetch, epoch_order, epochs_of, shuffled, stored_blocks, tokenised
from train.corpus import Source
from train.packing import START, Batch, Cursor, Segment, gather, pack
from train.token_cache import TokenCache
from train.tokenise import TokenBlock, as_text, digest, is_held_out
from train.worker_pool import WorkerPool

__all__ = ["Batch", "Cursor", "DataState", "Document", "UniqueCounter", "held_out_rows", "read_stored", "training_batches"]


@dataclass(frozen=True)
class Document:
    """A usable document."""

    text: str
    digest: int


def read_stored(source: Source, fraction: float, held_out: bool = False) -> Iterator[Document]:
    """The usable documents of one side of the split, in stored order, once."""
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
    cursor: Cursor = START,
    workers: int = 0,
    cache: TokenCache | None = None,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """Endless batches of the training documents from `cursor` on: this rank's rows / world rows of every step's `rows`.

    The same whatever the number of workers, and with or without a cache; the steps are the same whatever the number of ranks. Closing
    the generator ends its threads and processes. With workers=0 there are none, and everything is done when a batch is asked for.
    Raises UsageError when the ranks cannot share the rows equally. Where a document cannot be read, a worker died or a whole epoch has
    no usable document, LoadError comes in place of the batch.
    """
    if rows % world or not 0 <= rank < world:
        raise UsageError(
            f"rows of a step (batch_size x grad_accumulation): expected a multiple of the {world} processes, got {rows} (rank {rank}); "
            "change batch_size or grad_accumulation"
        )
    pool = WorkerPool(tokenizer, workers, None if cache is not None else (validation_fraction, False))
    return _stream(source, pool, cache, (seed, validation_fraction, cursor), (rows, length, rank, world, pin))


def _stream(
    source: Source, pool: WorkerPool, cache: TokenCache | None, order: tuple[int, float, Cursor], shape: tuple[int, int, int, int, bool]
) -> Generator[Batch, None, None]:
    seed, fraction, cursor = order
    stop = threading.Event()
    # A reader ahead of the tokeniser ahead of the loop: a slow network delays neither as long as something is in hand.
    stored = Prefetch(stored_blocks(source, epoch_order(source, seed, cursor), cache, stop), stop, 2, pool.workers > 0)
    segments = training_segments(source, tokenised(stored, pool, cache, stop), seed, fraction, cursor)
    batches = Prefetch(pack(segments, *shape), stop, 4, pool.workers > 0)
    try:
        yield from batches
    finally:
        stop.set()
        batches.close()
        pool.close()
        if cache is not None:
            cache.release()


def training_segments(source: Source, blocks: Iterable[Any], seed: int, fraction: float, cursor: Cursor) -> Iterator[Segment]:
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
        first, token = (cursor.document, cursor.token) if where == dataclasses.replace(cursor, document=0, token=0) else (0, 0)
        keep = (block.lengths > 0) & ~is_held_out(block.digests, fraction)
        segment, trailing = _segment(source, item, order, keep, first, token, carried)
        usable, invalid = usable + len(segment.index), invalid + int(block.unusable.sum())
        carried = trailing
        yield segment


def _segment(source: Source, item: Any, order: np.ndarray, keep: np.ndarray, first: int, token: int, carried: int) -> tuple[Segment, int]:
    """The documents of a block at `order` that are kept, from place `first` and its token `token` on.

    carried: unusable documents since the last kept one of earlier blocks. Also returns those behind the last kept one of this.
    """
    block: TokenBlock = item.tokens
    offsets = np.cumsum(block.lengths) - block.lengths
    index = first + np.flatnonzero(keep[order[first:]])
    chosen = order[index]
    lengths, begins = block.lengths[chosen], offsets[chosen]
    passed = np.cumsum(block.unusable[order[first:]])
    unusable = np.diff(passed[index - first], prepend=-carried)
    trailing = (int(passed[-1]) if len(passed) else 0) - (int(passed[index[-1] - first]) if len(index) else -carried)
    inside = np.cumsum(lengths) - lengths
    if token and len(index):
        if index[0] != first or token >= lengths[0]:
            raise LoadError(f"data: the position to continue from ({item.cursor}, document {first}, token {token}) is not in the data")
        begins, lengths = begins.copy(), lengths.copy()
        begins[0], lengths[0], inside = begins[0] + token, lengths[0] - token, inside - token
    epochs = epochs_of(source, item.cursor, item.shard, item.epoch_part, index / max(1, len(order)))
    return Segment(item.cursor, gather(block.tokens, begins, lengths), inside, index, block.digests[chosen], unusable, epochs), trailing


def held_out_segments(source: Source, blocks: Iterable[Any], fraction: float) -> Iterator[Segment]:
    """The held-out documents of each block, in stored order."""
    for item in blocks:
        if not isinstance(item, EpochEnd):
            keep = (item.tokens.lengths > 0) & is_held_out(item.tokens.digests, fraction)
            yield _segment(source, item, np.arange(len(keep)), keep, 0, 0, 0)[0]


def held_out_rows(
    source: Source, tokenizer: Tokenizer, fraction: float, rows: int, length: int, cache: TokenCache | None = None, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Up to `rows` rows of held-out documents: ids [R, length] int64 and doc_start [R, length] int32, with R <= rows.

    The same rows at every evaluation. R is 0 when the held-out documents do not fill one row. With a cache the blocks that they are in
    are tokenised whole and kept; without one, only the held-out documents are tokenised.
    """
    ids, starts = [torch.empty((0, length), dtype=torch.int64)], [torch.empty((0, length), dtype=torch.int32)]
    if fraction > 0 and rows > 0:
        stop, pool = threading.Event(), WorkerPool(tokenizer, workers, None if cache is not None else (fraction, True))
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

    Exact up to `limit` documents. Beyond, only digests that end in k zero bits are kept, k growing as needed, and the count is
    2^k times theirs (adaptive sampling, Flajolet 1990): a relative error of about 1 / sqrt(limit / 2), and `exact` is False.
    """

    def __init__(self, limit: int = 1 << 20) -> None:
        self.limit = limit
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
        return {"digests": torch.from_numpy(kept.view(np.int64)), "zero_bits": self.zero_bits}

    def load(self, state: dict[str, Any]) -> None:
        self.zero_bits = int(state["zero_bits"])
        self._kept = set(state["digests"].numpy().view(np.uint64).tolist())


@dataclass
class DataState:
    """How far training has read, as it is saved: position, counts, and what identifies the data."""

    fingerprint: str
    revision: str | None = None
    cursor: Cursor = Cursor()
    documents: int = 0  # begun, repetitions in later epochs included
    invalid: int = 0
    epochs: float = 0.0
    unique: UniqueCounter = field(default_factory=UniqueCounter)

    def consume(self, batch: Batch) -> None:
        """Counts a batch that has been trained on."""
        self.cursor, self.epochs = batch.cursor, batch.epochs
        self.documents += len(batch.digests)
        self.invalid += batch.invalid
        self.unique.add(batch.digests)

    def to_json(self) -> dict[str, Any]:
        """Everything but the digests, which `unique.state()` holds."""
        plain = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "unique"}
        return {**plain, "cursor": dataclasses.asdict(self.cursor)}

    @classmethod
    def from_json(cls, data: dict[str, Any], unique: dict[str, Any]) -> DataState:
        state = cls(**{**data, "cursor": Cursor(**data["cursor"])})
        state.unique.load(unique)
        return state
