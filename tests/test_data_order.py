"""The order of documents: seeded, complete in every epoch, split by content, and resumable at every batch."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.tokenizer import Tokenizer, train_tokenizer
from train.corpus import Block
from train.data import (
    Batch,
    Cursor,
    DataState,
    UniqueCounter,
    digest,
    held_out_rows,
    is_held_out,
    prefetch,
    read_shuffled,
    read_stored,
    shuffled,
    training_batches,
)  # fmt: skip

START = Cursor()


class ListSource:
    """Documents in memory: shards of blocks."""

    revision: str | None = None
    fingerprint = "list"

    def __init__(self, shards: list[list[Block]]) -> None:
        self.shards = shards
        self.one_block = all(len(shard) == 1 for shard in shards)

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def read(self, shard: int, first_block: int = 0) -> Iterator[Block]:
        yield from self.shards[shard][first_block:]


def some_source(shards: int = 3, blocks: int = 2, documents: int = 5) -> ListSource:
    def text(shard: int, block: int, index: int) -> object:
        return None if index == 3 else f"document {shard}.{block}.{index} " * (1 + (7 * shard + 3 * block + index) % 5)

    return ListSource([[[text(s, b, i) for i in range(documents)] for b in range(blocks)] for s in range(shards)])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["document 0123456789 . " * 5], 280)


def texts(source: ListSource, count: int, seed: int = 0, cursor: Cursor = START) -> list[str]:
    return [document.text for document in itertools.islice(read_shuffled(source, seed, 0.0, cursor), count)]


def test_every_epoch_has_every_document_once_in_another_order() -> None:
    source = some_source()
    usable = [document.text for document in read_stored(source, 0.0, held_out=False)]
    assert len(usable) == 24
    first, second = (texts(source, 48)[part : part + 24] for part in (0, 24))
    assert sorted(first) == sorted(second) == sorted(usable)
    assert first != second != usable


def test_the_seed_alone_decides_the_order() -> None:
    assert texts(some_source(), 40, seed=1) == texts(some_source(), 40, seed=1)
    assert texts(some_source(), 40, seed=1) != texts(some_source(), 40, seed=2)


def test_orders_and_digests_are_the_same_in_every_process() -> None:
    # As written down once: a change would move the documents of every saved position.
    assert shuffled(8, "0/0") == [0, 3, 7, 4, 1, 5, 2, 6]
    assert digest("SmolLM2") == 11487967147309650736
    code = "from train.data import digest; print(digest('SmolLM2'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=True)
    assert int(done.stdout) == digest("SmolLM2")


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.input_ids, other.input_ids) and torch.equal(one.doc_start, other.doc_start)
        and (one.cursor, one.digests, one.invalid, one.epochs) == (other.cursor, other.digests, other.invalid, other.epochs)
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    shards=st.integers(1, 3), blocks=st.integers(1, 3), documents=st.integers(1, 6), rows=st.integers(1, 2),
    length=st.integers(2, 40), seed=st.integers(0, 5),
)  # fmt: skip
def test_reading_on_from_any_batch_gives_the_batches_that_would_have_come(
    tokenizer: Tokenizer, shards: int, blocks: int, documents: int, rows: int, length: int, seed: int
) -> None:
    source = some_source(shards, blocks, documents)
    batches = list(itertools.islice(training_batches(source, tokenizer, rows=rows, length=length, seed=seed), 12))
    state = DataState("list")
    for number, batch in enumerate(batches[:-1]):
        state.consume(batch)
        saved = json.loads(json.dumps(state.to_json()))
        cursor = DataState.from_json(saved, state.unique.state()).cursor
        after = training_batches(source, tokenizer, rows=rows, length=length, seed=seed, cursor=cursor)
        assert same(next(after), batches[number + 1])


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_prepared_ahead_are_the_same_and_the_state_is_of_the_consumed_one(tokenizer: Tokenizer, workers: int) -> None:
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


def test_an_error_in_the_background_arrives_in_the_loop() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(items)


def test_held_out_documents_are_never_trained_on_and_their_share_is_as_asked() -> None:
    source = ListSource([[[f"text number {index}" for index in range(4000)]]])
    held_out = [document.text for document in read_stored(source, 0.1, held_out=True)]
    training = {document.text for document in itertools.islice(read_shuffled(source, 0, 0.1, Cursor()), 2 * (4000 - len(held_out)))}
    assert not training & set(held_out)
    assert len(training) + len(held_out) == 4000
    assert 330 < len(held_out) < 470  # 400, standard deviation 19
    assert not any(is_held_out(digest(text), 0.0) for text in held_out)


def test_held_out_rows_are_whole_rows_of_held_out_documents(tokenizer: Tokenizer) -> None:
    source = ListSource([[[f"text number {index}" for index in range(300)]]])
    ids, doc_start = held_out_rows(source, tokenizer, 0.2, rows=5, length=32)
    assert ids.shape == doc_start.shape == (5, 32)
    text = tokenizer.decode(ids.flatten().tolist())
    expected = "<|endoftext|>".join(document.text for document in read_stored(source, 0.2, held_out=True))
    assert expected.startswith(text.rstrip("\ufffd"))
    assert held_out_rows(source, tokenizer, 0.0, rows=5, length=32)[0].shape == (0, 32)


def test_unique_documents_are_counted_exactly_and_then_estimated() -> None:
    keys = [digest(str(index)) for index in range(20_000)]
    counter = UniqueCounter(limit=30_000)
    counter.add(keys)
    counter.add(keys[:100])
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
