"""The token cache: the same batches from it, whatever was damaged, torn, locked or full; and one leader for a
node.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_sources import ListSource, same, some_source
from train_cases import DEADLINE

from smollm2.errors import UsageError
from smollm2.pretrained.tokenizer import Tokenizer, train_tokenizer
from train.config import RunConfig
from train.data import token_cache
from train.data.batches import held_out_rows, training_batches
from train.data.packing import Batch
from train.data.source import Block
from train.data.token_cache import TokenCache, open_cache
from train.data.tokenise import TokenBlock

SHAPE = dict(rows=2, length=16, seed=3, validation_fraction=0.2)
STEPS = 40  # more than an epoch of some_source()


class NoSource(ListSource):
    """Its documents cannot be read."""

    def read(self, shard: int, first_block: int = 0) -> Iterator[Block]:
        raise AssertionError(f"shard {shard}, block {first_block} was asked for")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["document 0123456789 . " * 5], 280)


@pytest.fixture(scope="module")
def expected(tokenizer):
    return list(itertools.islice(training_batches(some_source(), tokenizer, **SHAPE), STEPS))


def opened(folder: Path, tokenizer: Tokenizer, *, leader: bool = True) -> TokenCache:
    cache = open_cache(
        RunConfig(data="local", paths=["-"], token_cache=str(folder)), some_source(), tokenizer, leader=leader
    )
    assert cache is not None
    return cache


def matches(
    source: ListSource, tokenizer: Tokenizer, cache: TokenCache, expected: list[Batch], workers: int = 0
) -> bool:
    batches = training_batches(source, tokenizer, **SHAPE, cache=cache, workers=workers)
    result = all(same(next(batches), batch) for batch in expected)
    batches.close()
    return result


def some_block(count: int = 3) -> TokenBlock:
    lengths = np.arange(1, count + 1)
    return TokenBlock(np.arange(lengths.sum()).astype(np.uint16), lengths, lengths.astype(np.uint64))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_run_reads_the_same_batches_without_the_source(tmp_path, tokenizer, expected, workers):
    assert matches(some_source(), tokenizer, opened(tmp_path, tokenizer), expected, workers)
    source = some_source()
    assert matches(NoSource(source.shards), tokenizer, opened(tmp_path, tokenizer), expected, workers)
    rows = held_out_rows(source, tokenizer, 0.2, 3, 16)
    cached = held_out_rows(NoSource(source.shards), tokenizer, 0.2, 3, 16, opened(tmp_path, tokenizer))
    assert len(rows[0]) and [part.tolist() for part in rows] == [part.tolist() for part in cached]


def test_held_out_documents_fill_the_cache_with_whole_blocks(tmp_path, tokenizer):
    cache = opened(tmp_path, tokenizer)
    held_out_rows(some_source(), tokenizer, 0.2, 1000, 16, cache)
    assert [cache.blocks(shard) for shard in range(3)] == [2, 2, 2]
    block = cache.get(1, 1)
    assert block is not None and (block.lengths > 0).tolist() == [True, True, True, False, True]


def test_another_tokenizer_and_another_version_of_the_source_have_another_folder(tmp_path, tokenizer):
    other = train_tokenizer(["other words"], 290)
    folders = {opened(tmp_path, one).folder for one in (tokenizer, other)}
    source = some_source()
    source.cache_key = ("list", "2")
    changed = open_cache(RunConfig(data="local", paths=["-"], token_cache=str(tmp_path)), source, tokenizer)
    assert changed is not None and len({*folders, changed.folder}) == 3


@pytest.mark.parametrize("suffix", [".tokens", ".docs"])
def test_a_damaged_block_is_named_and_tokenised_again(tmp_path, tokenizer, expected, suffix, capsys):
    cache = opened(tmp_path, tokenizer)
    assert matches(some_source(), tokenizer, cache, expected)
    file = cache.folder / f"shard-00001{suffix}"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    assert matches(some_source(), tokenizer, opened(tmp_path, tokenizer), expected)
    (line,) = capsys.readouterr().out.splitlines()
    assert "shard-00001" in line and "block 0 is damaged" in line
    # the later line wins
    assert matches(NoSource(some_source().shards), tokenizer, opened(tmp_path, tokenizer), expected)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("cut", [1, 30, 60])
def test_what_a_killed_process_left_half_written_is_cut_off(tmp_path, cut):
    cache = TokenCache(tmp_path, "uint16")
    for block in range(3):
        cache.put(4, block, some_block(block + 2))
    cache.close()
    manifest = tmp_path / "shard-00004.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-cut])
    with (tmp_path / "shard-00004.tokens").open("ab") as tokens:
        tokens.write(b"half a block")
    cache = TokenCache(tmp_path, "uint16")
    assert [cache.has(4, block) for block in range(4)] == [True, True, False, False]
    cache.put(4, 2, some_block(9))
    cache.finish(4, 3)
    again = TokenCache(tmp_path, "uint16")
    assert again.blocks(4) == 3
    assert [len(block.lengths) for _, _, block in again.verify() if block is not None] == [2, 3, 9]
    end = sum(some_block(count).tokens.nbytes for count in (2, 3, 9))
    assert (tmp_path / "shard-00004.tokens").stat().st_size == end


def test_a_process_killed_while_it_writes_leaves_only_whole_blocks(tmp_path, project_root):
    program = f"""
