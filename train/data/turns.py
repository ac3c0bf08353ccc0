"""Some documents of a whole corpus: an even share of every shard, where not all of it is to be read.

The files of a corpus differ, by language or by subject, and what is learned or measured on the first of them
says little about the others. So its shards are visited in a seeded order, and each gives its share before the
next one is opened. Where that does not suffice, those that have more go on where they stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from train.data.blocks import shuffled

# Shards that share what is wanted: each costs the opening of a file, and with a token cache a whole block.
SPREAD = 32


@dataclass
class Turn:
    """A shard whose turn it is. Who reads it counts what it gave, keeps the place behind that (a block, and
    how much of its part that is looked for), and says whether it may have more.
    """

    shard: int
    share: int = 0
    given: int = 0
    block: int = 0
    place: int = 0
    more: bool = False


def turns(shards: int, wanted: int, least: int = 1) -> Iterator[Turn]:
    """The shards, each with its share of `wanted`, at least `least`, until that has been given and no shard
    has more. The order depends on their number alone, so that runs with other seeds can be compared.
    """
    waiting = [Turn(shard) for shard in shuffled(shards, "turns")]
    while waiting:
        share = max(least, math.ceil(wanted / min(SPREAD, len(waiting))))
        for turn in waiting:
            turn.share, turn.given, turn.more = share, 0, False
            yield turn
            wanted -= turn.given
        waiting = [turn for turn in waiting if turn.more]
