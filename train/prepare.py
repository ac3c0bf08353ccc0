"""`python -m train.prepare [config.yaml] [key=value ...]`: fills the token cache ahead of a run, which then
needs no network for it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from smollm2.cli import program, run_command
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.tokenizer import Tokenizer
from train.build import tokenizer_for
from train.command_line import parse
from train.config import RunConfig
from train.data.batches import held_out_rows, shares, split_fraction
from train.data.blocks import EpochEnd, epoch_order, tokenised
from train.data.open import open_source
from train.data.source import Part, Source
from train.data.token_cache import TokenCache, open_caches
from train.data.tokenise import TokenBlock, is_held_out
from train.data.worker_pool import WorkerPool

HELP = """usage: python -m train.prepare [config.yaml] [key=value ...] [--tokens N] [--verify] [--debug]

Downloads and tokenises what a run will read, in the order in which it reads it, into its token cache: the
held-out documents, then the training documents of its first epoch. Takes the arguments of python -m
train.run; the run must have the same data, tokenizer and seed. What is there already is verified and skipped,
so that an interrupted command continues when it is given again. Of a mixture, every source is filled in turn,
with its share of the tokens.
  --tokens N  stop at this many training tokens (default: what all steps of the run read, at most one epoch)
  --verify    store nothing, and check every block in the cache; exit code 1 if one is damaged
  --debug     show the traceback of an error

example: python -m train.prepare smollm2_135m.yaml workers=8 --tokens 100000000"""

PAUSE = 10.0  # seconds between lines where there is no terminal for a progress bar


@dataclass
class Totals:
    """What went by. tokens: all; training_tokens: those of documents that are not held out."""

    blocks: int = 0
    documents: int = 0
    unusable: int = 0
    tokens: int = 0
    training_tokens: int = 0
    lost: int = 0  # blocks that could not be stored

    def add(self, block: TokenBlock, held_out: float) -> None:
        """held_out: the fraction of documents that are not trained on."""
        self.blocks += 1
        self.documents += len(block.lengths)
        self.unusable += int(block.unusable.sum())
        self.tokens += len(block.tokens)
        self.training_tokens += int(block.lengths[~is_held_out(block.digests, held_out)].sum())


class ProgressLine:
    """A progress bar on a terminal, else a line now and then."""

    def __init__(self, total: int) -> None:
        self.total, self.begin, self.noted = total, time.monotonic(), time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="tok", unit_scale=True, dynamic_ncols=True)

    def update(self, totals: Totals) -> None:
        if self.bar is not None:
            self.bar.update(min(totals.training_tokens, self.total) - self.bar.n)
        elif time.monotonic() - self.noted > PAUSE:
            self.noted = time.monotonic()
            done = f"{totals.training_tokens:,} of {self.total:,} training tokens"
            print(f"{done}, {totals.tokens / (self.noted - self.begin):,.0f} tokens/s", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def prepare(config: RunConfig, tokens: int | None = None) -> Totals:
    """Fills the cache with the held-out documents, then with `tokens` training tokens or the end of the
    epoch; of a mixture, those of all its sources that have one.

    Raises UsageError when config keeps no cache, LoadError when documents cannot be read or stored.
    """
    source, caches, tokenizer, split = _open(config)
    wanted = tokens if tokens is not None else config.steps * config.tokens_per_step
    held_out = shares(source, config.eval_batches * config.batch_size)
    found = [
        _fill(part, cache, tokenizer, config, split, math.ceil(wanted * part.weight), rows)
        for part, cache, rows in zip(source.parts, caches, held_out, strict=True)
        if cache is not None
    ]
    return Totals(*map(sum, zip(*map(dataclasses.astuple, found), strict=True)))


def _fill(
    part: Part, cache: TokenCache, tokenizer: Tokenizer, config: RunConfig, split: float, wanted: int,
    rows: int,
) -> Totals:  # fmt: skip
    """Fills one cache with what `rows` rows of an evaluation need, then until it has `wanted` training tokens
    or an epoch. split: the part of the documents that is held out.
    """
    source = part.source
    fraction = split if config.eval_every else 0.0
    pool = WorkerPool(tokenizer, config.workers, None, source.train_on)
    stop, totals = threading.Event(), Totals()
    first = "held-out documents, then " if fraction else ""
    print(f"{source.fingerprint}: {first}{wanted:,} training tokens, into {cache.folder}", flush=True)
    begin = time.monotonic()
    held_out_rows(source, tokenizer, fraction, rows, config.sequence_length, cache, config.workers)
    order = epoch_order(source, part.order_key(config.seed))
    try:
        with (
            closing(ProgressLine(wanted)) as progress,
            closing(tokenised(source, order, pool, cache, stop)) as blocks,
        ):
            for item in blocks:
                if isinstance(item, EpochEnd) or totals.training_tokens >= wanted:
                    break
                assert item.tokens is not None  # tokenised() gives none without
                totals.add(item.tokens, split)
                totals.lost += not cache.has(item.shard, item.cursor.block)
                progress.update(totals)
    except KeyboardInterrupt:
        print("stopped; what was stored stays, and the same command continues", flush=True)
        raise
    finally:
        stop.set()
        pool.close()
        cache.close()
    seconds = time.monotonic() - begin
    print_totals(totals, cache)
    if new := cache.stored_tokens:
        print(f"tokenised now: {new:,} tokens, {new / seconds:,.0f} tokens/s", flush=True)
    else:
        print("all of it was there already, and is sound", flush=True)
    if totals.lost:
        reason = f"{totals.lost} blocks could not be stored (see above)"
        raise LoadError(f"{cache.folder}: {reason}; run the command again when that is settled")
    return totals


def verify(config: RunConfig) -> int:
    """Checks every stored block of the run's sources and tokenizer. Returns how many are damaged."""
    damaged = 0
    _, caches, _, split = _open(config)
    for cache in filter(None, caches):
        totals = Totals()
        with closing(cache):
            for _, _, block in cache.verify():
                if block is None:
                    damaged += 1
                else:
                    totals.add(block, split)
            print_totals(totals, cache)
    remedy = "; the next run, or this command without --verify, makes them anew" if damaged else ""
    print(f"{damaged} damaged blocks{remedy}", flush=True)
    return damaged


