"""Several sources by weight: exact shares, rows of one source each, a resume at any batch, and the same
stream on any ranks and workers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from data_sources import ListSource, same
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.errors import LoadError
from smollm2.pretrained.tokenizer import Tokenizer, train_tokenizer
from train.config import RunConfig
from train.data.batches import held_out_rows, read_stored, training_batches
from train.data.mixture import MixtureSource, Schedule
from train.data.packing import Batch
from train.data.source import Block, MixtureCursor, Part
from train.data.state import DataState
from train.data.token_cache import open_caches
from train.data.tokenise import digest, is_held_out

WEIGHTS = {"web": 0.6, "code": 0.3, "math": 0.1}
DOCUMENTS = {"web": 12, "code": 8, "math": 3}
SHAPE: dict[str, Any] = dict(rows=4, length=16, seed=3, validation_fraction=0.1)


def source_of(name: str, documents: int) -> ListSource:
    """Two shards of blocks of up to three documents, one of which in all is unusable."""
    texts: list[object] = [f"{name} {index} " * (1 + index % 4) for index in range(documents)]
    half = [texts[: documents // 2], [None, *texts[documents // 2 :]]]
    source = ListSource([[shard[at : at + 3] for at in range(0, len(shard), 3)] for shard in half])
    source.fingerprint, source.cache_key = f"list {name}", (f"list {name}", "1")
    return source


def some_mixture(kind: type[ListSource] = ListSource) -> MixtureSource:
    parts = []
    for name, weight in WEIGHTS.items():
        plain = source_of(name, DOCUMENTS[name])
        source = kind(plain.shards)
        source.fingerprint, source.cache_key = plain.fingerprint, plain.cache_key
        parts.append(Part(name, Fraction(str(weight)), source))
    return MixtureSource(parts)


def taken(count: int, **changes: object) -> list[Batch]:
    batches = training_batches(some_mixture(), TOKENIZER, **{**SHAPE, **changes})
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


TOKENIZER: Tokenizer = train_tokenizer(["web code math 0123456789 " * 5], 280)


# ---- shares ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.integers(0, 300))
def test_shares_are_exact_to_less_than_a_row_after_every_row_and_to_less_than_two_in_every_window(
    units, begin
):
    weights = [Fraction(unit, sum(units)) for unit in units]
    bound = 1 - Fraction(1, max(1, 2 * len(units) - 2))
    given_before: list[list[int]] = [[0] * len(units)]
    for source in itertools.islice(Schedule(weights), 400):
        given_before.append([count + (index == source) for index, count in enumerate(given_before[-1])])
    for number, counts in enumerate(given_before):
        assert sum(counts) == number
        assert all(
            abs(count - number * weight) <= bound for count, weight in zip(counts, weights, strict=True)
        )
    for number in range(begin, 401):
        window = [
            after - before for after, before in zip(given_before[number], given_before[begin], strict=True)
        ]
        assert all(
            abs(count - (number - begin) * weight) < 2 for count, weight in zip(window, weights, strict=True)
        )


def test_the_schedule_goes_on_from_the_rows_that_were_given():
    weights = [Fraction(5, 10), Fraction(3, 10), Fraction(2, 10)]
    whole = list(itertools.islice(Schedule(weights), 40))
    assert whole[:10] == whole[10:20] and sorted(whole[:10]) == [0] * 5 + [1] * 3 + [2] * 2
    for split in range(40):
        counts = [whole[:split].count(source) for source in range(3)]
        assert list(itertools.islice(Schedule(weights, counts), 40 - split)) == whole[split:]


def test_every_step_has_the_rows_that_its_weights_ask_for():
    rows = np.zeros(3, int)
    for number, batch in enumerate(taken(60), 1):
        rows += [share.rows for share in batch.shares]
        assert batch.cursor.rows == tuple(rows)
        assert np.all(np.abs(rows - 4 * number * np.array([0.6, 0.3, 0.1])) <= 0.75 + 1e-9)
    assert rows.tolist() == [144, 72, 24]


# ---- order -------------------------------------------------------------------------------------------------


def test_a_source_is_read_as_if_it_were_alone_and_no_row_has_two_sources():
    mixture = some_mixture()
    alone = [
        training_batches(
            part.source, TOKENIZER, rows=1, length=16, seed=part.order_key(3), validation_fraction=0.1
        )
        for part in mixture.parts
    ]
    schedule = Schedule([part.weight for part in mixture.parts])
    for batch in taken(30):
        for index, source in enumerate(itertools.islice(schedule, 4)):
            expected = next(alone[source])
            assert torch.equal(batch.input_ids[index], expected.input_ids[0]) and torch.equal(
                batch.doc_start[index], expected.doc_start[0]
            )
        assert sum(share.rows for share in batch.shares) == 4


def test_a_source_that_comes_to_its_end_repeats_in_another_order_and_is_counted():
    state = DataState.of(some_mixture())
    orders: dict[str, list[int]] = {name: [] for name in WEIGHTS}
    for batch in taken(80, validation_fraction=0.0):
        state.consume(batch)
        for name, share in zip(WEIGHTS, batch.shares, strict=True):
            orders[name] += share.digests.tolist()
    for name, count in DOCUMENTS.items():
        known = {digest(f"{name} {index} " * (1 + index % 4)) for index in range(count)}
        passes = [orders[name][at : at + count] for at in range(0, len(orders[name]) - count, count)]
        assert len(passes) > 2 and all(set(one) == known for one in passes)
        assert len({tuple(one) for one in passes}) > 1
        counts = state.sources[name]
        assert counts.unique.count == count and counts.documents == len(orders[name])
        assert counts.epochs == pytest.approx(len(orders[name]) / count, abs=1.5)  # by parts of its blocks
        assert counts.invalid >= len(passes)
    assert state.unique.count == sum(DOCUMENTS.values())
    assert state.epochs == max(counts.epochs for counts in state.sources.values())
    seen = state.by_source()
    assert (seen["share/web"], seen["share/code"], seen["share/math"]) == (0.6, 0.3, 0.1)
    assert seen["unique_examples/math"] == 3 and set(seen) == {
        f"{what}/{name}" for what in ("share", "epochs", "unique_examples") for name in WEIGHTS
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_from_the_saved_position_of_any_batch(workers):
    whole = taken(24)
    for split in (0, 7, 13) if workers else range(24):
        state = DataState.of(some_mixture())
        for batch in whole[:split]:
            state.consume(batch)
        again = DataState.from_json(json.loads(json.dumps(state.to_json())), state.unique.state())
        assert isinstance(again.cursor, MixtureCursor) and again.cursor == state.cursor
        rest = taken(24 - split if not workers else 5, cursor=again.cursor, workers=workers)
        assert all(same(one, other) for one, other in zip(rest, whole[split:], strict=False))
        for batch in rest:
            again.consume(batch)
        for batch in whole[split : split + len(rest)]:
            state.consume(batch)
        assert (
            again.to_json() == state.to_json()
            and again.by_source() == state.by_source()
            and again.unique.count == state.unique.count
        )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_share_the_rows_of_one_stream(world):
    whole = taken(12)
    shares = [taken(12, rank=rank, world=world) for rank in range(world)]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([share[number].input_ids for share in shares]), batch.input_ids)
        assert torch.equal(torch.cat([share[number].doc_start for share in shares]), batch.doc_start)
        for share in shares:
            assert share[number].cursor == batch.cursor and share[number].inner_starts == batch.inner_starts
            assert (
                np.array_equal(share[number].digests, batch.digests) and share[number].tokens == batch.tokens
            )


def test_the_order_of_a_source_depends_on_the_seed_and_its_name_alone():
    first, other = taken(8), taken(8, seed=4)
    assert not torch.equal(first[0].input_ids, other[0].input_ids)
    mixture = some_mixture()
    turned = MixtureSource(mixture.parts[::-1])
    batches = training_batches(turned, TOKENIZER, **SHAPE)
    found = [next(batches) for _ in range(8)]
    for index, name in enumerate(WEIGHTS):
        one = np.concatenate([batch.shares[index].digests for batch in first])
        two = np.concatenate([batch.shares[2 - index].digests for batch in found])
        shorter = min(len(one), len(two))
        assert shorter and np.array_equal(one[:shorter], two[:shorter]), name


def test_a_source_of_no_name_is_one_of_the_mixture_and_not_a_single_source():
    """`paths: ["."]` names one so."""
    part = some_mixture().parts[0]
    alone, mixture = part.source, MixtureSource([replace(part, name="")])
    counts = DataState.of(mixture)
    batch, single = (next(training_batches(source, TOKENIZER, **SHAPE)) for source in (mixture, alone))
    counts.consume(batch)
    assert isinstance(batch.cursor, MixtureCursor) and counts.by_source()["share/"] == 1.0
    assert not torch.equal(batch.input_ids, single.input_ids), "the order is that of its name"


# ---- split, cache, faults ----------------------------------------------------------------------------------


def test_held_out_documents_are_never_trained_on_and_come_from_every_source():
    fraction = 0.4
    mixture = some_mixture()
    held_out = {document.digest for document in read_stored(mixture, fraction, held_out=True)}
    trained = {document.digest for document in read_stored(mixture, fraction)}
    assert held_out and trained and not held_out & trained
    assert len(held_out | trained) == sum(DOCUMENTS.values())
    for batch in taken(40, validation_fraction=fraction):
        assert not is_held_out(batch.digests, fraction).any()
    ids, starts, _ = held_out_rows(mixture, TOKENIZER, fraction, 10, 8)
    parts = [
        held_out_rows(part.source, TOKENIZER, fraction, rows, 8)
        for part, rows in zip(mixture.parts, (6, 3, 1), strict=True)
    ]
    assert (
        len(ids)
        and torch.equal(ids, torch.cat([part.ids for part in parts]))
        and torch.equal(starts, torch.cat([part.doc_start for part in parts]))
    )


def test_documents_in_stored_order_take_turns():
    names = [document.text.split()[0] for document in read_stored(some_mixture(), 0.0)]
    assert [names[:10].count(name) for name in WEIGHTS] == [6, 3, 1]
    assert [names.count(name) for name in WEIGHTS] == list(DOCUMENTS.values())


class _NoSource(ListSource):
    """Its documents cannot be read."""

    def read(self, shard: int, first_block: int = 0) -> Iterator[Block]:
        raise AssertionError(f"shard {shard}, block {first_block} was asked for")


@pytest.mark.parametrize("workers", [0, 1])
def test_every_source_has_a_cache_from_which_the_same_batches_come(tmp_path, workers):
    whole = taken(40)
    entries = [
        {"name": name, "weight": weight, "data": "local", "paths": [name]} for name, weight in WEIGHTS.items()
    ]
    config = RunConfig(data="mixture", mixture=entries, token_cache=str(tmp_path))
    for kind in (ListSource, _NoSource):
        mixture = some_mixture(kind)
        caches = open_caches(config, mixture, TOKENIZER)
        assert len({cache.folder for cache in caches.parts if cache is not None}) == 3
        batches = training_batches(mixture, TOKENIZER, **SHAPE, cache=caches, workers=workers)
        assert all(same(next(batches), batch) for batch in whole)
        batches.close()
        sizes = [cache.tokens_of(2) for cache in caches.parts if cache is not None]
        assert sizes == [
            sum(len(TOKENIZER.encode(text, special=False)) + 1 for text in texts) for texts in _texts()
        ]
        caches.close()


def _texts() -> list[list[str]]:
    return [
        [f"{name} {index} " * (1 + index % 4) for index in range(count)] for name, count in DOCUMENTS.items()
    ]


def test_an_error_names_the_source():
    class Broken(ListSource):
        def read(self, shard: int, first_block: int = 0) -> Iterator[Block]:
            raise LoadError("the disk is gone")

    *sound, last = some_mixture().parts
    broken = MixtureSource([*sound, replace(last, source=Broken([[["text"]]]))])
    batches = training_batches(broken, TOKENIZER, **SHAPE)
    with pytest.raises(LoadError, match="mixture: math: the disk is gone"):
        list(itertools.islice(batches, 20))
    empty = MixtureSource([*sound, replace(last, source=ListSource([[["", None]]]))])
    with pytest.raises(LoadError, match="mixture: math: data: expected documents to train on, found none"):
        list(itertools.islice(training_batches(empty, TOKENIZER, **SHAPE), 20))


def test_its_fingerprint_and_revision_name_its_sources():
    mixture = some_mixture()
    assert mixture.fingerprint == "mixture of 3 (0.6 web: list web; 0.3 code: list code; 0.1 math: list math)"
    assert mixture.revision == {"web": None, "code": None, "math": None}
