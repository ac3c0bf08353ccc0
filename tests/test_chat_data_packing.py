"""Conversations in rows: whole, padded, in an order that a resumed run repeats; and who is held out."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sources import ListSource, same
from hypothesis import given, settings
from hypothesis import strategies as st
from trl_cases import talk, tokenizer

from smollm2.errors import LoadError
from smollm2.model import IGNORE_INDEX
from train.config import RunConfig
from train.data.batches import held_out_rows, split_fraction, training_batches
from train.data.conversations import NOT_LEARNED
from train.data.local import LocalSource
from train.data.mixture import MixtureSource
from train.data.packing import Batch, Segment
from train.data.rows import as_conversation
from train.data.source import START, Part
from train.data.token_cache import open_cache
from train.data.tokenise import TokenBlock, digest, is_held_out
from train.data.whole import WholePacker, learnable

TOKENIZER = tokenizer()
SHAPE: dict[str, Any] = dict(rows=4, length=256, seed=3)
LEARNED = int(NOT_LEARNED)


def conversation(number: int) -> str:
    answer = f"{number} dogs. " * (1 + number % 9)
    return as_conversation({"messages": talk(f"how many, {number}?", answer)}) or ""


class ChatSource(ListSource):
    train_on = "assistant"


def some_source(shards: int = 3, blocks: int = 2, documents: int = 6) -> ChatSource:
    numbers = itertools.count()
    made = [
        [[conversation(next(numbers)) for _ in range(documents)] for _ in range(blocks)]
        for _ in range(shards)
    ]
    made[-1][0][2] = None  # unusable
    source = ChatSource(made)
    source.fingerprint, source.cache_key = "chat", ("chat", "1")
    return source


def taken(count: int, source: Any = None, **changes: Any) -> list[Batch]:
    batches = training_batches(source or some_source(), TOKENIZER, **{**SHAPE, **changes})
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def equal(one: Batch, other: Batch) -> bool:
    assert one.labels is not None and other.labels is not None
    return same(one, other) and torch.equal(one.labels, other.labels) and one.learned == other.learned


def stream(documents: list[list[int]], block: int = 3) -> Iterator[Segment]:
    """Documents in blocks of `block`, whose digests are their numbers."""
    for first in range(0, len(documents), block):
        arrays = [np.array(tokens, np.uint32) for tokens in documents[first : first + block]]
        begins = np.cumsum([0, *map(len, arrays)])[:-1]
        numbers = np.arange(first, first + len(arrays))
        zeros = np.zeros(len(arrays), np.int64)
        yield Segment(
            START,
            np.concatenate(arrays),
            begins,
            np.arange(len(arrays)),
            numbers.astype(np.uint64),
            zeros,
            0.0 * zeros,
        )


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.sampled_from([1, 2, 3 | LEARNED, 4 | LEARNED]), min_size=1, max_size=15),
        min_size=1,
        max_size=30,
    ),
    st.integers(2, 12),
)
def test_every_document_lies_whole_in_one_row(documents, length):
    packer = WholePacker(stream(documents), length, filler=9)
    found, rows = [], []
    while (row := packer.take(1)) is not None:
        rows.append(row)
        starts = row.doc_start[0]
        edges = [*np.flatnonzero(starts == np.arange(length)), length]
        for begin, end in itertools.pairwise(edges):
            assert (starts[begin:end] == begin).all()
            found.append(row.tokens[0, begin:end].tolist())
        padding = row.share.padding
        assert row.learned == (row.tokens < NOT_LEARNED).sum() and row.inner_starts == len(edges) - 2
        if padding:
            assert found.pop() == [9 | LEARNED] * padding
    assert found == [[tokens[0] | LEARNED, *tokens[1:length]] for tokens in documents]
    assert [key for row in rows for key in row.share.digests] == list(range(len(documents)))
    assert sum(row.share.truncated for row in rows) == sum(len(tokens) > length for tokens in documents)
    # a row is only padded where the next document would not have fitted
    sizes = [min(len(tokens), length) for tokens in documents]
    next_sizes = [sizes[int(row.share.digests[-1]) + 1] for row in rows[:-1]]
    assert all(row.share.padding < size for row, size in zip(rows, next_sizes, strict=False))


def test_labels_are_the_answers_and_the_rest_is_ignored():
    for batch in taken(6):
        assert batch.labels is not None and batch.labels.shape == batch.input_ids.shape
        here = batch.labels != IGNORE_INDEX
        assert torch.equal(batch.labels[here], batch.input_ids[here]) and batch.learned == here.sum()
        assert not here[batch.doc_start == torch.arange(256)].any()
        text = TOKENIZER.decode(batch.labels[here].tolist())
        assert text.count("dogs. <|im_end|>\n") == len(batch.digests) and "how many" not in text
        assert int(batch.input_ids.max()) < TOKENIZER.vocab_size


def test_an_epoch_is_every_conversation_once():
    batches = [batch for batch in taken(20) if batch.epochs < 1]
    digests = np.concatenate([batch.digests for batch in batches])
    assert len(digests) == len(set(digests.tolist())) > 24
    every = {digest(text) for shard in some_source().shards for block in shard for text in block if text}
    assert set(np.concatenate([batch.digests for batch in taken(20)]).tolist()) == every


@pytest.mark.parametrize("length", [256, 120], ids=["whole", "cut"])
@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_resumed_stream_is_the_same_stream(place, length):
    whole = taken(14, length=length)
    assert any(share.truncated for batch in whole for share in batch.shares) == (length == 120)
    resumed = taken(4, length=length, cursor=whole[place].cursor)
    assert all(map(equal, resumed, whole[place + 1 :]))


def test_neither_workers_nor_ranks_nor_a_cache_change_a_batch(tmp_path):
    whole = taken(8)

    def agree(batches: list[Batch]) -> bool:
        return all(
            same(*pair) and torch.equal(pair[0].labels, pair[1].labels)
            for pair in zip(batches, whole, strict=True)
        )

    assert agree(taken(8, workers=2))
    config = RunConfig(data="local", paths=["-"], token_cache=str(tmp_path))
    for _ in range(2):  # filled, then read
        cache = open_cache(config, some_source(), TOKENIZER)
        assert cache is not None and "-uint32-chat-" in cache.folder.name
        assert agree(taken(8, cache=cache))
        cache.close()
    parts = [taken(8, rank=rank, world=2) for rank in range(2)]
    for one, other, both in zip(*parts, whole, strict=True):
        assert torch.equal(torch.cat([one.labels, other.labels]), both.labels)
        assert one.learned == other.learned == both.learned


def test_a_mixture_takes_its_rows_in_turns():
    first, second = some_source(1), some_source(1)
    second.shards = [[[conversation(number) for number in range(100, 112)]]]
    mixture = MixtureSource([Part("a", Fraction(1), first), Part("b", Fraction(1), second)])
    batch = taken(1, mixture)[0]
    assert [share.rows for share in batch.shares] == [2, 2]
    alone = taken(1, mixture, rows=2)[0]
    assert (
        torch.equal(batch.labels[:2], alone.labels) and batch.learned == (batch.labels != IGNORE_INDEX).sum()
    )


def test_conversations_whose_answers_lie_beyond_a_row_are_passed_over():
    block = TokenBlock(
        np.array([1 | LEARNED, 2 | LEARNED, 3, 4, 5, 6 | LEARNED, 7], np.uint32),
        np.array([3, 1, 0, 3]), np.array([1, 2, 0, 3], np.uint64),
    )  # fmt: skip
    # the second has but one token, with nothing before it; the last is learned at its end alone
    assert learnable(block, 3).lengths.tolist() == [3, 0, 0, 3]
    short = learnable(block, 2)
    assert short.lengths.tolist() == [0, 0, 0, 0] and short.unusable.all() and short.tokens.size == 0
    with pytest.raises(LoadError, match=r"expected conversations to train on, found none .* a row is \{"):
        taken(1, length=8)


def write(folder: Path, count: int) -> LocalSource:
    path = folder / f"{count}.jsonl"
    texts = [conversation(number) for number in range(count)]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return LocalSource([str(path)], "text", train_on="assistant")


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.5])
@pytest.mark.parametrize("count", [2, 3, 50])
def test_of_few_conversations_one_at_least_is_held_out(tmp_path, count, fraction):
    source = write(tmp_path, count)
    split = split_fraction(source, fraction)
    keys = np.array([digest(conversation(number)) for number in range(count)], np.uint64)
    held_out = keys[is_held_out(keys, split)]
    assert 1 <= len(held_out) < count
    assert set(keys[is_held_out(keys, fraction)]) in (set(held_out), set(), set(keys))
    rows = held_out_rows(source, TOKENIZER, split, 4, 200)
    assert len(rows.ids) and (rows.labels != IGNORE_INDEX).any()
    read = np.concatenate([batch.digests for batch in taken(15, source, validation_fraction=split)])
    assert set(read.tolist()) == set(keys.tolist()) - set(held_out.tolist())


def test_one_conversation_is_trained_on_and_no_fraction_is_none(tmp_path):
    assert split_fraction(write(tmp_path, 1), 0.01) == 0.01
    assert split_fraction(write(tmp_path, 50), 0.0) == 0.0


def test_of_many_conversations_few_are_read(tmp_path, monkeypatch):
    source = write(tmp_path, 50)
    read: list[str] = []
    monkeypatch.setattr("train.data.batches.digest", lambda text: read.append(text) or digest(text))
    assert split_fraction(source, 0.2) == 0.2 and len(read) < 40


def test_held_out_conversations_are_padded_not_dropped():
    rows = held_out_rows(some_source(), TOKENIZER, 0.3, 100, 300)
    keys = [digest(text) for shard in some_source().shards for block in shard for text in block if text]
    text = TOKENIZER.decode(rows.learned.tolist())
    assert text.count("<|im_end|>") == sum(is_held_out(key, 0.3) for key in keys) > 0
    none = held_out_rows(some_source(), TOKENIZER, 0.0, 100, 300)
    assert none.ids.shape == none.targets.shape == (0, 300)


@pytest.mark.parametrize(("rows", "shards"), [(1, 1), (3, 2), (8, 4), (20, 4), (100, 4)])
def test_every_shard_gives_whole_conversations_and_none_twice(rows, shards):
    """Shards of unequal size, so that the second must give more than its share."""
    numbers = itertools.count()
    sizes = [[1], [12, 9, 12], [2], [3, 1]]
    source = ChatSource([[[conversation(next(numbers)) for _ in range(n)] for n in one] for one in sizes])
    held_out = held_out_rows(source, TOKENIZER, 1.0, rows, 256)
    text = TOKENIZER.decode(held_out.ids.flatten().tolist())
    found = [int(number) for number in re.findall(r"how many, (\d+)\?", text)]
    assert len(found) == len(set(found)) and 0 < len(held_out.ids) <= rows
    assert len(set(np.searchsorted([1, 34, 36], found, "right"))) >= shards
    assert rows < 100 or len(found) == sum(map(sum, sizes))


def test_json_of_a_conversation_is_a_row_again():
    text = conversation(5)
    assert as_conversation(json.loads(text)) == text
