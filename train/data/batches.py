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
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.tokenizer import Tokenizer
from train.data.blocks import EpochEnd, StoredBlock, Visit, epoch_order, epochs_of, shuffled, tokenised
from train.data.local import LocalSource
from train.data.mixture import Schedule, mix
from train.data.packing import Batch, Packer, Rows, Segment, Tensors, tensors
from train.data.prefetch import Prefetch
from train.data.rows import EXAMPLE
from train.data.source import Block, Cursor, Position, Single, Source, start_of, train_on
from train.data.token_cache import Caches, TokenCache
from train.data.tokenise import TokenBlock, as_text, digest, is_held_out
from train.data.turns import Turn, turns
from train.data.whole import WholePacker, learnable
from train.data.worker_pool import WorkerPool


@dataclass(frozen=True)
class Document:
    """A usable document."""

    text: str
    digest: int


def read_stored(
    source: Source, fraction: float, held_out: bool = False, wanted: int | None = None
) -> Iterator[Document]:
    """The usable documents of one side of the split, once. Those of a mixture take turns by their weights.

    wanted: how many will be taken, of all shards alike (train/data/turns.py). None: all, in stored order.
    """
    counts = [None] * len(source.parts) if wanted is None else shares(source, wanted)
    waiting = {
        index: _documents(part.source, fraction, held_out, count)
        for index, (part, count) in enumerate(zip(source.parts, counts, strict=True))
    }
    schedule = Schedule([part.weight for part in source.parts])
    while waiting:
        if (index := next(schedule)) in waiting:
            if (document := next(waiting[index], None)) is None:
                del waiting[index]
            else:
                yield document


def _documents(source: Single, fraction: float, held_out: bool, wanted: int | None) -> Iterator[Document]:
    if wanted is None:
        visits: Iterable[Turn] = (Turn(shard, sys.maxsize) for shard in range(source.num_shards))
    else:
        visits = turns(source.num_shards, wanted)
    for turn in visits:
        with closing(source.read(turn.shard, turn.block)) as blocks:
            yield from _of_turn(blocks, turn, fraction, held_out, mixed=wanted is not None)


def _of_turn(
    blocks: Iterable[Block], turn: Turn, fraction: float, held_out: bool, mixed: bool
) -> Iterator[Document]:
    """The share of a shard. mixed: from anywhere in a block, which may hold many files."""
    for block in blocks:
        order = _mixed(len(block), turn) if mixed else range(len(block))
        for index in order[turn.place :]:
            if turn.given == turn.share:
                turn.more = True
                return
            turn.place += 1
            text = as_text(block[index])
            if text is not None and is_held_out(key := digest(text), fraction) == held_out:
                turn.given += 1
                yield Document(text, key)
        turn.block, turn.place = turn.block + 1, 0


def _mixed(count: int, turn: Turn) -> list[int]:
    """The order in which a turn looks at the documents of its block."""
    return shuffled(count, f"{turn.shard}/{turn.block}")


def shares(source: Source, count: int) -> list[int]:
    """How many of `count` rows or documents each part of a source gives, by their weights."""
    schedule = Schedule([part.weight for part in source.parts])
    schedule.take(count)
    return schedule.given


def split_fraction(source: Source, fraction: float) -> float:
    """The fraction of documents that is held out: `fraction`, but of few conversations in files, where that
    is none or all of them, so much that it is the one with the smallest digest.

    Reads only as far as there is one on either side, so that of many conversations few are read.
    """
    local = all(isinstance(part.source, LocalSource) for part in source.parts)
    if train_on(source) is None or not local or fraction <= 0:
        return fraction
    sides: set[bool] = set()
    lowest, highest = 1 << 64, 0
    for key in _digests(source):
        sides.add(bool(is_held_out(key, fraction)))
        lowest, highest = min(lowest, key >> 32), max(highest, key >> 32)
        if len(sides) == 2:
            return fraction
    return (lowest + 1) / 2**32 if lowest < highest else fraction


def _digests(source: Source) -> Iterator[int]:
    for part in source.parts:
        for shard in range(part.source.num_shards):
            for stored in itertools.chain.from_iterable(part.source.read(shard)):
                if (text := as_text(stored)) is not None:
                    yield digest(text)


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
    select = None if any(caches) else (validation_fraction, False)
    pool = WorkerPool(tokenizer, workers, select, train_on(source))
    stop = threading.Event()
    packers = []
    for part, own, place in zip(source.parts, caches, at.sources, strict=True):
        key = part.order_key(seed)
        blocks = tokenised(part.source, epoch_order(part.source, key, place), pool, own, stop)
        segments = training_segments(part.source, blocks, key, validation_fraction, place, length)
        packers.append(_packer(part.source, segments, length, tokenizer))
    return _ahead(mix(source, packers, at, rows, rank, world, pin), pool, cache, stop)


def _packer(
    source: Single, segments: Iterator[Segment], length: int, tokenizer: Tokenizer
) -> Packer | WholePacker:
    if source.train_on is None:
        return Packer(segments, length)
    return WholePacker(segments, length, tokenizer.eot_token_id or 0)


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
    source: Single, blocks: Iterable[Any], seed: str, fraction: float, cursor: Cursor, length: int
) -> Iterator[Segment]:
    """The training documents of each block in seeded order. length: of a row. Raises LoadError when a whole
    epoch has none.
    """
    usable = invalid = carried = 0
    for item in blocks:
        if isinstance(item, EpochEnd):
            if item.whole and not usable:
                raise LoadError(f"data: {_nothing(source, invalid, length)}")
            usable = invalid = 0
            continue
        where, block = item.cursor, item.tokens
        if source.train_on is not None:
            item = dataclasses.replace(item, tokens=(block := learnable(block, length)))
        key = f"{seed}/{where.epoch}/{item.shard}/{where.block}"
        order = np.array(shuffled(len(block.lengths), key), np.int64)
        resumed = where == dataclasses.replace(cursor, document=0, token=0)
        first, token = (cursor.document, cursor.token) if resumed else (0, 0)
        keep = (block.lengths > 0) & ~is_held_out(block.digests, fraction)
        segment, trailing = _segment(source, item, order, keep, first, token, carried)
        usable, invalid = usable + len(segment.index), invalid + int(block.unusable.sum())
        carried = trailing
        yield segment


