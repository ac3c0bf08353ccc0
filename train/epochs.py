"""How many optimizer steps so many passes over the documents are."""

from __future__ import annotations

import contextlib

from train.build import model_source, tokenizer_for
from train.config import RunConfig
from train.data.batches import split_fraction, training_batches
from train.data.open import open_source
from train.distributed import World


def steps_of(config: RunConfig, epochs: float, world: World) -> int:
    """How many steps `epochs` passes over the training documents take. Rank 0 reads and tokenises them once,
    with config.workers processes, for all ranks. Raises LoadError or UsageError for data that cannot be used.
    """
    config.validate()
    return world.from_main(lambda: _count(config, epochs))


def _count(config: RunConfig, epochs: float) -> int:
    print(f"counting the tokens of {', '.join(config.paths) or config.data} ...", flush=True)
    source = open_source(config)
    with contextlib.redirect_stdout(None):  # the run says where the model comes from
        weights = None if config.from_scratch else model_source(config.model)
    batches = training_batches(
        source, tokenizer_for(config, source, weights), rows=1, length=config.sequence_length,
        seed=config.seed, validation_fraction=split_fraction(source, config.held_out_fraction),
        workers=config.workers,
    )  # fmt: skip
    rows, seen = 0, 0.0
    with contextlib.closing(batches):
        while seen < 1:
            rows, seen = rows + 1, next(batches).epochs
    return max(1, round(epochs * rows / seen / config.rows_per_step))
