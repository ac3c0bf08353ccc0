"""Documents to packed batches, in an order that is a function of (seed, position) alone.

    source -> documents in seeded order -> token ids, end-of-text after each -> rows of T tokens -> batches [B, T]

Rows are cut from one long stream of tokens: nothing is padded and nothing is thrown away. A document may continue in the next row,
where it counts as a new one that begins at 0.

The order: in every epoch a seeded permutation of the shards, and in every block a seeded permutation of its documents. There is no
shuffle buffer, so a position is five integers (Cursor), and a run resumed from them reads exactly what it would have read. What is
saved is the position of the batch that was trained on, not of those prepared ahead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from smollm2.cli import LoadError
from smollm2.tokenizer import Tokenizer
from train.corpus import Source

Item = TypeVar("Item")
Encoder = Callable[[Sequence[str]], list[np.ndarray]]


@dataclass(frozen=True)
class Cursor:
    """The first token that has not been read yet. shard and document count in the shuffled order, block in the stored one."""

    epoch: int = 0
    shard: int = 0
    block: int = 0
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class Document:
    """A usable document, where it is, and how many unusable ones were passed on the way to it."""

    text: str
    digest: int
    cursor: Cursor = Cursor()
    invalid: int = 0
    epochs: float = 0.0


@dataclass(frozen=True)
class Batch:
    """One step's rows, and what was read to make them."""

    input_ids: Tensor  # [B, T] int64
    doc_start: Tensor  # [B, T] int32: index in the row of the first token of the document that a token belongs to
    cursor: Cursor  # after the last token
    digests: tuple[int, ...]  # of the documents that begin in it
    invalid: int  # documents passed over because they are empty or not text
    epochs: float  # passes over the corpus, up to here


