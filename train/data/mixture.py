"""Several sources as one: which of them each row of a run comes from, and how far each of them has been read.

A source is read as if it were alone, in its own seeded order, into rows of its own; a row never holds
documents of two sources. The schedule says which source gives the next row. It is a function of the weights
and of the number of the row alone, and keeps the shares exact: after any number of rows n, a source of share
w has given n * w rows, off by at most 1 - 1 / (2 * sources - 2), so that any window of n rows, wherever it
begins, is off by less than 2. (Tijdeman 1980, "The chairman assignment problem", which is this one; no
schedule has a smaller bound.) A random choice would be off by about sqrt(n).

A source that comes to its end begins again, in another order, as often as its weight asks for: its epochs are
counted.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import lcm
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smollm2.errors import LoadError
from train.data.packing import START, Batch, Cursor
from train.data.worker_pool import WorkerPool

if TYPE_CHECKING:
    from smollm2.pretrained.tokenizer import Tokenizer
    from train.config import MixturePart, RunConfig
    from train.data.corpus import Block, Source
    from train.data.token_cache import TokenCache

# the pinned commit of a source, or those of a mixture's sources by their names
Revision = str | Mapping[str, str | None] | None


@dataclass(frozen=True)
class MixtureCursor:
    """How many rows each source has given, and its first token that has not been read yet."""

    rows: tuple[int, ...]
    sources: tuple[Cursor, ...]


class Schedule(Iterator[int]):
    """The source of every row, endlessly, after the rows that have been given.

    Row by row the sources compete: one may be chosen once it is behind its share by 1 / (2 * sources - 2)
    rows, and is, if it would be the first to fall too far behind. In integers, since rounding would decide
    ties.
    """

    def __init__(self, weights: Sequence[Fraction], given: Sequence[int] = ()) -> None:
        """weights: above 0, in any unit. given: the rows of each source so far, as a schedule of the same
        weights gave them.
        """
        scale = lcm(*(weight.denominator for weight in weights))
        self._weights = [int(weight * scale) for weight in weights]
        self._total = sum(self._weights)
        self.given = list(given) or [0] * len(weights)
        self._row = sum(self.given)

    def __next__(self) -> int:
        self._row += 1
        total, slack = self._total, max(1, 2 * len(self._weights) - 2)
        chosen, best, best_weight = -1, 0, 1
        for source, (weight, given) in enumerate(zip(self._weights, self.given, strict=True)):
            # rows behind the share, in units of 1 / (total * slack)
            behind = slack * (self._row * weight - total * given)
            if behind >= total or len(self._weights) == 1:
                left = (slack - 1) * total - behind  # / weight: how long it may still wait
                if chosen < 0 or left * best_weight < best * weight:
                    chosen, best, best_weight = source, left, weight
        self.given[chosen] += 1
        return chosen


@dataclass(frozen=True)
class Share:
    """What one source gave to a step: how many rows, and as in Batch. Without rows, epochs is 0."""

    rows: int
    cursor: Cursor
    digests: np.ndarray
    invalid: int
    epochs: float


@dataclass(frozen=True)
class MixedBatch(Batch):
    """A batch of rows of several sources. epochs: the most of those that are in it."""

    cursor: MixtureCursor  # type: ignore[assignment]  # of all sources, where Batch has that of one
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    name: str
    weight: Fraction  # of all weights together, which are 1
    source: Source
    key: MixturePart  # what the configuration says of it


class MixtureSource:
    """The sources of a mixture, which is also a source: its shards are theirs, one source after the other. That is for what wants the
    documents in stored order; training reads each source by itself."""

    def __init__(self, keys: Sequence[MixturePart], sources: Sequence[Source]) -> None:
        total = sum(key.weight for key in keys)
        self.parts = [
            Part(key.name, key.weight / total, one, key) for key, one in zip(keys, sources, strict=True)
        ]

    @property
    def weights(self) -> list[Fraction]:
        return [part.weight for part in self.parts]

    @property
    def start(self) -> MixtureCursor:
        return MixtureCursor((0,) * len(self.parts), (START,) * len(self.parts))

    @property
    def revision(self) -> Revision:
        return {part.name: _single(part.source.revision) for part in self.parts}

    @property
    def num_shards(self) -> int:
        return sum(part.source.num_shards for part in self.parts)

    @property
    def sizes(self) -> Sequence[float]:
        """Of each shard, as a part of all that is read."""
        found: list[float] = []
        for part in self.parts:
            total = sum(part.source.sizes) or 1.0
            found += [float(part.weight) * size / total for size in part.source.sizes]
        return found

    @property
    def fingerprint(self) -> str:
        listed = "; ".join(
            f"{float(part.weight):.4g} {part.name}: {part.source.fingerprint}" for part in self.parts
        )
        return f"mixture of {len(self.parts)} ({listed})"

    @property
    def cache_key(self) -> tuple[str, str]:
        raise TypeError("a mixture has no cache of its own: its sources have")

    def describe(self) -> dict[str, Any]:
        return {part.name: part.source.describe() for part in self.parts}

    def span(self, shard: int, block: int) -> tuple[float, float]:
        source, shard = self._place(shard)
        return source.span(shard, block)

    def read(self, shard: int, first_block: int = 0) -> Iterator[Block]:
        source, shard = self._place(shard)
        return source.read(shard, first_block)

    def _place(self, shard: int) -> tuple[Source, int]:
        for part in self.parts:
            if shard < part.source.num_shards:
                return part.source, shard
            shard -= part.source.num_shards
        raise IndexError(f"shard: expected below {self.num_shards}, got {shard + self.num_shards}")


def _single(revision: Revision) -> str | None:
    return revision if isinstance(revision, str) else None


class MixtureCache:
    """The token caches of a mixture's sources, in their order; None for a source without one."""

    def __init__(self, parts: Sequence[TokenCache | None]) -> None:
        self.parts = list(parts)

    def release(self) -> None:
        for cache in self.parts:
            if cache is not None:
                cache.release()

    def close(self) -> None:
        for cache in self.parts:
            if cache is not None:
                cache.close()


