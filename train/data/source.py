"""What a source of documents is, and where in it a run has come to.

A source is a list of shards; a shard is a sequence of blocks; a block is a list of documents that is read at
once. So every document has an address (shard, block, index), and a reader can start anywhere. Nothing here
depends on a seed: train/data/batches.py chooses the order. A document is whatever was stored; the reader
leaves out, and counts, what is not text.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

Block = list[Any]
# the pinned commit of a source, or those of a mixture's sources by their names
Revision = str | Mapping[str, str | None] | None


@dataclass(frozen=True)
class Cursor:
    """The first token of a source that has not been read yet. shard and document count in the shuffled order,
    block in the stored one.
    """

    epoch: int = 0
    shard: int = 0
    block: int = 0
    document: int = 0
    token: int = 0

    @property
    def sources(self) -> tuple[Cursor, ...]:
        """As of a mixture of one."""
        return (self,)

    @property
    def rows(self) -> tuple[int, ...]:
        """As of a mixture of one, which gives every row and need not count them."""
        return (0,)


START = Cursor()


@dataclass(frozen=True)
class MixtureCursor:
    """How many rows each source of a mixture has given, and its first token that has not been read yet."""

    rows: tuple[int, ...]
    sources: tuple[Cursor, ...]


Position = Cursor | MixtureCursor


class Source(Protocol):
    """What a run reads: one source of documents, or a mixture of several.

    revision: the pinned version of the documents, where they have one. fingerprint: changes when the
    documents do. older_fingerprints: those that earlier versions gave the same documents, each with what
    forbids to go on with them; nothing if they may. parts: the sources that take turns; of a single source,
    that one.
    """

    @property
    def revision(self) -> Revision: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def older_fingerprints(self) -> Mapping[str, str]: ...

    @property
    def parts(self) -> Sequence[Part]: ...

    def position(self, rows: Sequence[int], sources: Sequence[Cursor]) -> Position:
        """As it is saved: rows given by each of the parts, and how far each has been read."""
        ...


class Single(Source, Protocol):
    """One source. sizes: of each shard in documents or bytes, in which parts of an epoch are measured.

    train_on: of conversations (train/data/rows.py), what is learned; None where documents are texts.
    """

    train_on: str | None

    @property
    def num_shards(self) -> int: ...

    @property
    def sizes(self) -> Sequence[float]: ...

    @property
    def cache_key(self) -> tuple[str, str]:
        """What the source is called, and which version of it this is: no two may have the same."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the token cache notes about the source, for readers and for opening it without the hub."""
        ...

    def span(self, shard: int, block: int) -> tuple[float, float]:
        """The parts (0 to 1) of the shard before and after a block."""
        ...

    def read(self, shard: int, first_block: int = 0) -> Generator[Block, None, None]:
        """Raises LoadError when documents cannot be read. A shard without the block has no more blocks."""
        ...


@dataclass(frozen=True)
class Part:
    """One source of a mixture, whose weights are 1 together. name: None for a single source, which is not a
    mixture to its user; a source of a mixture may be called "".
    """

    name: str | None
    weight: Fraction
    source: Single

    def order_key(self, seed: int | str) -> str:
        """What the order of the source's documents depends on: not on its place in the mixture, nor on what
        else is in it.
        """
        return str(seed) if self.name is None else f"{seed}/{self.name}"


class SingleSource:
    """What makes a source a mixture of one, of texts."""

    train_on: str | None = None

    @property
    def older_fingerprints(self) -> Mapping[str, str]:
        return {}

    @property
    def parts(self: Single) -> Sequence[Part]:
        return [Part(None, Fraction(1), self)]

    def position(self, rows: Sequence[int], sources: Sequence[Cursor]) -> Position:
        return sources[0]


def train_on(source: Source) -> str | None:
    """What is learned of the source's conversations; None where its documents are texts. All of a mixture
    are of one kind.
    """
    return source.parts[0].source.train_on


def start_of(source: Source) -> Position:
    """Before the first document."""
    return source.position([0] * len(source.parts), [START] * len(source.parts))