def digest(text: str) -> int:
    """A 64-bit number that identifies a text, the same in every process and on every machine (unlike hash())."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def is_held_out(text_digest: int, fraction: float) -> bool:
    """Whether a document is kept for evaluation. A property of its text: a duplicate never lies on the other side."""
    return (text_digest >> 32) < fraction * 2**32


def as_text(document: Any) -> str | None:
    """The document if it can be trained on: text, not blank, and encodable as UTF-8 (no lone surrogates). Else None."""
    if not isinstance(document, str) or not document.strip():
        return None
    try:
        document.encode()
    except UnicodeEncodeError:
        return None
    return document


def shuffled(count: int, key: str) -> list[int]:
    """A permutation of range(count) that depends on the key alone.

    Sorting by random() and not random.shuffle: Python promises the same numbers from random() in every version.
    """
    generator = random.Random(key)
    weights = [generator.random() for _ in range(count)]
    return sorted(range(count), key=weights.__getitem__)


def read_stored(source: Source, fraction: float, *, held_out: bool) -> Iterator[Document]:
    """The usable documents of one side of the split, in stored order, once."""
    for shard in range(source.num_shards):
        for stored in itertools.chain.from_iterable(source.read(shard)):
            text = as_text(stored)
            if text is not None and is_held_out(key := digest(text), fraction) == held_out:
                yield Document(text, key)


def read_shuffled(source: Source, seed: int, fraction: float, cursor: Cursor) -> Iterator[Document]:
    """The training documents from a position on, epoch after epoch, without end.

    Raises LoadError when a whole epoch has none.
    """
    while True:
        usable = invalid = 0
        whole_epoch = cursor == Cursor(epoch=cursor.epoch)
        for shard, stored_shard in enumerate(shuffled(source.num_shards, f"{seed}/{cursor.epoch}")):
            if shard < cursor.shard:
                continue
            if shard > cursor.shard:
                cursor = Cursor(cursor.epoch, shard)
            for block, documents in enumerate(source.read(stored_shard, cursor.block), cursor.block):
                if block > cursor.block:
                    cursor = Cursor(cursor.epoch, shard, block)
                order = shuffled(len(documents), f"{seed}/{cursor.epoch}/{stored_shard}/{block}")
                for index in range(cursor.document, len(order)):
                    text = as_text(documents[order[index]])
                    if text is None:
                        invalid += 1
                    elif not is_held_out(key := digest(text), fraction):
                        here = dataclasses.replace(cursor, document=index, token=cursor.token if index == cursor.document else 0)
                        part = index / len(order) if source.one_block else 0.0
                        yield Document(text, key, here, invalid, cursor.epoch + (shard + part) / source.num_shards)
                        usable, invalid = usable + 1, 0
        if whole_epoch and not usable:
            raise LoadError(
                f"data: expected documents to train on, found none ({invalid} empty or not text, the others held out); "
                "check the files and text_column, or lower validation_fraction"
            )
        cursor = Cursor(cursor.epoch + 1)


def end_of_text_encoder(tokenizer: Tokenizer) -> Encoder:
    """texts -> arrays of token ids, each with the end-of-text id behind it. Special tokens written out in a text stay ordinary text."""
    end = tokenizer.eot_token_id
    if end is None:
        raise LoadError("tokenizer: expected an end-of-text or end-of-sequence token to put between documents, found none")

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([*ids, end], dtype=np.int64) for ids in tokenizer.encode_batch(texts, special=False)]

    return encode


CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 64, 1 << 18


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of documents that are tokenised at once: few calls, but no long wait for the first."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if len(chunk) == CHUNK_DOCUMENTS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def tokenise(documents: Iterable[Document], encode: Encoder, threads: int = 0) -> Iterator[tuple[Document, np.ndarray]]:
    """Pairs each document with its token ids, in order; with threads, several chunks at a time."""

    def encode_chunk(chunk: list[Document]) -> list[tuple[Document, np.ndarray]]:
        return list(zip(chunk, encode([document.text for document in chunk]), strict=True))

    if threads == 0:
        for chunk in _chunks(documents):
            yield from encode_chunk(chunk)
        return
    pending: deque[Future[list[tuple[Document, np.ndarray]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="tokenise") as pool:
        for chunk in _chunks(documents):
            pending.append(pool.submit(encode_chunk, chunk))
            if len(pending) > threads:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def pack(tokenised: Iterable[tuple[Document, np.ndarray]], rows: int, length: int) -> Generator[Batch, None, None]:
    """Cuts the stream of documents into rows [rows, length]; what does not fill a last batch is not yielded.

    The first document begins at its cursor's token: that is how a resumed run continues in the middle of one.
    """
    row = column = invalid = 0
    digests: list[int] = []
    ids, starts = np.empty((rows, length), np.int64), np.empty((rows, length), np.int32)
    for document, tokens in tokenised:
        used = document.cursor.token
        invalid += document.invalid
        if used == 0:
            digests.append(document.digest)
        while used < len(tokens):
            count = min(length - column, len(tokens) - used)
            ids[row, column : column + count] = tokens[used : used + count]
            starts[row, column : column + count] = column
            used, column = used + count, column + count
            if column < length:
                continue
            row, column = row + 1, 0
            if row == rows:
                after = dataclasses.replace(document.cursor, token=used)
                if used == len(tokens):
                    after = dataclasses.replace(after, document=after.document + 1, token=0)
                yield Batch(torch.from_numpy(ids), torch.from_numpy(starts), after, tuple(digests), invalid, document.epochs)
                row = invalid = 0
                digests = []
                ids, starts = np.empty_like(ids), np.empty_like(starts)


def prefetch(items: Iterator[Item], depth: int = 4) -> Generator[Item, None, None]:
    """The same items, prepared ahead by a background thread. An error in it is raised here, in its place in the order."""
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def offer(item: Item | None, error: BaseException | None) -> None:
        while not closed.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                offer(item, None)
                if closed.is_set():
                    return
            offer(None, StopIteration())
        except BaseException as error:  # noqa: BLE001 - handed to the consumer
            offer(None, error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join(timeout=5)


def training_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    rows: int,
    length: int,
    seed: int = 0,
    validation_fraction: float = 0.0,
    cursor: Cursor = Cursor(),
    workers: int = 0,
) -> Generator[Batch, None, None]:
    """Endless batches [rows, length] of the training documents from `cursor` on; the same whatever the number of workers."""
    documents = read_shuffled(source, seed, validation_fraction, cursor)
    batches = pack(tokenise(documents, end_of_text_encoder(tokenizer), threads=workers), rows, length)
    return prefetch(batches) if workers else batches


def held_out_rows(source: Source, tokenizer: Tokenizer, fraction: float, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Up to `rows` rows of held-out documents: ids [R, length] int64 and doc_start [R, length] int32, with R <= rows.

    The same rows at every evaluation. R is 0 when the held-out documents do not fill one row.
    """
    documents = read_stored(source, fraction, held_out=True) if fraction > 0 else iter(())
    batches = list(itertools.islice(pack(tokenise(documents, end_of_text_encoder(tokenizer)), 1, length), rows))
    if not batches:
        return torch.empty((0, length), dtype=torch.int64), torch.empty((0, length), dtype=torch.int32)
    return torch.cat([batch.input_ids for batch in batches]), torch.cat([batch.doc_start for batch in batches])


