"""Arrays in .json, tables in .csv, Markdown, and Alpaca's columns."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from train_cases import curve, run_config
from trl_cases import talk

from smollm2.errors import LoadError
from train import finetune
from train.data import local
from train.data.local import LocalSource
from train.data.open import open_source
from train.data.rows import as_conversation, needed_columns
from train.run import train


def stored(path: Path, train_on: str | None = None, column: str = "text") -> list[Any]:
    source = LocalSource([str(path)], column, train_on=train_on)
    return [text for shard in range(source.num_shards) for block in source.read(shard) for text in block]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


TEXTS = ["plain", 'with "quotes", and a comma', "two\nlines\n\nand more", "Лодка", " spaces "]


def as_csv(*rows: list[str]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_csv_is_its_text_column(tmp_path, mark):
    content = as_csv(["id", "text"], *([str(number), text] for number, text in enumerate(TEXTS)))
    path = written(tmp_path / "a.CSV", mark + content.encode())
    assert stored(path) == TEXTS
    assert stored(path, column="id") == [*"01234"]
    bad = written(tmp_path / "b.csv", b"text\ngood\n\n\xff bad\n")
    good, unusable = stored(bad)
    assert good == "good"
    with pytest.raises(UnicodeEncodeError):
        unusable.encode()  # which makes it unusable, and leaves the others alone


def test_an_array_of_objects_or_texts_is_a_corpus(tmp_path):
    rows = [{"text": text, "id": 1} for text in TEXTS]
    assert stored(written(tmp_path / "a.json", json.dumps(rows, indent=1))) == TEXTS
    assert stored(written(tmp_path / "b.json", json.dumps(TEXTS))) == TEXTS
    assert stored(written(tmp_path / "c.json", json.dumps([*rows, {"id": 2}]))) == [*TEXTS, None]
    assert stored(written(tmp_path / "d.json", "[]")) == []


def test_markdown_is_text(tmp_path):
    content = "\n\n".join(f"# Title {number}\n\n{'words and words. ' * 60}" for number in range(20))
    documents = stored(written(tmp_path / "notes.md", content))
    assert len(documents) > 5 and b"\n".join(documents).split() == content.encode().split()
    assert documents == stored(written(tmp_path / "notes.txt", content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "text,id\na,1\nb,2,3\n",
            r'a.csv: row 2: expected 2 fields \(text, id\), got 3; .*"quo',
        ),
        ("a.csv", 'text\na\n"b\nc\n', r"a.csv: row 2, which ends in line 4: cannot be read \(unexpected end"),
        ("a.csv", "body\na\n", r"a.csv: expected a column 'text', got body; set text_column"),
        ("a.json", '[{"text": "a"},\n3]', "a.json: row 2: expected an object, got a number"),
        ("a.json", '{"text": "a"}', "a.json: expected an array of objects, got an object; .* a .jsonl file"),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', r"a.json: not JSON in UTF-8 \(Extra data.*\.jsonl file"),
        ("a.json", '[{"text": "a"', r"a.json: not JSON in UTF-8 \(.*line 1 column"),
        ("a.json", b'["\xff"]', r"a.json: not JSON in UTF-8"),
        ("a.json", "[" * 100_000, r"a.json: not JSON in UTF-8"),
        ("a.json", '[{"body": "a"}]', "a.json: row 1: expected a column 'text', got body; set text_column"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_row(tmp_path, name, content, message):
    with pytest.raises(LoadError, match=message) as caught:
        stored(written(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_a_json_that_is_too_large_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "DOCUMENT_LIMIT", 30)
    path = written(tmp_path / "a.json", json.dumps(TEXTS))
    with pytest.raises(LoadError, match=r"a.json: expected at most 30 bytes of .json, got \d+; .* a .jsonl"):
        LocalSource([str(path)], "text")
    with pytest.raises(LoadError, match=r"b.csv: row 2, which ends in line 3: .*field larger than"):
        stored(written(tmp_path / "b.csv", "text\na\n" + "b" * 31 + "\n"))


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_rows_come_in_blocks_that_can_be_read_from_any_on(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(local, "ROW_BLOCK", 10)
    monkeypatch.setattr(local, "BLOCK_LIMIT", 200)
    texts = [f"{number}" * (1 + 40 * (number % 3 == 0)) for number in range(25)]
    content = json.dumps(texts) if suffix == ".json" else as_csv(["text"], *([text] for text in texts))
    source = LocalSource([str(written(tmp_path / f"a{suffix}", content))], "text")
    blocks = list(source.read(0))
    assert [text for block in blocks for text in block] == texts
    assert len(blocks) > 3 and max(map(len, blocks)) <= 10
    assert all(sum(map(len, block)) <= 200 for block in blocks)
    for first in range(len(blocks) + 1):
        assert list(source.read(0, first)) == blocks[first:]


def test_what_lies_beside_a_corpus_is_no_part_of_it(tmp_path, capsys):
    names = ("README.md", "metadata.json", "table.csv", "texts.jsonl")
    for name, count in ((name, number + 1) for number, name in enumerate(names)):
        written(tmp_path / name, "[]" if name.endswith("json") else "text\nx\n")
        found = [file.name for file in LocalSource([str(tmp_path)], "text").files]
        assert found == [["README.md"], ["metadata.json"], [*names[1:3]], ["texts.jsonl"]][count - 1]
    assert f"1 .md beside others ({tmp_path / 'README.md'})" in capsys.readouterr().out
    paths = [str(tmp_path / name) for name in names]
    assert len(LocalSource(paths, "text").files) == 4


def test_a_folder_of_conversations_is_chosen_by_what_can_hold_them(tmp_path):
    for name in ("LICENSE.txt", "train.py", "README.md"):
        written(tmp_path / name, "no conversation\n")
    written(tmp_path / "alpaca_data.json", json.dumps([ALPACA]))
    found = LocalSource([str(tmp_path)], "text", train_on="assistant").files
    assert [file.name for file in found] == ["alpaca_data.json"]


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = written(tmp_path / "a.csv", as_csv(["text", "n", "text"], ["a", "1", "b"]))
    with pytest.raises(LoadError, match="a.csv: expected columns with different names, got 'text' twice"):
        stored(path)


ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (ALPACA, "Add.\n\n1 and 2"),
        ({**ALPACA, "input": ""}, "Add."),
        ({**ALPACA, "input": None, "text": "Below is an instruction"}, "Add."),
        ({"instruction": "Add.", "output": "3", "prompt": None, "messages": None}, "Add."),
        ({**ALPACA, "instruction": " "}, "1 and 2"),
    ],
)
def test_alpaca_is_a_question_and_its_answer(row, question):
    completion = [{"role": "assistant", "content": "3"}]
    assert as_conversation(row) == as_conversation({"prompt": talk(question), "completion": completion})


@pytest.mark.parametrize("change", [{"output": ""}, {"output": None}, {"input": 3}, {"instruction": None}])
def test_alpaca_without_an_answer_or_question_is_unusable(change):
    assert as_conversation({**ALPACA, "input": "", **change}) is None


def test_alpaca_in_files_and_datasets(tmp_path):
    rows = [{**ALPACA, "output": f"That is {number}."} for number in range(5)]
    cells = [[*ALPACA], *([*row.values()] for row in rows)]
    expected = [as_conversation(row) for row in rows]
    assert all(expected)
    assert stored(written(tmp_path / "a.json", json.dumps(rows)), "all") == expected
    assert stored(written(tmp_path / "a.csv", as_csv(*cells)), "all") == expected
    (tmp_path / "hub").mkdir()
    written(tmp_path / "hub" / "train.csv", as_csv(*cells))
    config = run_config(tmp_path, data="hub", paths=[], dataset=str(tmp_path / "hub"), format="chat")
    assert next(open_source(config).parts[0].source.read(0)) == expected
    assert needed_columns("", ["output", "instruction", "id"], "text", True) == ["instruction", "output"]
    with pytest.raises(LoadError, match="got instruction, input, output; add format=chat"):
        stored(tmp_path / "a.csv")


def test_a_run_on_a_table_resumes(tmp_path):
    path = written(tmp_path / "a.csv", as_csv(["text"], *([f"{n} and {n * n}. " * 9] for n in range(60))))
    straight = run_config(tmp_path, "straight", paths=[str(path)])
    train(straight)
    for steps, resume in ((3, "none"), (6, "auto")):
        parts = run_config(tmp_path, paths=[str(path)], steps=steps, resume=resume)
        train(parts)
    assert curve(parts) == curve(straight)


def test_finetune_takes_them(tmp_path, monkeypatch):
    path = written(tmp_path / "alpaca.json", json.dumps([ALPACA] * 3))
    monkeypatch.setattr(finetune, "steps_of", lambda config, epochs, world: open_source(config).num_shards)
    config = finetune.configure([str(path)])
    assert config.paths == [str(path)] and config.steps == 1
