"""Several sources as one: which of them each row of a run comes from, and how far each of them has been read.

Each source is read in its own seeded order, into rows of its own; a row never holds documents of two sources.
The schedule says which source gives the next row. It is a function of the weights and of the number of the
row alone, and keeps the shares exact: after any number of rows n, a source of share w has given n * w rows,
off by at most 1 - 1 / (2 * sources - 2), so that any window of n rows, wherever it begins, is off by less
than 2. (Tijdeman 1980, "The chairman assignment problem", which is this one; no schedule has a smaller
bound.) A random choice would be off by about sqrt(n).

A source that comes to its end begins again, in another order, as often as its weight asks for: its epochs are
counted. A single source is a mixture of one (train/data/source.py).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import islice, product
from math import lcm

import numpy as np
import torch

from smollm2.errors import LoadError
from train.data.packing import Batch, Packer, Rows, Tensors, tensors
from train.data.source import Cursor, MixtureCursor, Part, Position, Revision, Source
from train.data.whole import WholePacker


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

    def take(self, rows: int) -> list[int]:
        """The sources of the next rows."""
        if len(self._weights) > 1:
            return list(islice(self, rows))
        self._row, self.given = self._row + rows, [self.given[0] + rows]
        return [0] * rows


class MixtureSource:
    """The sources of a mixture."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """parts: with names, each another, and weights in any unit."""
        total = sum(part.weight for part in parts)
        self.parts: Sequence[Part] = [replace(part, weight=part.weight / total) for part in parts]

    def position(self, rows: Sequence[int], sources: Sequence[Cursor]) -> Position:
        return MixtureCursor(tuple(rows), tuple(sources))

    @property
    def revision(self) -> Revision:
        # none of them is a mixture
        return {part.name: part.source.revision for part in self.parts}  # type: ignore[misc]

    @property
    def fingerprint(self) -> str:
        return self._fingerprint([part.source.fingerprint for part in self.parts])

    @property
    def older_fingerprints(self) -> Mapping[str, str]:
        older = [dict(part.source.older_fingerprints) or {part.source.fingerprint: ""} for part in self.parts]
        return {
            self._fingerprint([one for one, _ in chosen]): next(filter(None, (why for _, why in chosen)), "")
            for chosen in product(*(one.items() for one in older))
        }

    def _fingerprint(self, fingerprints: Sequence[str]) -> str:
        pairs = zip(self.parts, fingerprints, strict=True)
        listed = "; ".join(f"{float(part.weight):.4g} {part.name}: {one}" for part, one in pairs)
        return f"mixture of {len(self.parts)} ({listed})"


def mix(
    source: Source, packers: Sequence[Packer | WholePacker], position: Position, rows: int, rank: int = 0,
    world: int = 1, pin: bool = False,
) -> Generator[Batch, None, None]:  # fmt: skip
    """Steps of `rows` rows, put together from the rows of the source's parts, which begin at `position`.

    Of each, rank r of world gets rows [r * rows / world, (r + 1) * rows / world). pin: in page-locked memory,
    for a GPU. Ends when a packer has no more. Raises LoadError with the name of the source that cannot be
    read.
    """
    schedule = Schedule([part.weight for part in source.parts], position.rows)
    cursors = position.sources
    while True:
        chosen = schedule.take(rows)
        found: list[Rows] = []
        for index, (part, packer) in enumerate(zip(source.parts, packers, strict=True)):
            try:
                taken = packer.take(chosen.count(index), cursors[index])
            except LoadError as error:
                if part.name is None:
                    raise
                raise LoadError(f"mixture: {part.name}: {error}") from error
            if taken is None:  # closed meanwhile
                return
            found.append(taken)
        shares = tuple(one.share for one in found)
        cursors = tuple(share.cursor for share in shares)
        own: slice | np.ndarray = slice(rank * rows // world, (rank + 1) * rows // world)
        if len(found) > 1:  # the rows lie source by source: where this rank's of the step are
            own = np.argsort(np.argsort(chosen, kind="stable"))[own]
        made = tensors(found, own)
        if pin and torch.cuda.is_available():
            made = Tensors(*(None if part is None else part.pin_memory() for part in made))  # type: ignore[arg-type]
        yield Batch(
            made.ids,
            made.doc_start,
            inner_starts=sum(one.inner_starts for one in found),
            tokens=sum(one.tokens.size for one in found),
            cursor=source.position(schedule.given, cursors),
            digests=np.concatenate([share.digests for share in shares]),
            invalid=sum(share.invalid for share in shares),
            epochs=max(share.epochs for share in shares),
            shares=shares,
            labels=made.labels,
            learned=None if made.labels is None else sum(one.learned or 0 for one in found),
        )
