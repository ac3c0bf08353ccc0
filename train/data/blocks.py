"""The blocks of a source in the order in which an epoch reads them, as tokens: from the cache where it has
them, else tokenised.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from train.data.prefetch import Prefetch
from train.data.source import START, Block, Cursor, Single
from train.data.token_cache import TokenCache
from train.data.tokenise import TokenBlock
from train.data.worker_pool import Pending, Stopped, WorkerPool


@dataclass(frozen=True)
class Visit:
    """A shard whose turn it is. cursor: of the first block to read. epoch_part: the part of the epoch that
    lies before the shard.
    """

    cursor: Cursor
    shard: int  # as stored
    epoch_part: float


@dataclass(frozen=True)
class StoredBlock:
    """One block: its documents, or their tokens if the cache has them."""

    cursor: Cursor
    shard: int  # as stored
    epoch_part: float
    documents: Block
    tokens: TokenBlock | None


@dataclass(frozen=True)
class ShardEnd:
    """After the last block of a shard. blocks: how many it has."""

    shard: int
    blocks: int


@dataclass(frozen=True)
class EpochEnd:
    """After the last block of an epoch. whole: all of it was read."""

    whole: bool


def shuffled(count: int, key: str) -> list[int]:
    """A permutation of range(count) that depends on the key alone.

    Sorting by random() and not random.shuffle: Python promises the same numbers from random() in every
    version.
    """
    generator = random.Random(key)
    weights = [generator.random() for _ in range(count)]
    return sorted(range(count), key=weights.__getitem__)


def epoch_order(source: Single, seed: int | str, cursor: Cursor = START) -> Iterator[Visit | EpochEnd]:
    """The shards from a position on, epoch after epoch, without end."""
    sizes = source.sizes
    total = sum(sizes) or 1.0
    while True:
        whole, done = cursor == Cursor(epoch=cursor.epoch), 0.0
        for position, shard in enumerate(shuffled(source.num_shards, f"{seed}/{cursor.epoch}")):
            if position >= cursor.shard:
                block = cursor.block if position == cursor.shard else 0
                yield Visit(Cursor(cursor.epoch, position, block), shard, done / total)
            done += sizes[shard]
        yield EpochEnd(whole)
        cursor = Cursor(cursor.epoch + 1)


def epochs_of(source: Single, cursor: Cursor, shard: int, epoch_part: float, parts: np.ndarray) -> np.ndarray:
    """Passes over the corpus up to the documents that lie at `parts` (0 to 1) of a block."""
    begin, end = source.span(shard, cursor.block)
    share = source.sizes[shard] / (sum(source.sizes) or 1.0)
    return cursor.epoch + epoch_part + share * (begin + (end - begin) * parts)


def stored_blocks(
    source: Single, order: Iterable[Visit | EpochEnd], cache: TokenCache | None, stop: threading.Event
) -> Generator[StoredBlock | ShardEnd | EpochEnd, None, None]:
    """The blocks of every shard in turn. The source is only asked for what the cache lacks."""
    for visit in order:
        if isinstance(visit, EpochEnd):
            yield visit
            continue
        shard, block = visit.shard, visit.cursor.block
        while not stop.is_set():
            tokens = cache.get(shard, block, stop) if cache is not None else None
            if tokens is not None:
                yield StoredBlock(replace(visit.cursor, block=block), shard, visit.epoch_part, [], tokens)
                block += 1
                continue
            if cache is not None and (blocks := cache.blocks(shard)) is not None and block >= blocks:
                break
            # A run of blocks that are missing: the source is opened once for all of them.
            for documents in source.read(shard, block):
                yield StoredBlock(
                    replace(visit.cursor, block=block), shard, visit.epoch_part, documents, None
                )
                block += 1
                if stop.is_set() or (cache is not None and cache.has(shard, block)):
                    break
            else:
                yield ShardEnd(shard, block)
                break
        if stop.is_set():
            return


def tokenised(
    source: Single, order: Iterable[Visit | EpochEnd], pool: WorkerPool, cache: TokenCache | None,
    stop: threading.Event,
) -> Generator[StoredBlock | EpochEnd, None, None]:  # fmt: skip
    """The blocks of every shard in turn, each with its tokens; several are with the workers at a time. Fills
    the cache.

    With workers a thread reads ahead, so that the workers need not wait for a slow network.
    """
    stored = Prefetch(stored_blocks(source, order, cache, stop), stop, 2, pool.workers > 0)
    pending: deque[tuple[Any, Pending | None]] = deque()
    exhausted = False
    try:
        while pending or not exhausted:
            # Each worker should have one chunk in work and one waiting. No more, since blocks that are read
            # ahead are held in memory.
            while not exhausted and (
                not pending or (pool.workers and _wants_more(pending, pool.workers, stored.ready))
            ):
                item = next(stored, None)
                if item is None:
                    exhausted = True
                else:
                    absent = item.documents if isinstance(item, StoredBlock) and item.tokens is None else None
                    pending.append((item, None if absent is None else pool.submit(absent)))
            if not pending:
                return
            item, work = pending.popleft()
            if isinstance(item, ShardEnd):
                if cache is not None:
                    cache.finish(item.shard, item.blocks)
                continue
            if work is not None:
                item = replace(item, documents=[], tokens=work.result(stop))
                if cache is not None:
                    cache.put(item.shard, item.cursor.block, item.tokens)
            yield item
    except Stopped:
        return
    finally:
        stored.close()


def _wants_more(pending: deque[tuple[Any, Pending | None]], workers: int, ready: bool) -> bool:
    head = pending[0][1]
    if head is None or (head.chunks == 0 and not ready) or len(pending) > 64:
        return False  # the first block can be handed on now
    return len(pending) < 2 or sum(work.chunks for _, work in pending if work is not None) < 2 * workers