def print_totals(totals: Totals, cache: TokenCache) -> None:
    documents = f"{totals.documents:,} documents ({totals.unusable:,} of them unusable)"
    size = f"{totals.tokens:,} tokens; {cache.size():,} bytes in {cache.folder}"
    print(f"{totals.blocks:,} blocks, {documents}, {size}", flush=True)


def _open(config: RunConfig) -> tuple[Source, Sequence[TokenCache | None], Tokenizer, float]:
    """The source, the caches of its parts, at least one, and the part of their documents that is held out."""
    source = open_source(config)
    tokenizer = tokenizer_for(config, source)
    caches = open_caches(config, source, tokenizer).parts
    if not any(caches):
        raise UsageError(
            f"token_cache: expected a folder to fill, got {config.token_cache} with data={config.data}; "
            "name one with token_cache=FOLDER, here and for the run"
        )
    return source, caches, tokenizer, split_fraction(source, config.held_out_fraction)


def main(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        command = "python -m train.prepare"
        print(HELP.replace(command, program(command)))
        return 0
    rest = [argument for argument in argv if argument not in ("--debug", "--verify")]
    tokens = None
    if "--tokens" in rest:
        place = rest.index("--tokens")
        value = rest[place + 1].replace("_", "") if place + 1 < len(rest) else "nothing"
        if not value.isdigit() or int(value) == 0:
            raise UsageError(f"--tokens: expected a number above 0, got {value}")
        tokens = int(value)
        del rest[place : place + 2]
    config, _ = parse(rest)
    if "--verify" in argv:
        return 1 if verify(config) else 0
    prepare(config, tokens)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
