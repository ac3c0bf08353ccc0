"""Packed batches: nothing is lost, padded or truncated, and documents can be told apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from data_sources import ListSource
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.model import shift_labels
from smollm2.pretrained.tokenizer import train_tokenizer
from train.data import tokenise
from train.data.mixture import mix
from train.data.packing import Batch, Packer, Segment
from train.data.source import START
from train.data.worker_pool import WorkerPool

documents_strategy = st.lists(
    st.lists(st.integers(1, 1000), min_size=0, max_size=40), min_size=1, max_size=30
)


def stream(documents: list[list[int]], end: int = 0, block: int = 7) -> Iterator[Segment]:
    """Documents in blocks of `block`; their digests are their numbers."""
    for first in range(0, len(documents), block):
        arrays = [np.array([*tokens, end], np.uint16) for tokens in documents[first : first + block]]
        index, lengths = np.arange(len(arrays)), np.array([len(array) for array in arrays])
        yield Segment(
            START,
            np.concatenate(arrays),
            np.cumsum(lengths) - lengths,
            index,
            (first + index).astype(np.uint64),
            0 * index,
            0.0 * index,
        )


def pack(
    segments: Iterator[Segment], rows: int, length: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """The batches of a single source."""
    return mix(ListSource([]), [Packer(segments, length)], START, rows, rank, world)


@settings(max_examples=150, deadline=None)
@given(documents=documents_strategy, rows=st.integers(1, 3), length=st.integers(2, 17))
def test_rows_are_the_token_stream_cut_into_pieces(documents, rows, length):
    batches = list(pack(stream(documents), rows, length))
    tokens = [token for document in documents for token in (*document, 0)]
    whole = len(tokens) // (rows * length)
    assert len(batches) == whole  # only what does not fill a last batch stays behind
    assert [token for batch in batches for token in batch.input_ids.flatten().tolist()] == tokens[
        : whole * rows * length
    ]
    for batch in batches:
        assert batch.input_ids.shape == batch.doc_start.shape == (rows, length)
        assert batch.input_ids.dtype == torch.int64 and batch.doc_start.dtype == torch.int32


@settings(max_examples=150, deadline=None)
@given(documents=documents_strategy, rows=st.integers(1, 3), length=st.integers(2, 17))
def test_doc_start_is_the_first_token_of_the_document_in_its_row(documents, rows, length):
    owner = [index for index, document in enumerate(documents) for _ in range(len(document) + 1)]
    found = [row for batch in pack(stream(documents), rows, length) for row in batch.doc_start.tolist()]
    for number, starts in enumerate(found):
        row = owner[number * length : (number + 1) * length]
        assert starts == [row.index(document) for document in row]


@settings(max_examples=60, deadline=None)
@given(documents=documents_strategy, rows=st.integers(1, 3), length=st.integers(2, 9))
def test_every_document_is_counted_in_the_batch_where_it_begins(documents, rows, length):
    owner = [index for index, document in enumerate(documents) for _ in range(len(document) + 1)]
    size = rows * length
    for number, batch in enumerate(pack(stream(documents), rows, length)):
        before, here = owner[: number * size], owner[number * size : (number + 1) * size]
        assert list(batch.digests) == [
            document for document, _ in itertools.groupby(here) if document not in before[-1:]
        ]


def test_targets_do_not_cross_documents_and_all_others_are_there():
    (batch,) = pack(stream([[5, 6], [7, 8, 9]]), 1, 7)
    assert batch.input_ids.tolist() == [[5, 6, 0, 7, 8, 9, 0]]
    assert shift_labels(batch.input_ids, batch.doc_start).tolist() == [[6, 0, -100, 8, 9, 0, -100]]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a tokenizer for the tests of packing " * 3], 300)


def test_every_document_ends_with_the_end_of_text_token_and_cannot_forge_one(tokenizer):
    block = WorkerPool(tokenizer, 0).encode(["some text", "some <|endoftext|> text"])
    plain, forged = np.split(block.tokens, np.cumsum(block.lengths)[:-1])
    assert plain[-1] == forged[-1] == tokenizer.eot_token_id
    assert tokenizer.eot_token_id not in plain[:-1] and tokenizer.eot_token_id not in forged[:-1]
    assert tokenizer.decode(forged[:-1].tolist()) == "some <|endoftext|> text"


@settings(max_examples=60, deadline=None)
@given(
    documents=documents_strategy, share=st.integers(1, 3), world=st.integers(1, 4), length=st.integers(2, 9)
)
def test_ranks_share_every_step_and_know_its_targets(documents, share, world, length):
    rows = share * world
    whole = list(pack(stream(documents), rows, length))
    ranks = [list(pack(stream(documents), rows, length, rank, world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids)
        assert torch.equal(torch.cat([part.doc_start for part in parts]), batch.doc_start)
        assert {(part.cursor, part.inner_starts, part.tokens) for part in parts} == {
            (batch.cursor, batch.inner_starts, rows * length)
        }
        targets = int((shift_labels(batch.input_ids, batch.doc_start) != -100).sum())
        assert targets == rows * (length - 1) - batch.inner_starts


def test_an_enormous_document_is_tokenised_in_pieces_and_stays_one(tokenizer, monkeypatch):
    text = "tests of packing\n" * 40 + "a" * 500 + "\nthe end"
    monkeypatch.setattr(tokenise, "PIECE", 64)
    parts = list(tokenise.pieces(text))
    assert "".join(parts) == text and max(map(len, parts)) == 64
    assert all(part.endswith("\n") for part in parts[:10])
    calls: list[int] = []
    encode = WorkerPool(tokenizer, 0)
    encode.encode([])
    inner = encode._encoder._encode_batch  # type: ignore[union-attr]

    def counted(texts: list[str], **options: object) -> object:
        calls.append(sum(map(len, texts)))
        return inner(texts, **options)

    encode._encoder._encode_batch = counted  # type: ignore[union-attr]
    block = encode.encode(["before", text, "behind"])
    assert len(calls) > 10 and max(calls) <= 64
    assert list(block.tokens).count(tokenizer.eot_token_id) == 3 and int(block.lengths.sum()) == len(
        block.tokens
    )
    first, last = int(block.lengths[0]), int(block.lengths[2])
    assert tokenizer.decode(block.tokens[first : -last - 1].tolist()) == text