def order_key(seed: int, name: str) -> str:
    """What the order of a source's documents depends on: not on its place in the mixture, nor on what else is
    in it.
    """
    return f"{seed}/{name}"


def mix(
    source: MixtureSource,
    streams: Sequence[Generator[Batch, None, None]],
    cursor: MixtureCursor,
    rows: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Generator[MixedBatch, None, None]:
    """Steps of `rows` rows, put together from the sources' streams of single rows, which begin at `cursor`.

    Of each, rank r of world gets rows [r * rows / world, (r + 1) * rows / world). pin: in page-locked memory,
    for a GPU. Raises LoadError with the name of the source that cannot be read.
    """
    schedule = Schedule(source.weights, cursor.rows)
    cursors = cursor.sources
    own = slice(rank * rows // world, (rank + 1) * rows // world)
    while True:
        chosen = list(islice(schedule, rows))
        step: list[Batch] = []
        for index in chosen:
            try:
                row = next(streams[index], None)
            except LoadError as error:
                raise LoadError(f"mixture: {source.parts[index].name}: {error}") from error
            if row is None:  # closed meanwhile
                return
            step.append(row)
        shares = tuple(
            _share([row for at, row in zip(chosen, step, strict=True) if at == index], before)
            for index, before in enumerate(cursors)
        )
        cursors = tuple(share.cursor for share in shares)
        ids, starts = (
            torch.cat([row.input_ids for row in step[own]]),
            torch.cat([row.doc_start for row in step[own]]),
        )
        if pin and torch.cuda.is_available():
            ids, starts = ids.pin_memory(), starts.pin_memory()
        yield MixedBatch(
            ids, starts, sum(row.inner_starts for row in step), sum(row.tokens for row in step),
            MixtureCursor(tuple(schedule.given), cursors), np.concatenate([row.digests for row in step]),
            sum(row.invalid for row in step), max(row.epochs for row in step), shares,
        )  # fmt: skip


def _share(rows: Sequence[Batch], before: Cursor) -> Share:
    """The rows of one source in a step; without any it stays where it was."""
    if not rows:
        return Share(0, before, np.empty(0, np.uint64), 0, 0.0)
    cursor, digests = rows[-1].cursor, np.concatenate([row.digests for row in rows])
    assert isinstance(cursor, Cursor)  # of a single source
    return Share(len(rows), cursor, digests, sum(row.invalid for row in rows), rows[-1].epochs)


def mixture_lines(
    source: MixtureSource, config: RunConfig, tokenizer: Tokenizer, cache: TokenCache | MixtureCache | None
) -> list[str]:
    """For --dry-run, a line for every source: its share, the tokens that the run reads of it, and, where the
    size of the source is known, its epochs. A size is counted where the token cache has all of the source,
    else estimated from its first block.
    """
    caches = cache.parts if isinstance(cache, MixtureCache) else [None] * len(source.parts)
    width = max(len(part.name) for part in source.parts)
    lines: list[str] = []
    for part, own in zip(source.parts, caches, strict=True):
        share = config.steps * config.tokens_per_step * float(part.weight)
        size, about = own.tokens_of(part.source.num_shards) if own is not None else None, ""
        if size is None:
            size, about = estimated_tokens(part.source, tokenizer, own), "about "
        extent = (
            f"of {about}{size:,}: {about}{share / size:,.2f} epochs"
            if size
            else "of a source of unknown size"
        )
        lines.append(
            f"{'mixture' if not lines else '':10}{part.name:{width}}  {float(part.weight):7.2%}  {share:,.0f} tokens {extent}"
        )
    return lines


SOME_DOCUMENTS = 200  # tokenised for an estimate


def estimated_tokens(source: Source, tokenizer: Tokenizer, cache: TokenCache | None = None) -> int | None:
    """The tokens of a source, from its first block, or the first documents of it, and the part of the source
    that the block is; None if that is not known, or the block cannot be read.

    Off by as much as other documents are longer or shorter.
    """
    begin, end = source.span(0, 0)
    part = (end - begin) * source.sizes[0] / (sum(source.sizes) or 1.0)
    stored = cache.get(0, 0) if cache is not None else None
    if stored is not None and part > 0:
        return round(len(stored.tokens) / part)
    try:
        block = next(source.read(0), []) if part > 0 else []
    except LoadError:
        return None
    if not block:
        return None
    tokens = len(WorkerPool(tokenizer, 0).encode(block[:SOME_DOCUMENTS]).tokens)
    return round(tokens * len(block) / len(block[:SOME_DOCUMENTS]) / part)