class UniqueCounter:
    """Counts distinct documents by their digests, in bounded memory.

    Exact up to `limit` documents. Beyond, only digests that end in k zero bits are kept, k growing as needed, and the count is
    2^k times theirs (adaptive sampling, Flajolet 1990): a relative error of about 1 / sqrt(limit / 2), and `exact` is False.
    """

    def __init__(self, limit: int = 1 << 20) -> None:
        self.limit = limit
        self.zero_bits = 0
        self._kept: set[int] = set()

    def add(self, digests: Iterable[int]) -> None:
        self._kept.update(key for key in digests if self._selected(key))
        while len(self._kept) > self.limit:
            self.zero_bits += 1
            self._kept = {key for key in self._kept if self._selected(key)}

    def _selected(self, key: int) -> bool:
        return key & ((1 << self.zero_bits) - 1) == 0

    @property
    def count(self) -> int:
        return len(self._kept) << self.zero_bits

    @property
    def exact(self) -> bool:
        return self.zero_bits == 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: 8 bytes a document."""
        kept = np.fromiter(sorted(self._kept), dtype=np.uint64, count=len(self._kept))
        return {"digests": torch.from_numpy(kept.view(np.int64)), "zero_bits": self.zero_bits}

    def load(self, state: dict[str, Any]) -> None:
        self.zero_bits = int(state["zero_bits"])
        self._kept = set(state["digests"].numpy().view(np.uint64).tolist())


@dataclass
class DataState:
    """How far training has read, as it is saved: position, counts, and what identifies the data."""

    fingerprint: str
    revision: str | None = None
    cursor: Cursor = Cursor()
    documents: int = 0  # begun, repetitions in later epochs included
    invalid: int = 0
    epochs: float = 0.0
    unique: UniqueCounter = field(default_factory=UniqueCounter)

    def consume(self, batch: Batch) -> None:
        """Counts a batch that has been trained on."""
        self.cursor, self.epochs = batch.cursor, batch.epochs
        self.documents += len(batch.digests)
        self.invalid += batch.invalid
        self.unique.add(batch.digests)

    def to_json(self) -> dict[str, Any]:
        """Everything but the digests, which `unique.state()` holds."""
        plain = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "unique"}
        return {**plain, "cursor": dataclasses.asdict(self.cursor)}

    @classmethod
    def from_json(cls, data: dict[str, Any], unique: dict[str, Any]) -> DataState:
        state = cls(**{**data, "cursor": Cursor(**data["cursor"])})
        state.unique.load(unique)
        return state
