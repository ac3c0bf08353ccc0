"""Where a part of a corpus stands for all of it, in evaluation and in the learned tokenizer, every file gives
its share.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from data_sources import ListSource
from train_cases import run_config

from smollm2.pretrained.tokenizer import train_tokenizer
from train import run as train_run
from train.data.batches import held_out_rows, read_stored
from train.data.local import LocalSource
from train.data.source import Block
from train.data.token_cache import TokenCache
from train.data.turns import SPREAD, turns
from train.distributed import World

TOKENIZER = train_tokenizer([f"shard {number} says: abcdefghij" for number in range(100)], 300)


class Counted(ListSource):
    """Says which blocks were read, and which readers were closed."""

    def __init__(self, shards: list[list[Block]]) -> None:
        super().__init__(shards)
        self.read_blocks: Counter[int] = Counter()
        self.open = 0

    def read(self, shard: int, first_block: int = 0) -> Generator[Block, None, None]:
        self.open += 1
        try:
            for block in self.shards[shard][first_block:]:
                self.read_blocks[shard] += 1
                yield block
        finally:
            self.open -= 1


def counted(shards: int, blocks: int, documents: int = 10) -> Counted:
    return Counted(
        [
            [[f"shard {s} says: {b} {d} abcdefghij" for d in range(documents)] for b in range(blocks)]
            for s in range(shards)
        ]
    )


def shards_of(rows: torch.Tensor) -> Counter[int]:
    """How many of the documents in the rows come from each shard."""
    words = TOKENIZER.decode(rows.flatten().tolist()).split()
    pairs = itertools.pairwise(words)
    return Counter(int(number) for word, number in pairs if word.endswith("shard") and number.isdigit())


@pytest.fixture(scope="module")
def two_languages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("languages")
    english = [f"The boat {number} goes out to the sea at {number % 24} o'clock." for number in range(600)]
    russian = [f"Лодка {number} выходит в море в {number % 24} часа." for number in range(1200)]
    for name, texts in (("a_english", english), ("b_russian1", russian[:600]), ("b_russian2", russian[600:])):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_evaluation_and_tokenizer_know_both_languages(tmp_path, two_languages):
    keys = {"paths": [str(two_languages)], "eval_every": 2, "eval_batches": 4, "tokenizer_documents": 400}
    run = train_run.build(run_config(tmp_path, vocab_size=500, **keys), World(torch.device("cpu")))
    text = run.tokenizer.decode(run.held_out.ids.flatten().tolist())
    assert "boat" in text and "Лодка" in text
    word = "выходит"
    assert len(run.tokenizer.encode(word, special=False)) < len(word)  # a token is more than a letter


def test_every_path_that_is_held_out_is_evaluated(tmp_path, two_languages):
    named = [str(two_languages / name) for name in ("a_english.jsonl", "b_russian2.jsonl")]
    keys = {"paths": [str(two_languages)], "validation_paths": named, "eval_every": 2}
    run = train_run.build(run_config(tmp_path, eval_batches=4, **keys), World(torch.device("cpu")))
    text = run.tokenizer.decode(run.held_out.ids.flatten().tolist())
    assert len(run.held_out.ids) == 8 and "boat" in text and "Лодка" in text


def test_of_many_small_files_in_one_block_not_the_first_stand_for_all(tmp_path):
    for package in ("alpha", "beta", "gamma"):
        (tmp_path / package).mkdir()
        for number in range(20):
            (tmp_path / package / f"m{number}.py").write_text(f"{package} = {number}\n" * 4, encoding="utf-8")
    source = LocalSource([str(tmp_path)], "text")
    text = TOKENIZER.decode(held_out_rows(source, TOKENIZER, 1.0, 8, 64).ids.flatten().tolist())
    assert all(package in text for package in ("alpha", "beta", "gamma"))
    texts = " ".join(document.text for document in itertools.islice(read_stored(source, 0, wanted=30), 30))
    assert all(package in texts for package in ("alpha", "beta", "gamma"))


@pytest.mark.parametrize("workers", [0, 1])
def test_every_shard_gives_its_share_and_none_is_read_to_its_end(workers):
    source = counted(shards=4, blocks=500)
    rows = held_out_rows(source, TOKENIZER, 1.0, 8, 64, workers=workers).ids
    found = shards_of(rows)
    assert len(rows) == 8 and set(found) == {0, 1, 2, 3} and max(found.values()) - min(found.values()) <= 2
    assert max(source.read_blocks.values()) < 250 and source.open == 0


def test_of_more_shards_than_wanted_some_are_opened():
    source = counted(shards=1000, blocks=2)
    rows = held_out_rows(source, TOKENIZER, 1.0, 8, 64).ids
    assert len(rows) == 8 and len(source.read_blocks) == 8 and max(source.read_blocks) > 8
    source = counted(shards=1000, blocks=20)
    texts = list(itertools.islice(read_stored(source, 0.0, wanted=640), 640))
    assert len(texts) == 640 and len(source.read_blocks) == SPREAD and source.open == 0


def test_where_the_shares_do_not_suffice_shards_with_more_go_on():
    small = [[[f"shard {s} says: abcdefghij"]] for s in range(1, 9)]
    source = Counted([*small, counted(1, 40).shards[0]])
    rows = held_out_rows(source, TOKENIZER, 1.0, 12, 64)
    assert len(rows.ids) == 12 and set(shards_of(rows.ids)) == set(range(9))
    texts = [document.text for document in itertools.islice(read_stored(source, 0.0, wanted=100), 100)]
    assert len(texts) == len(set(texts)) == 100
    everything = [document.text for document in read_stored(source, 0.0, wanted=100)]
    assert sorted(everything) == sorted(document.text for document in read_stored(source, 0.0))
    # all there is, and no document twice
    rows = held_out_rows(source, TOKENIZER, 1.0, 10_000, 16)
    tokens = sum(len(TOKENIZER.encode(text, special=False)) + 1 for text in everything)
    assert len(rows.ids) == tokens // 16
    words = TOKENIZER.decode(rows.ids.flatten().tolist())
    assert words.count("says") in (len(everything), len(everything) - 1)


def test_the_rows_depend_on_no_cache_and_no_workers(tmp_path):
    def rows(**how: object) -> list[list[int]]:
        return held_out_rows(counted(5, 6), TOKENIZER, 0.4, 12, 32, **how).ids.tolist()  # type: ignore[arg-type]

    plain = rows()
    assert len(plain) == 12 and plain == rows() == rows(workers=2)
    cache = TokenCache(tmp_path, "uint16")
    assert plain == rows(cache=cache) == rows(cache=cache)


def test_a_continued_document_does_not_see_another_shard():
    long = " ".join(f"word{number}" for number in range(400))
    rows = held_out_rows(Counted([[[long]], [[long[::-1]]], [["x"]]]), TOKENIZER, 1.0, 100, 64)
    wanted = sum(len(TOKENIZER.encode(text, special=False)) + 1 for text in (long, long[::-1], "x"))
    assert len(rows.ids) == wanted // 64
    assert (rows.doc_start.diff(dim=1) >= 0).all() and (rows.doc_start[:, 0] == 0).all()


def test_the_shares_are_even_and_the_order_is_the_same_each_time():
    def given(available: list[int], wanted: int, least: int = 1) -> list[tuple[int, int]]:
        left, found = list(available), []
        visits: Iterator = turns(len(available), wanted, least)
        for turn in visits:
            turn.given = min(left[turn.shard], turn.share)
            left[turn.shard] -= turn.given
            turn.more = left[turn.shard] > 0
            found.append((turn.shard, turn.given))
            if (wanted := wanted - turn.given) <= 0:
                break
        return found

    assert sorted(given([100] * 4, 12)) == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert given([100] * 50, 64) == given([100] * 50, 64)
    assert sum(count for _, count in given([1, 1, 50, 2], 40)) >= 40
    assert sum(count for _, count in given([1, 1, 5, 2], 40)) == 9  # and an end
