"""The token cache: the same batches from it, whatever was damaged, torn, locked or full; and one leader for a
node.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
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
from train.data.source_record import find_source_record, source_folder, write_source_record
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
    assert len(rows[0]) and [part.tolist() for part in rows[:2]] == [part.tolist() for part in cached[:2]]


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


def change_manifest(folder: Path, line: int, old: str, new: str) -> None:
    manifest = folder / "shard-00001.jsonl"
    lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new, 1)
    manifest.write_text("".join(lines), encoding="utf-8")


def exchange_shards(folder: Path) -> None:
    for suffix in (".jsonl", ".tokens", ".docs"):
        one, other = (folder / f"shard-0000{number}{suffix}" for number in (0, 1))
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)


def as_an_earlier_version(folder: Path) -> None:
    for manifest in folder.glob("*.jsonl"):
        records = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
        for record in records:
            del record["seal"]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        manifest.write_text(lines, encoding="utf-8")


def append(folder: Path, suffix: str, content: bytes) -> None:
    with (folder / f"shard-00001{suffix}").open("ab") as stream:
        stream.write(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: change_manifest(folder, 0, '"block": 0', '"block": 1'), "jsonl: line 1 is damaged"),
        (lambda folder: change_manifest(folder, 1, '"block": 1', '"block": 0'), "jsonl: line 2 is damaged"),
        (lambda folder: change_manifest(folder, 2, '"blocks": 2', '"blocks": 1'), "jsonl: line 3 is damaged"),
        (
            lambda folder: change_manifest(folder, 1, '"tokens": [', '"tokens": [-'),
            "jsonl: line 2 is damaged",
        ),
        (lambda folder: change_manifest(folder, 1, '"docs": [60, 5]', '"docs": [0, 5]'), "line 2 is damaged"),
        (lambda folder: change_manifest(folder, 0, '"docs": [0, 5]', '"docs": [0, 4]'), "line 1 is damaged"),
        (lambda folder: change_manifest(folder, 0, '"seal"', '"version": 3, "seal"'), "line 1 is damaged"),
        (
            lambda folder: append(folder, ".jsonl", b'{"block": 1, "tokens": "x"}\n'),
            "jsonl: line 4 is damaged",
        ),
        (lambda folder: append(folder, ".jsonl", b"[" * 100_000 + b"\n"), "jsonl: line 4 is damaged"),
        (lambda folder: append(folder, ".tokens", b"garbage"), ""),
        (lambda folder: append(folder, ".docs", b"garbage"), ""),
        (
            lambda folder: append(
                folder, ".jsonl", (folder / "shard-00001.jsonl").read_bytes().splitlines(keepends=True)[0]
            ),
            "",
        ),
        (exchange_shards, "shard-00000.jsonl: line 1 is damaged or of another cache"),
        (as_an_earlier_version, "was written by an earlier version; its blocks are tokenised again"),
    ],
)
def test_a_block_is_only_read_at_its_place(tmp_path, tokenizer, expected, damage, said, capsys):
    """The batches stay the same, the damage is said once, and the cache is sound again afterwards."""
    cache = opened(tmp_path, tokenizer)
    assert matches(some_source(), tokenizer, cache, expected)
    damage(cache.folder)
    assert matches(some_source(), tokenizer, opened(tmp_path, tokenizer), expected)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (0 if not said else 2 if damage is exchange_shards else 1)
    assert said in "".join(lines)
    assert matches(NoSource(some_source().shards), tokenizer, opened(tmp_path, tokenizer), expected)
    assert capsys.readouterr().out == ""


def test_shards_of_another_source_or_tokenizer_are_not_read(tmp_path, tokenizer, expected):
    theirs = some_source(documents=7)
    theirs.cache_key = ("list", "2")
    other = train_tokenizer(["other words"], tokenizer.vocab_size)
    config = RunConfig(data="local", paths=["-"], token_cache=str(tmp_path))
    for source, tokens in ((theirs, tokenizer), (some_source(), other)):
        foreign = open_cache(config, source, tokens)
        assert foreign is not None
        batches = training_batches(source, tokens, **SHAPE, cache=foreign)
        list(itertools.islice(batches, STEPS))
        batches.close()
        mine = opened(tmp_path, tokenizer)
        for file in mine.folder.iterdir():
            file.unlink()
        for file in foreign.folder.iterdir():
            (mine.folder / file.name).write_bytes(file.read_bytes())
        assert matches(some_source(), tokenizer, mine, expected)


def test_verification_counts_what_follows_a_damaged_line(tmp_path):
    cache = TokenCache(tmp_path, "uint16")
    for block in range(3):
        cache.put(1, block, some_block())
    cache.close()
    change_manifest(tmp_path, 1, '"block": 1', '"block": 7')
    found = [(block, tokens is not None) for _, block, tokens in TokenCache(tmp_path, "uint16").verify()]
    assert found == [(0, True), (1, False)]


@pytest.mark.parametrize(
    "changed", [('"num_shards": 6', '"num_shards": 5'), ("c0ffee", "c0ffed"), ("{", "[")]
)
def test_a_source_record_is_only_read_as_it_was_written(tmp_path, changed, capsys):
    record = {"identity": "hub name", "revision": "c0ffee", "wanted": [None], "num_shards": 6}
    folder = source_folder(tmp_path, "hub name", "c0ffee")
    folder.mkdir(parents=True)
    write_source_record(folder / "source.json", record)
    found = find_source_record(tmp_path, "hub name", None)
    assert found is not None and found[1].items() >= record.items()
    path = folder / "source.json"
    path.write_text(path.read_text(encoding="utf-8").replace(*changed, 1), encoding="utf-8")
    assert find_source_record(tmp_path, "hub name", None) is None
    assert "source.json is damaged" in capsys.readouterr().out


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
from train.data.source_record import find_source_record, source_folder, write_source_record
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
