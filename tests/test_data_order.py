"""The order of documents: seeded, complete in every epoch, split by content, and resumable at every batch."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sources import ListSource, same, some_source
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.errors import UsageError
from smollm2.pretrained.tokenizer import Tokenizer, train_tokenizer
from train.data.batches import held_out_rows, read_stored, training_batches
from train.data.blocks import shuffled
from train.data.prefetch import Prefetch
from train.data.state import DataState, UniqueCounter
from train.data.tokenise import digest, is_held_out


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for_order()


def texts(source: ListSource, count: int, seed: int = 0, fraction: float = 0.0) -> list[str]:
    """The documents of the first `count` that batches hold, by their digests."""
    known = {digest(text): text for shard in source.shards for block in shard for text in block if text}
    batches = training_batches(
        source, tokenizer_for_order(), rows=1, length=2, seed=seed, validation_fraction=fraction
    )
    found = (known[int(key)] for batch in batches for key in batch.digests)
    return list(itertools.islice(found, count))


@functools.cache
def tokenizer_for_order() -> Tokenizer:
    return train_tokenizer(["document 0123456789 . " * 5], 280)


def test_every_epoch_has_every_document_once_in_another_order():
    source = some_source()
    usable = [document.text for document in read_stored(source, 0.0, held_out=False)]
    assert len(usable) == 24
    first, second = (texts(source, 48)[part : part + 24] for part in (0, 24))
    assert sorted(first) == sorted(second) == sorted(usable)
    assert first != second != usable


def test_the_seed_alone_decides_the_order():
    assert texts(some_source(), 40, seed=1) == texts(some_source(), 40, seed=1)
    assert texts(some_source(), 40, seed=1) != texts(some_source(), 40, seed=2)


def test_orders_and_digests_are_the_same_in_every_process():
    # As written down once: a change would move the documents of every saved position.
    assert shuffled(8, "0/0") == [0, 3, 7, 4, 1, 5, 2, 6]
    assert digest("SmolLM2") == 11487967147309650736
    code = "from train.data.tokenise import digest; print(digest('SmolLM2'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=True,
    )
    assert int(done.stdout) == digest("SmolLM2")


@settings(max_examples=25, deadline=None)
@given(
    shards=st.integers(1, 3), blocks=st.integers(1, 3), documents=st.integers(1, 6), rows=st.integers(1, 2),
    length=st.integers(2, 40), seed=st.integers(0, 5),
)  # fmt: skip
def test_reading_on_from_any_batch_gives_the_batches_that_would_have_come(
    tokenizer, shards, blocks, documents, rows, length, seed
):
    source = some_source(shards, blocks, documents)
    batches = list(
        itertools.islice(training_batches(source, tokenizer, rows=rows, length=length, seed=seed), 12)
    )
    state = DataState("list")
    for number, batch in enumerate(batches[:-1]):
        state.consume(batch)
        saved = json.loads(json.dumps(state.to_json()))
        cursor = DataState.from_json(saved, state.unique.state()).cursor
        after = training_batches(source, tokenizer, rows=rows, length=length, seed=seed, cursor=cursor)
        assert same(next(after), batches[number + 1])


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_prepared_ahead_are_the_same_and_the_state_is_of_the_consumed_one(tokenizer, workers):
    arguments = dict(rows=2, length=16, seed=3)
    alone = list(itertools.islice(training_batches(some_source(), tokenizer, **arguments), 20))
    ahead = training_batches(some_source(), tokenizer, **arguments, workers=workers)
    state = DataState("list")
    for number in range(10):
        batch = next(ahead)  # by now the thread has prepared later ones
        assert same(batch, alone[number])
        state.consume(batch)
        assert state.cursor == alone[number].cursor
    ahead.close()
    resumed = training_batches(some_source(), tokenizer, **arguments, cursor=state.cursor, workers=workers)
    assert all(same(next(resumed), batch) for batch in alone[10:])
    resumed.close()


def test_an_error_in_the_background_arrives_in_the_loop():
    def failing() -> Generator[int, None, None]:
        yield 1
        raise OSError("disk gone")

    items = Prefetch(failing(), threading.Event(), 4)
    assert next(items) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(items)


def test_held_out_documents_are_never_trained_on_and_their_share_is_as_asked():
    source = ListSource([[[f"text number {index}" for index in range(4000)]]])
    held_out = [document.text for document in read_stored(source, 0.1, held_out=True)]
    training = set(texts(source, 2 * (4000 - len(held_out)), fraction=0.1))
    assert not training & set(held_out)
    assert len(training) + len(held_out) == 4000
    assert 330 < len(held_out) < 470  # 400, standard deviation 19
    assert not any(is_held_out(digest(text), 0.0) for text in held_out)


def test_held_out_rows_are_whole_rows_of_held_out_documents(tokenizer):
    source = ListSource([[[f"text number {index}" for index in range(300)]]])
    ids, doc_start, _ = held_out_rows(source, tokenizer, 0.2, rows=5, length=32)
    assert ids.shape == doc_start.shape == (5, 32)
    text = tokenizer.decode(ids.flatten().tolist())
    documents = read_stored(source, 0.2, held_out=True, wanted=300)
    expected = "<|endoftext|>".join(document.text for document in documents)
    assert expected.startswith(text.rstrip("\ufffd"))
    assert held_out_rows(source, tokenizer, 0.0, rows=5, length=32)[0].shape == (0, 32)


def test_unique_documents_are_counted_exactly_and_then_estimated():
    keys = [digest(str(index)) for index in range(20_000)]
    counter = UniqueCounter(limit=30_000)
    counter.add(keys)
    counter.add(np.array(keys[:100], np.uint64))
    assert (counter.count, counter.exact) == (20_000, True)
    small = UniqueCounter(limit=1000)
    for key in keys:
        small.add([key])
    assert not small.exact
    assert small.count == pytest.approx(20_000, rel=0.15)
    restored = UniqueCounter(limit=1000)
    restored.load(small.state())
    for counting in (small, restored):
        counting.add(digest(f"more {index}") for index in range(5000))
    assert restored.count == small.count


def test_the_part_of_an_epoch_grows_with_what_was_read_and_is_right_at_its_ends(tokenizer):
    source = ListSource([[["document 1. "] * 10] * 3, [["document 2. "] * 30], [["document 3. "] * 2]])
    batches = list(itertools.islice(training_batches(source, tokenizer, rows=1, length=2, seed=2), 300))
    epochs = [batch.epochs for batch in batches]
    assert epochs == sorted(epochs)
    last = max(epoch for epoch in epochs if epoch < 1)
    assert last == pytest.approx(1 - 1 / 62, abs=1e-9)  # the last of 62 documents
    assert epochs[-1] > 1


def test_steps_that_ranks_cannot_share_equally_are_refused(tokenizer):
    with pytest.raises(UsageError, match="multiple of the 2 processes, got 3"):
        training_batches(some_source(), tokenizer, rows=3, length=8, world=2)


def test_a_run_goes_on_with_another_number_of_ranks(tokenizer):
    shape = dict(rows=4, length=16, seed=1, validation_fraction=0.1)
    whole = list(itertools.islice(training_batches(some_source(), tokenizer, **shape), 8))
    for world in (1, 2, 4):
        ranks = [
            training_batches(some_source(), tokenizer, **shape, cursor=whole[3].cursor, rank=r, world=world)
            for r in range(world)
        ]
        for step in whole[4:]:
            parts = [next(rank) for rank in ranks]
            assert torch.equal(torch.cat([part.input_ids for part in parts]), step.input_ids)
            assert all(part.cursor == step.cursor for part in parts)
