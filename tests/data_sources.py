"""Documents in memory, and when two batches are the same: for the tests of the data pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from train.data.packing import Batch
from train.data.source import Block, SingleSource


class ListSource(SingleSource):
    """Documents in memory: shards of blocks."""

    revision: str | None = None
    fingerprint = "list"

    def __init__(self, shards: list[list[Block]]) -> None:
        self.shards = shards
        self.sizes = [float(sum(map(len, shard))) for shard in shards]
        self.cache_key = ("list", "1")

    def span(self, shard: int, block: int) -> tuple[float, float]:
        counts = [len(one) for one in self.shards[shard]]
        return sum(counts[:block]) / sum(counts), sum(counts[: block + 1]) / sum(counts)

    def describe(self) -> dict[str, Any]:
        return {}

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def read(self, shard: int, first_block: int = 0) -> Iterator[Block]:
        yield from self.shards[shard][first_block:]


def some_source(shards: int = 3, blocks: int = 2, documents: int = 5) -> ListSource:
    def text(shard: int, block: int, index: int) -> object:
        return (
            None
            if index == 3
            else f"document {shard}.{block}.{index} " * (1 + (7 * shard + 3 * block + index) % 5)
        )

    return ListSource(
        [[[text(s, b, i) for i in range(documents)] for b in range(blocks)] for s in range(shards)]
    )


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.input_ids, other.input_ids) and torch.equal(one.doc_start, other.doc_start)
        and np.array_equal(one.digests, other.digests) and one.inner_starts == other.inner_starts
        and (one.cursor, one.invalid, one.epochs) == (other.cursor, other.invalid, other.epochs)
    )  # fmt: skip
