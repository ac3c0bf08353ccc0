"""Which files a corpus is made of, and that their sizes are claims: what is read, and what is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from train_cases import run_config

from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.tokenizer import train_tokenizer
from train import run as train_run
from train.command_line import parse
from train.config import RunConfig
from train.data import local
from train.data.batches import training_batches
from train.data.local import LocalSource
from train.data.open import open_source


def stored(source: LocalSource) -> list[object]:
    return [text for shard in range(source.num_shards) for block in source.read(shard) for text in block]


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("name", ["b.JSONL", "b.Jsonl.GZ", *(f"b.jsonl{suffix}" for suffix in PACK)])
def test_compressed_files_and_suffixes_in_capitals_are_read(tmp_path, name, monkeypatch):
    texts = [f"text {index}" for index in range(40)]
    content = lines(*texts)
    (tmp_path / name).write_bytes(PACK.get(Path(name).suffix.lower(), bytes)(content))
    monkeypatch.setattr(local, "BYTE_BLOCK", 100)
    source = LocalSource([str(tmp_path)], "text")
    assert stored(source) == texts
    if source.num_shards == 1:
        blocks = list(source.read(0))
        assert len(blocks) > 5 and list(source.read(0, 3)) == blocks[3:]


@pytest.mark.parametrize("suffix", PACK)
def test_a_damaged_compressed_file_is_named(tmp_path, suffix):
    content = PACK[suffix](lines(*map(str, range(9999))))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(LoadError, match=f"a.jsonl{suffix}: cannot be"):
        stored(LocalSource([str(tmp_path)], "text"))


def test_linked_folders_are_read_once_and_cycles_end(tmp_path, capsys):
    for name in ("data/sub", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data/sub/a.jsonl").write_bytes(lines("a"))
    (tmp_path / "elsewhere/b.jsonl").write_bytes(lines("b"))
    (tmp_path / "data/again").symlink_to(tmp_path / "data/sub")
    (tmp_path / "data/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    (tmp_path / "data/gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    os.mkfifo(tmp_path / "data/pipe.txt")
    (tmp_path / "data/table.csv").write_text("a,b", encoding="utf-8")
    assert stored(LocalSource([str(tmp_path / "data")], "text")) == ["b", "a"]
    (line,) = capsys.readouterr().out.splitlines()
    assert "1 broken link" in line and "gone.jsonl" in line and "1 .csv" in line and "pipe.txt" in line


def test_what_was_left_out_of_an_empty_corpus_is_said(tmp_path):
    (tmp_path / "a.csv").write_text("a", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(UsageError, match=r"found none; left out: 1 .csv .*a.csv.*UTF-16 .expected UTF-8"):
        LocalSource([str(tmp_path)], "text")


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.txt", b"one"), ("b.py", b"two"), ("c.jsonl", lines("three"))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert sorted(map(str, stored(LocalSource([str(tmp_path)], "text")))) == ["b'one'", "b'two'", "three"]


@pytest.mark.parametrize("name", ["a[1].txt", "a,b.txt", "a b.txt", "'a'.txt", "a*.txt", "~a.txt", "$a.txt"])
def test_a_file_is_found_by_its_name_whatever_the_characters(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a1.txt").write_text("another", encoding="utf-8")
    Path(name).write_text("this", encoding="utf-8")
    for given in (f"paths={name}", f'paths=["{name}"]'):
        config, _ = parse(["model=tiny", "data=local", given])
        assert config.paths == [name]
        assert stored(LocalSource(config.paths, "text")) == [b"this"]
    config, _ = parse(["model=tiny", "data=local", f'paths=["{name}",a1.txt]'])
    assert config.paths == [name, "a1.txt"]
    part = {"weight": 1, "data": "local", "paths": [name]}
    source = open_source(RunConfig(data="mixture", mixture=[part]))
    assert next(source.parts[0].source.read(0)) == [b"this"]


def test_a_glob_in_a_folder_with_brackets(tmp_path):
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "a.txt").write_text("this", encoding="utf-8")
    assert stored(LocalSource([str(tmp_path / "run[1]" / "*.txt")], "text")) == [b"this"]


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_present_folder(name):
    with pytest.raises(UsageError, match="paths: expected the name of a file"):
        LocalSource([name], "text")


@pytest.mark.parametrize("patterns", [[""], ["/**/*.txt", "/**/*.jsonl"]])
def test_folders_of_runs_and_token_caches_are_no_documents(tmp_path, patterns, capsys):
    corpus = tmp_path / "corpus"
    (corpus / "cache").mkdir(parents=True)
    (corpus / "notes.txt").write_text("The sea and the boat. " * 400, encoding="utf-8")
    (corpus / "cache/shard-00000.jsonl").write_text("{}\n", encoding="utf-8")
    (corpus / "cache/shard-00000.tokens").write_text("", encoding="utf-8")
    (corpus / "more.jsonl").write_bytes(lines("more"))
    keys = {"paths": [f"{corpus}{pattern}" for pattern in patterns]}
    keys |= {"output_dir": str(corpus / "runs/a"), "sample_every": 1, "checkpoint_every": 0}
    for steps, resume in ((2, "none"), (3, "auto")):
        config = run_config(tmp_path, steps=steps, resume=resume, **keys)
        assert train_run.train(config) == 0
    assert (corpus / "runs/a/samples.txt").is_file()
    assert LocalSource(config.paths, "text").files == [corpus / "more.jsonl", corpus / "notes.txt"]
    out = capsys.readouterr().out
    assert "folder of a run" in out and "token cache" in out


# ---- sizes are claims --------------------------------------------------------------------------------------


@pytest.fixture
def limits(monkeypatch):
    """Bytes of a stretch, a document and a block."""
    for name, value in (("BYTE_BLOCK", 100), ("DOCUMENT_LIMIT", 250), ("BLOCK_LIMIT", 1000)):
        monkeypatch.setattr(local, name, value)


@pytest.mark.parametrize("suffix", ["", *PACK])
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_line_without_end_is_passed_over_and_named_once(tmp_path, limits, suffix, end, capsys):
    content = lines("before") + b'"' + b"x" * 900 + b'"' + end.encode() + (lines("after") if end else b"")
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK.get(suffix, bytes)(content))
    (tmp_path / "b.txt").write_bytes(b"y" * 900 + b"\n\nlast")
    source = LocalSource([str(tmp_path)], "text")
    texts = stored(source)
    assert texts == ["before", None, *(["after"] if end else []), None, b"last"] == stored(source)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and all("documents of more than 250 bytes are passed over" in line for line in out)


def test_a_large_program_is_passed_over(tmp_path, limits):
    (tmp_path / "a.py").write_bytes(b"#" * 251)
    (tmp_path / "b.py").write_bytes(b"#" * 250)
    assert stored(LocalSource([str(tmp_path)], "text")) == [None, b"#" * 250]


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_rows_of_a_parquet_file_are_blocks_of_bounded_size(tmp_path, limits, kind):
    texts = [f"{index:03}" * (80 if index % 2 else 1) for index in range(60)]
    texts[7] = "z" * 251
    column = pa.array(texts).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=40)
    source = LocalSource([str(tmp_path)], "text")
    blocks = list(source.read(0))
    assert [text for block in blocks for text in block] == [*texts[:7], None, *texts[8:40]]
    assert len(blocks) > 3 and all(sum(len(text or "") for text in block) <= 1000 for block in blocks)
    for first in range(len(blocks) + 1):
        assert list(source.read(0, first)) == blocks[first:]


def test_files_that_unpack_to_a_thousand_times_their_size_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(local, "DOCUMENT_LIMIT", 4 << 20)
    one = pa.table({"text": ["a" * (local.DOCUMENT_LIMIT + 1)]})
    pq.write_table(one, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    pq.write_table(pa.table({"text": ["good"]}), tmp_path / "b.parquet")
    assert stored(LocalSource([str(tmp_path)], "text")) == ["good"]
    assert "a.parquet: row group 0 claims to unpack to more than 1,000 times" in capsys.readouterr().out


def test_the_rest_of_a_compressed_bomb_is_passed_over(tmp_path, limits, monkeypatch, capsys):
    monkeypatch.setattr(local, "RATIO", 10)
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(lines("good") + b"\n" * 1_000_000))
    assert stored(LocalSource([str(tmp_path)], "text")) == ["good"]
    assert "unpacks to over 10 times its size" in capsys.readouterr().out


def test_documents_that_were_passed_over_are_counted(tmp_path, limits):
    (tmp_path / "a.jsonl").write_bytes(lines("good", "x" * 900, "good"))
    batches = training_batches(
        LocalSource([str(tmp_path)], "text"), train_tokenizer(["good"], 300), rows=1, length=8
    )
    assert next(batches).invalid >= 1