import itertools, numpy as np
from train.data.token_cache import TokenCache
from train.data.tokenise import TokenBlock
cache = TokenCache(__import__("pathlib").Path({str(tmp_path)!r}), "uint16")
for block in itertools.count():
    tokens = np.full(50_000, block, np.uint16)
    cache.put(0, block, TokenBlock(tokens, np.array([50_000]), np.array([1], np.uint64)))
    print(block, flush=True)
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=project_root, text=True
    )
    assert writer.stdout is not None
    while int(writer.stdout.readline()) < 20:
        pass
    writer.kill()
    writer.wait()
    cache = TokenCache(tmp_path, "uint16")
    found = {block: int(tokens.tokens[0]) for _, block, tokens in cache.verify() if tokens is not None}
    assert len(found) > 20 and all(block == value for block, value in found.items())
    cache.put(0, len(found), some_block())
    assert cache.get(0, len(found)) is not None


def test_a_shard_that_another_process_writes_is_not_stored_and_training_goes_on(
    tmp_path, tokenizer, expected, capsys
):
    cache = opened(tmp_path, tokenizer)
    with (cache.folder / "shard-00002.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert matches(some_source(), tokenizer, cache, expected)
        assert capsys.readouterr().out.count("is being written by another process") == 1
        assert [cache.blocks(shard) for shard in range(3)] == [2, 2, None]
        follower = opened(tmp_path, tokenizer, leader=False)
        assert matches(some_source(), tokenizer, follower, expected)  # told not to wait
    assert matches(some_source(), tokenizer, opened(tmp_path, tokenizer), expected)
    assert opened(tmp_path, tokenizer).blocks(2) == 2
    assert not list(cache.folder.glob("*.unstored"))


def test_a_full_disk_is_reported_once_and_training_goes_on(tmp_path, tokenizer, expected, capsys):
    cache = opened(tmp_path, tokenizer)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = io.StringIO()
    # where output goes to a file, that would be limited too
    with capsys.disabled(), contextlib.redirect_stdout(said):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        try:
            result = matches(some_source(), tokenizer, cache, expected)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result and said.getvalue().count("training goes on") == 1
    sound = [block for _, _, block in opened(tmp_path, tokenizer).verify()]
    assert len(sound) < 6 and None not in sound
    # does not wait: it was told
    assert matches(some_source(), tokenizer, opened(tmp_path, tokenizer, leader=False), expected)


def test_a_failed_write_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.ShardWriter, "append", full)
    cache = TokenCache(tmp_path, "uint16")
    for block in range(3):
        cache.put(0, block, some_block())
    (line,) = capsys.readouterr().out.splitlines()
    assert "No space left on device" in line and "training goes on" in line


def test_the_other_ranks_of_a_node_read_what_the_leader_stores(tmp_path, tokenizer, expected, monkeypatch):
    result: list[bool] = []
    follower = opened(tmp_path, tokenizer, leader=False)
    arguments = (NoSource(some_source().shards), tokenizer, follower, expected)
    follower._patience = DEADLINE
    read, looked = follower._read, threading.Event()

    def noted(shard: int, block: int) -> TokenBlock | None:
        looked.set()
        return read(shard, block)

    monkeypatch.setattr(follower, "_read", noted)
    thread = threading.Thread(target=lambda: result.append(matches(*arguments)))
    thread.start()
    assert looked.wait(DEADLINE)
    assert matches(some_source(), tokenizer, opened(tmp_path, tokenizer), expected)
    thread.join(DEADLINE)
    assert result == [True]


def test_a_leader_that_stores_nothing_is_not_waited_for_for_ever(
    tmp_path, tokenizer, expected, monkeypatch, capsys
):
    monkeypatch.setattr(token_cache, "WAIT_TIMEOUT", 0.2)
    monkeypatch.setattr(token_cache, "WAIT_NOTE", 0.0)
    assert matches(some_source(), tokenizer, opened(tmp_path, tokenizer, leader=False), expected[:3])
    out = capsys.readouterr().out
    assert "waiting for shard" in out and "did not appear" in out


def test_no_cache_where_none_is_wanted_and_an_unwritable_folder_is_named(tmp_path, tokenizer):
    assert open_cache(RunConfig(), some_source(), tokenizer) is None
    assert open_cache(RunConfig(data="hub", token_cache="none"), some_source(), tokenizer) is None
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="token_cache: .*cannot be written.*name another"):
        opened(tmp_path / "file", tokenizer)
