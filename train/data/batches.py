"""Stored documents to packed batches, in an order that is a function of (seed, position) alone.

    source -> blocks in seeded order -> token ids, from the cache or from workers -> documents in seeded order
    -> batches [B, T]

The order: in every epoch a seeded permutation of the shards, and in every block a seeded permutation of its
documents. There is no shuffle buffer, so a position is five integers (Cursor), and a run resumed from them
reads exactly what it would have read, on any number of ranks and workers. A mixture has such a position for
each of its sources, and takes their rows in turns (train/data/mixture.py); a single source is a mixture of
one. What is saved is the position of the batch that was trained on, not of those prepared ahead.

With workers, one thread reads (train/data/blocks.py), processes tokenise (train/data/worker_pool.py), and
another thread packs. Without a token cache every rank reads and tokenises everything, and keeps its rows;
with one, the first rank of each node does it for all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.tokenizer import Tokenizer
from train.data.blocks import EpochEnd, epoch_order, epochs_of, shuffled, tokenised
from train.data.mixture import Schedule, mix
from train.data.packing import Batch, Packer, Rows, Segment, tensors
from train.data.prefetch import Prefetch
from train.data.source import Cursor, Position, Single, Source, start_of
from train.data.token_cache import Caches, TokenCache
from train.data.tokenise import TokenBlock, as_text, digest, is_held_out
from train.data.worker_pool import WorkerPool


@dataclass(frozen=True)
class Document:
    """A usable document."""

    text: str
    digest: int


def read_stored(source: Source, fraction: float, held_out: bool = False) -> Iterator[Document]:
    """The usable documents of one side of the split, in stored order, once. Those of a mixture take turns by
    their weights.
    """
    waiting = {index: _documents(part.source, fraction, held_out) for index, part in enumerate(source.parts)}
    schedule = Schedule([part.weight for part in source.parts])
    while waiting:
        if (index := next(schedule)) in waiting:
            if (document := next(waiting[index], None)) is None:
                del waiting[index]
            else:
                yield document


def _documents(source: Single, fraction: float, held_out: bool) -> Iterator[Document]:
    for shard in range(source.num_shards):
        for block in source.read(shard):
            for stored in block:
                text = as_text(stored)
                if text is not None and is_held_out(key := digest(text), fraction) == held_out:
                    yield Document(text, key)


def training_batches(
    source: Source, tokenizer: Tokenizer, *, rows: int, length: int, seed: int | str = 0,
    validation_fraction: float = 0.0, cursor: Position | None = None, workers: int = 0,
    cache: Caches | None = None, rank: int = 0, world: int = 1, pin: bool = False,
) -> Generator[Batch, None, None]:  # fmt: skip
    """Endless batches of the training documents from `cursor` (default: the first) on: this rank's rows /
    world rows of every step's `rows`.

    They depend neither on the number of workers nor on a cache, and the steps do not depend on the number of
    ranks. Closing the generator ends its threads and processes. With workers=0 there are none, and
    everything is done when a batch is asked for. Raises UsageError when the ranks cannot share the rows
    equally. Where a document cannot be read, a worker died or a whole epoch has no usable document, LoadError
    comes in place of the batch.
    """
    if rows % world or not 0 <= rank < world:
        got = f"expected a multiple of the {world} processes, got {rows} (rank {rank})"
        remedy = "change batch_size or grad_accumulation"
        raise UsageError(f"rows of a step (batch_size x grad_accumulation): {got}; {remedy}")
    at, caches = cursor or start_of(source), caches_of(source, cache)
    # A cache keeps whole blocks; without one, held-out documents need not be tokenised.
    pool = WorkerPool(tokenizer, workers, None if any(caches) else (validation_fraction, False))
    stop = threading.Event()
    packers = []
    for part, own, place in zip(source.parts, caches, at.sources, strict=True):
        key = part.order_key(seed)
        blocks = tokenised(part.source, epoch_order(part.source, key, place), pool, own, stop)
        segments = training_segments(part.source, blocks, key, validation_fraction, place)
        packers.append(Packer(segments, length))
    return _ahead(mix(source, packers, at, rows, rank, world, pin), pool, cache, stop)


def caches_of(source: Source, cache: Caches | None) -> Sequence[TokenCache | None]:
    """The cache of each part of the source."""
    return [None] * len(source.parts) if cache is None else cache.parts


def _ahead(
    steps: Generator[Batch, None, None], pool: WorkerPool, cache: Caches | None, stop: threading.Event
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
    source: Single, blocks: Iterable[Any], seed: str, fraction: float, cursor: Cursor
) -> Iterator[Segment]:
    """The training documents of each block in seeded order. Raises LoadError when a whole epoch has none."""
    usable = invalid = carried = 0
    for item in blocks:
        if isinstance(item, EpochEnd):
            if item.whole and not usable:
                found = f"found none ({invalid} empty or not text, the others held out)"
                remedy = "check the files and text_column, or lower validation_fraction"
                raise LoadError(f"data: expected documents to train on, {found}; {remedy}")
            usable = invalid = 0
            continue
        where, block = item.cursor, item.tokens
        key = f"{seed}/{where.epoch}/{item.shard}/{where.block}"
        order = np.array(shuffled(len(block.lengths), key), np.int64)
        resumed = where == dataclasses.replace(cursor, document=0, token=0)
        first, token = (cursor.document, cursor.token) if resumed else (0, 0)
        keep = (block.lengths > 0) & ~is_held_out(block.digests, fraction)
        segment, trailing = _segment(source, item, order, keep, first, token, carried)
        usable, invalid = usable + len(segment.index), invalid + int(block.unusable.sum())
        carried = trailing
        yield segment


def _segment(
    source: Single, item: Any, order: np.ndarray, keep: np.ndarray, first: int, token: int, carried: int
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
    before_last = int(passed[index[-1] - first]) if len(index) else -carried
    trailing = (int(passed[-1]) if len(passed) else 0) - before_last
    inside = np.cumsum(lengths) - lengths
    if token and len(index):
        if index[0] != first or token >= lengths[0]:
            where = f"({item.cursor}, document {first}, token {token})"
            raise LoadError(f"data: the position to continue from {where} is not in the data")
        begins, lengths = begins.copy(), lengths.copy()
        begins[0], lengths[0], inside = begins[0] + token, lengths[0] - token, inside - token
    epochs = epochs_of(source, item.cursor, item.shard, item.epoch_part, index / max(1, len(order)))
    runs = zip(begins.tolist(), (begins + lengths).tolist(), strict=True)
    # Copying run by run is several times faster than one index of every token.
    tokens = np.concatenate([block.tokens[:0], *(block.tokens[begin:end] for begin, end in runs)])
    return Segment(item.cursor, tokens, inside, index, block.digests[chosen], unusable, epochs), trailing


def held_out_segments(source: Single, blocks: Iterable[Any], fraction: float) -> Iterator[Segment]:
    """The held-out documents of each block, in stored order."""
    for item in blocks:
        if not isinstance(item, EpochEnd):
            keep = (item.tokens.lengths > 0) & is_held_out(item.tokens.digests, fraction)
            yield _segment(source, item, np.arange(len(keep)), keep, 0, 0, 0)[0]


def held_out_rows(
    source: Source, tokenizer: Tokenizer, fraction: float, rows: int, length: int,
    cache: Caches | None = None, workers: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Up to `rows` rows of held-out documents: ids [R, length] int64 and doc_start [R, length] int32, with R
    <= rows.

    The same rows at every evaluation. R is 0 when the held-out documents do not fill one row. With a cache
    the blocks that they are in are tokenised whole and kept; without one, only the held-out documents are
    tokenised. Of a mixture: rows of every source, by weight.
    """
    schedule = Schedule([part.weight for part in source.parts])
    schedule.take(rows)
    found = [
        _held_out_rows(part.source, tokenizer, fraction, count, length, own, workers)
        for part, own, count in zip(source.parts, caches_of(source, cache), schedule.given, strict=True)
    ]
    kept = list(itertools.chain.from_iterable(found))
    if not kept:
        return torch.empty((0, length), dtype=torch.int64), torch.empty((0, length), dtype=torch.int32)
    return tensors(kept)


def _held_out_rows(
    source: Single, tokenizer: Tokenizer, fraction: float, rows: int, length: int,
    cache: TokenCache | None, workers: int,
) -> list[Rows]:  # fmt: skip
    """As held_out_rows, of a single source, each row for itself."""
    found: list[Rows] = []
    if fraction <= 0 or rows <= 0:
        return found
    stop = threading.Event()
    pool = WorkerPool(tokenizer, workers, None if cache is not None else (fraction, True))
    try:
        with closing(tokenised(source, epoch_order(source, None), pool, cache, stop)) as blocks:
            packer = Packer(held_out_segments(source, blocks, fraction), length)
            while len(found) < rows and (row := packer.take(1)) is not None:
                found.append(row)
    finally:
        stop.set()
        pool.close()
        if cache is not None:
            cache.release()
    return found
