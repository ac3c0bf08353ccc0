"""What a resumed run asks of its data: the same held-out rows, and the same files, wherever they lie now."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from train_cases import checkpoint_folder, curve, run_config

from smollm2.errors import UsageError
from train import checkpoint
from train.build import Run, build, held_out_count
from train.checkpoint import Progress
from train.config import RunConfig
from train.data import files
from train.data.embedded import EmbeddedSource
from train.data.local import LocalSource
from train.data.mixture import MixtureSource
from train.data.open import open_source
from train.data.source import Part, Source
from train.data.state import DataState
from train.distributed import World
from train.resume import compare_data
from train.run import train


@pytest.fixture
def configured(tmp_path):
    return functools.partial(run_config, tmp_path, steps=2, eval_every=2, validation_fraction=0.3)


@pytest.fixture(autouse=True)
def few_embedded_documents(monkeypatch):
    texts = [f"{number} of {number * number} documents. " * 3 for number in range(40)]
    monkeypatch.setattr(EmbeddedSource, "documents", texts)


def built(config: RunConfig) -> Run:
    return build(config, World(torch.device("cpu")))


def record_of(config: RunConfig) -> dict:
    path = checkpoint_folder(config, config.steps) / checkpoint.RECORD
    return json.loads(path.read_text(encoding="utf-8"))


# ---- held-out rows -----------------------------------------------------------------------------------------


def test_another_batch_size_evaluates_the_same_rows(configured, capsys):
    config = configured(batch_size=4, eval_batches=3)
    train(config)
    before = built(configured("other", batch_size=4, eval_batches=3)).held_out.ids
    assert len(before) == 12 and record_of(config)["data"]["held_out_rows"] == 12
    for size, steps in ((1, 4), (3, 6)):  # the second one resumes what the first resumed
        again = configured(
            batch_size=size, grad_accumulation=12 // size, eval_batches=3, steps=steps, resume="auto"
        )
        assert torch.equal(built(again).held_out.ids, before)
        train(again)
        assert record_of(again)["data"]["held_out_rows"] == 12
    assert "held-out rows" not in capsys.readouterr().out


def test_another_eval_batches_is_obeyed_and_said(configured, capsys):
    train(configured(batch_size=4, eval_batches=3))
    assert len(built(configured(batch_size=2, eval_batches=4, resume="auto")).held_out.ids) == 8
    assert "held-out rows: 12 -> 8; held-out losses before and after" in capsys.readouterr().out


def test_a_checkpoint_without_the_number_had_eval_batches_of_its_batch_size():
    saved = {"eval_batches": 3, "batch_size": 4}
    old = Progress(
        DataState.from_json({"fingerprint": "x", "cursor": {}}, DataState("").unique.state()), saved, "", ""
    )
    assert held_out_count(RunConfig(eval_batches=3, batch_size=1), old) == 12
    assert held_out_count(RunConfig(eval_batches=3, batch_size=1), None) == 3


# ---- the same data -----------------------------------------------------------------------------------------


def other_words(path: Path) -> None:
    """Other digits, and neither the size nor the time of the file changes."""
    content, state = path.read_text(encoding="utf-8"), path.stat()
    path.write_text(re.sub(r"\d", "7", content), encoding="utf-8")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size


def test_a_file_of_the_same_size_with_other_words_is_refused(configured):
    config = configured()
    train(config)
    other_words(Path(config.paths[0]))
    with pytest.raises(UsageError, match="expected the data of the checkpoint .local 1 files .*restore the"):
        train(configured(steps=4, resume="auto"))


def test_files_that_moved_are_trained_on(configured, tmp_path, monkeypatch, capsys):
    straight, config = configured("straight", steps=4), configured()
    train(straight)
    train(config)
    (tmp_path / "elsewhere").mkdir()
    Path(config.paths[0]).rename(tmp_path / "elsewhere" / "numbers.jsonl")
    again = configured(steps=4, resume="auto", paths=["elsewhere/*.jsonl"])
    monkeypatch.chdir(tmp_path)
    train(again)
    assert curve(again) == curve(straight)
    assert f"paths: [{config.paths[0]}] -> [elsewhere/*.jsonl]" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["local", "embedded"])
def test_validation_paths_may_move_and_not_change(tmp_path, configured, data):
    keys = {"data": data, "paths": [str(tmp_path / "numbers.jsonl")] if data == "local" else [], "steps": 1}
    for name in ("a", "moved"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "held.txt").write_text("held out 1 2 3 " * 40, encoding="utf-8")
    train(configured(validation_paths=[str(tmp_path / "a")], **keys))
    moved = configured(validation_paths=[str(tmp_path / "moved" / "held.txt")], resume="auto", **keys)
    assert len(built(moved).held_out.ids)
    with pytest.raises(UsageError, match=r"made with validation_paths=\[.*a\] \(got \[\]\); repeat it"):
        built(configured(resume="auto", **keys))
    other_words(tmp_path / "moved" / "held.txt")
    with pytest.raises(UsageError, match="expected (those|the data) of the checkpoint .*restore the files"):
        built(moved)


def as_before(source: LocalSource) -> str:
    """The fingerprint of version 0.2.0."""
    lines = ["blocks 2", *(f"{file.name} {file.stat().st_size}" for file in source.files)]
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
    return f"local {len(source.files)} files {digest}"


def compared(fingerprint: str, source: Source, **before: object) -> DataState:
    data = DataState(fingerprint)
    compare_data(data, before, RunConfig(data="embedded"), source, "")
    return data


def test_older_fingerprints_are_accepted_where_the_documents_are_the_same(tmp_path, configured):
    source = open_source(configured())
    (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
    text = LocalSource([str(tmp_path / "a.txt")], "text")
    assert compared(as_before(source), source).fingerprint == source.fingerprint
    with pytest.raises(UsageError, match="resume: .txt files are cut into documents otherwise since this"):
        compared(as_before(text), text)
    parts = [Part("n", Fraction(3), source), Part("m", Fraction(1), configured_embedded())]
    mixture = MixtureSource(parts)
    older = mixture.fingerprint.replace(source.fingerprint, as_before(source))
    assert older != mixture.fingerprint and compared(older, mixture).fingerprint == mixture.fingerprint
    mixed = MixtureSource([*parts, Part("t", Fraction(1), text)])
    older = mixed.fingerprint.replace(source.fingerprint, as_before(source))
    with pytest.raises(UsageError, match="resume: .txt files are cut"):
        compared(older.replace(text.fingerprint, as_before(text)), mixed)


def configured_embedded() -> Source:
    return open_source(RunConfig(data="embedded"))


def test_which_files_are_left_out_is_part_of_the_fingerprint(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("text", encoding="utf-8")
    left = [[], *([str(tmp_path / f"{name}.txt")] for name in "abc")]
    assert len({LocalSource([str(tmp_path)], "text", one).fingerprint for one in left}) == 4


def test_a_fingerprint_reads_the_ends_of_a_file_and_little_of_many(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "EDGE", 8)
    monkeypatch.setattr(files, "LEAST_EDGE", 2)
    path = tmp_path / "a.txt"

    def line(content: bytes, count: int = 1) -> str:
        path.write_bytes(content)
        return next(files.fingerprints([(path, path.stat())] * count))

    whole = line(b"abcdefghijklmnopqrstuvwxyz")
    changed = [line(b"abcdefgHijklmnopqrstuvwxyz"), line(b"abcdefghijklmnopqrSTuvwxyz")]
    assert whole not in changed and whole == line(b"abcdefghiJKLMNOPQrstuvwxyz")
    assert line(b"abcdefghij") != line(b"abcdefghiJ") != line(b"abcdefghi")
    monkeypatch.setattr(files, "ALL_EDGES", 60)
    assert line(b"abcdefghijklmnopqrstuvwxyz", 10) == line(b"abcDEFGHIJKLMNOPQRSTUVWxyz", 10)
    assert line(b"abcdefghijklmnopqrstuvwxyz", 10) != line(b"abCdefghijklmnopqrstuvwxyz", 10)
