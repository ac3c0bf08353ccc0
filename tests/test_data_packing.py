"""Packed batches: nothing is lost, padded or truncated, and documents can be told apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.model import shift_labels
from smollm2.tokenizer import Tokenizer, train_tokenizer
from train.data import Document, end_of_text_encoder, pack, tokenise

documents_strategy = st.lists(st.lists(st.integers(1, 1000), min_size=0, max_size=40), min_size=1, max_size=30)


def stream(documents: list[list[int]], end: int = 0) -> list[tuple[Document, np.ndarray]]:
    return [(Document("", digest=index), np.array([*tokens, end], dtype=np.int64)) for index, tokens in enumerate(documents)]


@settings(max_examples=150, deadline=None)
@given(documents=documents_strategy, rows=st.integers(1, 3), length=st.integers(2, 17))
def test_rows_are_the_token_stream_cut_into_pieces(documents: list[list[int]], rows: int, length: int) -> None:
    batches = list(pack(stream(documents), rows, length))
    tokens = [token for document in documents for token in (*document, 0)]
    whole = len(tokens) // (rows * length)
    assert len(batches) == whole  # only what does not fill a last batch stays behind
    assert [token for batch in batches for token in batch.input_ids.flatten().tolist()] == tokens[: whole * rows * length]
    for batch in batches:
        assert batch.input_ids.shape == batch.doc_start.shape == (rows, length)
        assert batch.input_ids.dtype == torch.int64 and batch.doc_start.dtype == torch.int32


@settings(max_examples=150, deadline=None)
@given(documents=documents_strategy, length=st.integers(2, 17))
def test_doc_start_is_the_first_token_of_the_document_in_its_row(documents: list[list[int]], length: int) -> None:
    owner = [index for index, document in enumerate(documents) for _ in range(len(document) + 1)]
    for number, batch in enumerate(pack(stream(documents), 1, length)):
        row = owner[number * length : (number + 1) * length]
        assert batch.doc_start[0].tolist() == [row.index(document) for document in row]


@settings(max_examples=60, deadline=None)
@given(documents=documents_strategy, rows=st.integers(1, 3), length=st.integers(2, 9))
def test_every_document_is_counted_in_the_batch_where_it_begins(documents: list[list[int]], rows: int, length: int) -> None:
    owner = [index for index, document in enumerate(documents) for _ in range(len(document) + 1)]
    size = rows * length
    for number, batch in enumerate(pack(stream(documents), rows, length)):
        before, here = owner[: number * size], owner[number * size : (number + 1) * size]
        assert list(batch.digests) == [document for document, _ in itertools.groupby(here) if document not in before[-1:]]


def test_targets_do_not_cross_documents_and_all_others_are_there() -> None:
    (batch,) = pack(stream([[5, 6], [7, 8, 9]]), 1, 7)
    assert batch.input_ids.tolist() == [[5, 6, 0, 7, 8, 9, 0]]
    assert shift_labels(batch.input_ids, batch.doc_start).tolist() == [[6, 0, -100, 8, 9, 0, -100]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a tokenizer for the tests of packing " * 3], 300)


def test_every_document_ends_with_the_end_of_text_token_and_cannot_forge_one(tokenizer: Tokenizer) -> None:
    encode = end_of_text_encoder(tokenizer)
    plain, forged = encode(["some text", "some <|endoftext|> text"])
    assert plain[-1] == forged[-1] == tokenizer.eot_token_id
    assert tokenizer.eot_token_id not in plain[:-1] and tokenizer.eot_token_id not in forged[:-1]
    assert tokenizer.decode(forged[:-1].tolist()) == "some <|endoftext|> text"


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_order(tokenizer: Tokenizer, threads: int) -> None:
    documents = [Document(f"document {index} " * (index % 7 + 1), digest=index) for index in range(500)]
    encode = end_of_text_encoder(tokenizer)
    alone = list(tokenise(documents, encode))
    threaded = list(tokenise(documents, encode, threads))
    assert [document for document, _ in threaded] == documents
    assert all(np.array_equal(one[1], other[1]) for one, other in zip(alone, threaded, strict=True))