def _nothing(source: Single, invalid: int, length: int) -> str:
    """What to say of a source without a document to train on."""
    if source.train_on is None:
        found = f"found none ({invalid} empty or not text, the others held out)"
        remedy = "check the files and text_column (format=chat for conversations), or lower"
        return f"expected documents to train on, {found}; {remedy} validation_fraction"
    useless = f"{invalid} unreadable or without an answer in the first {length} tokens"
    found = f"found none ({useless}, the others held out)"
    return f"expected conversations to train on, {found}; a row is {EXAMPLE}"


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


def held_out_segments(
    source: Single, pool: WorkerPool, cache: TokenCache | None, stop: threading.Event, fraction: float,
    rows: int, length: int,
) -> Generator[Segment, None, None]:  # fmt: skip
    """Held-out documents for `rows` rows of `length` tokens, of all shards alike (train/data/turns.py), and
    more if more are asked for. A shard's last one is cut where its share ends, a conversation is not.
    """
    whole, used = source.train_on is not None, 0
    for turn in turns(source.num_shards, rows * length, length):
        visit = Visit(Cursor(block=turn.block), turn.shard, 0.0)
        with closing(tokenised(source, [visit], pool, cache, stop)) as blocks:
            for item in blocks:
                assert isinstance(item, StoredBlock) and item.tokens is not None  # no epoch ends here
                tokens = learnable(item.tokens, length) if whole else item.tokens
                item, block = dataclasses.replace(item, tokens=tokens), item.cursor.block
                turn.block, turn.place = block, turn.place if block == turn.block else 0
                keep = (tokens.lengths > 0) & is_held_out(tokens.digests, fraction)
                order = np.array(_mixed(len(keep), turn), np.int64)
                segment = _segment(source, item, order, keep, 0, 0, 0)[0]
                if whole:
                    end = _whole_share(segment, turn, length, used)
                else:
                    end = min(len(segment.tokens), turn.place + turn.share - turn.given)
                    turn.given += end - turn.place
                turn.more = end < len(segment.tokens) or turn.given >= turn.share
                if end > turn.place:
                    yield _cut(segment, turn.place, end)
                turn.place = end
                if turn.more:
                    break
        used += turn.given


def _whole_share(segment: Segment, turn: Turn, length: int, used: int) -> int:
    """Where the conversations end that a turn takes of its block, at least one of a shard. They are counted
    as they fill rows of `length` tokens, with the padding before one that does not fit. used: by the turns
    before.
    """
    end = turn.place
    for document in range(int(np.searchsorted(segment.begins, end)), len(segment.begins)):
        begin, behind = segment.bounds(document)
        size, space = min(behind - begin, length), -(used + turn.given) % length
        size += space if size > space else 0
        if turn.given and turn.given + size > turn.share:
            break
        turn.given, end = turn.given + size, behind
    return end


def _cut(segment: Segment, begin: int, end: int) -> Segment:
    """The documents that lie in some of a segment's tokens; one that is continued counts as new."""
    first = int(np.searchsorted(segment.begins, begin, "right")) - 1
    part = slice(first, int(np.searchsorted(segment.begins, end)))
    return Segment(
        segment.cursor, segment.tokens[begin:end], np.maximum(segment.begins[part] - begin, 0),
        segment.index[part], segment.digests[part], segment.invalid[part], segment.epochs[part],
    )  # fmt: skip


def held_out_rows(
    source: Source, tokenizer: Tokenizer, fraction: float, rows: int, length: int,
    cache: Caches | None = None, workers: int = 0,
) -> Tensors:  # fmt: skip
    """Up to `rows` rows of held-out documents, [R, length] with R <= rows.

    The same rows at every evaluation, from all shards alike (train/data/turns.py). R is 0 when held-out texts
    do not fill one row; of conversations the last row is padded. With a cache the blocks that they are in are
    tokenised whole and kept; without one, only the held-out documents are tokenised. Of a mixture: rows of
    every source, by weight.
    """
    found = [
        _held_out_rows(part.source, tokenizer, fraction, count, length, own, workers)
        for part, own, count in zip(source.parts, caches_of(source, cache), shares(source, rows), strict=True)
    ]
    kept = list(itertools.chain.from_iterable(found))
    if not kept:
        shape, labels = (0, length), None if train_on(source) is None else torch.empty((0, length)).long()
        return Tensors(torch.empty(shape).long(), torch.empty(shape, dtype=torch.int32), labels)
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
    select = None if cache is not None else (fraction, True)
    pool = WorkerPool(tokenizer, workers, select, source.train_on)
    try:
        with closing(held_out_segments(source, pool, cache, stop, fraction, rows, length)) as segments:
            packer = _packer(source, segments, length, tokenizer)
            while len(found) < rows and (row := packer.take(1)) is not None:
                found.append(row)
    finally:
        stop.set()
        pool.close()
        if cache is not None:
            cache.release()
    return found
