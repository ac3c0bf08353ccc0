"""Sources of documents: what is read, in which pieces, and what happens with input that is not text."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.tokenizer import train_tokenizer
from train.config import RunConfig
from train.data import embedded, hub, local
from train.data.batches import read_stored, training_batches
from train.data.embedded import EmbeddedSource
from train.data.hub import HubSource
from train.data.local import LocalSource
from train.data.open import open_source
from train.data.packing import Batch
from train.data.tokenise import digest


def write_cosmopedia(folder: Path, files: int = 3, rows: int = 250, row_group: int = 100) -> list[str]:
    """Parquet files with cosmopedia-v2's columns; returns the texts in stored order."""
    texts: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        part = [
            f"Course unit {number}.{row}: why the sky is blue, part {row}. " * (1 + row % 3)
            for row in range(rows)
        ]
        columns = {
            "prompt": ["Write a text."] * rows, "text": part,
            "token_length": [len(text) // 4 for text in part], "audience": ["general"] * rows,
            "format": ["textbook"] * rows, "seed_data": ["auto_math_text"] * rows,
        }  # fmt: skip
        pq.write_table(
            pa.table(columns), folder / f"train-{number:05d}-of-{files:05d}.parquet", row_group_size=row_group
        )
        texts += part
    return texts


def stored(source: Any) -> list[Any]:
    return [
        document for shard in range(source.num_shards) for block in source.read(shard) for document in block
    ]


def test_parquet_files_are_read_by_row_group(tmp_path):
    texts = write_cosmopedia(tmp_path)
    source = LocalSource([str(tmp_path)], "text")
    assert source.num_shards == 9
    assert stored(source) == texts


def test_hub_code_path_reads_the_same_documents_from_a_local_folder(tmp_path):
    texts = write_cosmopedia(tmp_path, files=2, rows=2100, row_group=500)
    source = open_source(RunConfig(data="hub", dataset=str(tmp_path)))
    assert isinstance(source, HubSource)
    assert source.num_shards == 2
    assert stored(source) == texts
    assert [len(block) for block in source.read(1)] == [1024, 1024, 52]
    assert next(source.read(1, first_block=2)) == texts[2100 + 2048 :]


def test_a_stream_that_breaks_is_read_again_from_the_same_block(tmp_path, monkeypatch, capsys):
    texts = write_cosmopedia(tmp_path, files=1, rows=3000)
    source = HubSource(str(tmp_path), "", "train", None, "text")
    pauses: list[float] = []
    monkeypatch.setattr(hub.random, "uniform", lambda low, high: 1.0)
    monkeypatch.setattr(hub.time, "sleep", pauses.append)

    class Flaky:
        """Fails once before every block but the first."""

        def __init__(self, rows: Any, skipped: int = 0) -> None:
            self.rows, self.skipped, self.num_shards = rows, skipped, rows.num_shards

        def shard(self, **kwargs: int) -> Flaky:
            return Flaky(self.rows.shard(**kwargs))

        def skip(self, count: int) -> Flaky:
            return Flaky(self.rows, count)

        def iter(self, batch_size: int) -> Iterator[Any]:
            yield next(self.rows.skip(self.skipped).iter(batch_size=batch_size))
            raise ConnectionError("reset by peer")

    source._rows = Flaky(source._rows)  # type: ignore[assignment]
    blocks = source.read(0)
    assert [next(blocks) for _ in range(3)] == [texts[:1024], texts[1024:2048], texts[2048:]]
    assert pauses == [1, 1]
    assert "ConnectionError" in capsys.readouterr().out
    with pytest.raises(LoadError, match="resume=auto"):
        next(blocks)  # beyond the last block this source never ends: it gives up after all its pauses
    assert pauses[2:] == list(hub.RETRY_PAUSES)


def test_jsonl_stretches_hold_every_line_once(tmp_path, monkeypatch):
    texts = [f"line {index} " + "x" * (index * 7 % 90) for index in range(200)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )
    for size in (64, 100, 257, 1 << 20):
        monkeypatch.setattr(local, "BYTE_BLOCK", size)
        assert stored(LocalSource([str(tmp_path / "*.jsonl")], "text")) == texts


def test_text_files_are_cut_at_paragraphs_and_nothing_is_lost(tmp_path, monkeypatch):
    paragraphs = [f"Paragraph {index}, of some length. " * 5 for index in range(120)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    documents = [document.decode() for document in stored(LocalSource([str(tmp_path)], "text"))]
    assert len(documents) > 5
    assert all(len(document) >= local.TEXT_DOCUMENT for document in documents[:-1])
    assert "\n\n".join(documents).split() == " ".join(paragraphs).split()
    monkeypatch.setattr(local, "BYTE_BLOCK", 1000)
    assert (
        b" ".join(stored(LocalSource([str(tmp_path)], "text"))).decode().split()
        == " ".join(paragraphs).split()
    )


def test_text_without_blank_lines_has_many_documents_too(tmp_path):
    lines = [f"Line {index} of a log, without an empty one.\n" for index in range(6000)]
    content = "".join([*lines, "x" * 3 * local.TEXT_LIMIT, "\n", *lines])
    (tmp_path / "log.txt").write_text(content, encoding="utf-8")
    documents = stored(LocalSource([str(tmp_path)], "text"))
    assert b"\n".join(documents).decode() == content.strip()
    sizes = sorted(map(len, documents))
    assert len(sizes) > 14 and sizes[-2] < local.TEXT_LIMIT + 100 and sizes[-1] > 3 * local.TEXT_LIMIT


def test_an_end_of_text_line_separates_documents(tmp_path):
    (tmp_path / "stories.txt").write_text(
        "One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n<|endoftext|>\nThree.", encoding="utf-8"
    )
    assert stored(LocalSource([str(tmp_path)], "text")) == [b"One.", b"Two.", b"Three."]


def test_documents_that_are_not_text_are_passed_over_and_counted(tmp_path):
    lines = [
        '{"text": "good one"}',
        '{"text": ""}',
        '{"text": null}',
        '{"other": "x"}',
        "not json",
        '{"text": 5}',
        '{"text": "  \\n"}',
        '{"text": "\\ud800"}',
        '"good two"',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = LocalSource([str(tmp_path)], "text")
    batches = training_batches(source, train_tokenizer(["good one two"], 300), rows=1, length=2)
    seen: list[Batch] = []
    while sum(len(batch.digests) for batch in seen) < 4:
        seen.append(next(batches))
    assert {int(key) for batch in seen for key in batch.digests} == {digest("good one"), digest("good two")}
    # Those behind the second epoch's last good document are still ahead.
    assert 7 <= sum(batch.invalid for batch in seen) <= 14
    assert [document.text for document in read_stored(source, 0.0, held_out=False)] == [
        "good one",
        "good two",
    ]


def test_a_corpus_without_a_usable_document_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    with pytest.raises(LoadError, match="found none .1 empty or not text.*text_column"):
        next(
            training_batches(
                LocalSource([str(tmp_path)], "text"), train_tokenizer(["x"], 300), rows=1, length=2
            )
        )


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.txt", None, UsageError, "found none"),
        ("data.xls", b"a,b", UsageError, r"expected one of \.parquet, \.jsonl, \.txt, \.py, .*, got \.xls"),
        ("data.parquet", b"not parquet", LoadError, "not a readable parquet file"),
    ],
)
def test_a_path_that_cannot_be_read_is_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        LocalSource([str(tmp_path / name)], "text")
    assert name in str(caught.value)


@pytest.mark.parametrize("data", ["local", "hub"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path, data):
    write_cosmopedia(tmp_path, files=1, rows=3)
    with pytest.raises(
        LoadError, match="expected a column 'content', got prompt, text, token_length.*text_column"
    ):
        open_source(
            RunConfig(
                data=data,
                paths=[str(tmp_path)] if data == "local" else [],
                dataset=str(tmp_path),
                text_column="content",
            )
        )


def test_a_dataset_that_cannot_be_reached_says_what_to_do():
    with pytest.raises(LoadError, match="smollm-corpus cosmopedia-v2: cannot be read.*data=local"):
        open_source(RunConfig(data="hub"))


def test_a_stream_is_pinned_to_the_commit_that_a_resumed_run_reads_again(tmp_path, monkeypatch):
    write_cosmopedia(tmp_path, files=1, rows=10)
    calls: list[dict[str, Any]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append({"args": args, **kwargs})
        return datasets_load(str(tmp_path), split="train", streaming=True)

    datasets_load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "_commit", lambda dataset, revision: revision or "c0ffee")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    source = open_source(RunConfig(data="hub"))
    assert source.revision == "c0ffee" and "c0ffee" in source.fingerprint
    resumed = open_source(RunConfig(data="hub"), revision=source.revision)
    assert resumed.fingerprint == source.fingerprint
    assert calls[0] == calls[1]
    assert calls[0]["args"] == ("HuggingFaceTB/smollm-corpus", "cosmopedia-v2")
    assert (calls[0]["streaming"], calls[0]["revision"], calls[0]["token"]) == (True, "c0ffee", "hf_test")


def test_the_embedded_corpus_is_large_enough_and_the_same_each_time():
    source = EmbeddedSource()
    assert source.fingerprint == EmbeddedSource().fingerprint
    assert len(source.documents) == len(set(source.documents)) > 1000
    assert sum(map(len, source.documents)) > 1_000_000
    assert any(document.startswith("class argparse.ArgumentParser") for document in source.documents)
    texts = [
        {" ".join(paragraph.split()) for paragraph in document.split("\n\n")} for document in source.documents
    ]
    long = [
        paragraph for paragraphs in texts for paragraph in paragraphs if len(paragraph) >= embedded.REPEAT
    ]
    assert len(set(long)) == len(long)  # held-out text is in no training document


def test_the_fingerprint_of_local_files_changes_with_them(tmp_path):
    (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
    before = LocalSource([str(tmp_path)], "text").fingerprint
    (tmp_path / "b.txt").write_text("more text", encoding="utf-8")
    assert LocalSource([str(tmp_path)], "text").fingerprint != before


def test_a_row_group_is_read_in_bounded_blocks(tmp_path):
    texts = write_cosmopedia(tmp_path, files=1, rows=2500, row_group=2300)
    source = LocalSource([str(tmp_path)], "text")
    assert [len(block) for block in source.read(0)] == [1024, 1024, 252]
    assert list(source.read(0, first_block=1)) == [texts[1024:2048], texts[2048:2300]]
    assert list(source.read(0, first_block=3)) == []
    assert stored(source) == texts
    assert source.span(0, 0) == (0.0, 1024 / 2300) and source.span(0, 2) == (2048 / 2300, 1.0)
    assert sum(source.sizes) == pytest.approx(source.files[0].stat().st_size)


def test_source_trees_are_read_a_file_a_document_in_groups(tmp_path, monkeypatch):
    for name in (
        "b/one.py",
        "a/two.py",
        "a/__pycache__/no.py",
        ".git/no.py",
        "c/three.py",
        "c/.hidden/no.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" * 10, encoding="utf-8")
    monkeypatch.setattr(local, "BYTE_BLOCK", 200)
    source = LocalSource([str(tmp_path)], "text")
    assert source.num_shards == 2
    assert [document.splitlines()[0].decode() for document in stored(source)] == [
        "# a/two.py",
        "# b/one.py",
        "# c/three.py",
    ]
    assert source.sizes == [220, 130]


def test_bytes_that_are_not_utf8_cost_one_document_each(tmp_path):
    good, bad = "sch\u00f6n".encode(), b"\xff\xfe broken"
    (tmp_path / "a.py").write_bytes(bad)
    (tmp_path / "b.txt").write_bytes(good)
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "json"}\n{"text": "\xff"}\n' + b"[" * 100_000 + b"\n")
    pq.write_table(pa.table({"text": pa.array([good, None, bad, b" "], pa.binary())}), tmp_path / "d.parquet")
    arrays = [pa.array([good, bad, good], kind).cast(pa.binary()) for kind in (pa.binary(),)]
    strings = pa.StringArray.from_buffers(3, *arrays[0].buffers()[1:])  # claims to be UTF-8, and is not
    pq.write_table(pa.table({"text": strings}), tmp_path / "e.parquet")
    source = LocalSource([str(tmp_path)], "text")
    assert [document.text for document in read_stored(source, 0.0)] == [
        "sch\u00f6n",
        "json",
        *["sch\u00f6n"] * 3,
    ]
    assert len(stored(source)) == 12


def test_a_cut_off_jsonl_is_reported_once_and_its_other_lines_are_read(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "whole"}\n{"text": "cut o', encoding="utf-8")
    source = LocalSource([str(tmp_path)], "text")
    assert stored(source) == stored(source) == ["whole", None]
    assert capsys.readouterr().out.count("the last line is cut off") == 1


def test_what_is_passed_over_of_conversations_is_said_once_for_each_file(tmp_path, capsys):
    talk = json.dumps({"messages": [{"role": "assistant", "content": "hi"}]}).encode()
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b"\r\n".join([talk, talk, b"", b""]))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([b"{", talk, b'"\xff"', b'{"text": "a"}', b"[]", b""]))
    (tmp_path / "c.jsonl").touch()
    source = LocalSource([str(tmp_path)], "text", train_on="assistant")
    found = stored(source)
    assert found == stored(source) and [json.loads(one) for one in found if one] == [json.loads(talk)] * 3
    assert len(found) == 7
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'c.jsonl'}: is empty",
        f"{tmp_path / 'b.jsonl'}: lines that are not JSON in UTF-8 are passed over",
        f"{tmp_path / 'b.jsonl'}: rows without a conversation to learn from are passed over",
    ]


def test_a_damaged_or_vanished_file_is_named_with_what_to_do(tmp_path):
    write_cosmopedia(tmp_path, files=1, rows=300)
    (file,) = tmp_path.glob("*.parquet")
    source = LocalSource([str(tmp_path)], "text")
    whole = file.read_bytes()
    file.write_bytes(whole[:40] + bytes(4000) + whole[4040:])
    with pytest.raises(LoadError, match=r"row group \d is damaged.*copy or download"):
        stored(source)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match="not a readable parquet file.*copy or download it again"):
        LocalSource([str(tmp_path)], "text")
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    text = LocalSource([str(tmp_path / "a.txt")], "text")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(LoadError, match="a.txt: cannot be read.*restore the file"):
        stored(text)
