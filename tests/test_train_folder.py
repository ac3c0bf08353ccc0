"""Which folders a new run may take: none with anything in it but what a run writes before its first step."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_cases import curve, run_config

from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.tokenizer import train_tokenizer
from train.folder import check_folder
from train.run import train


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="cannot be written .Not a directory"):
        train(run_config(tmp_path, "file/run"))


def test_a_run_that_was_killed_at_its_first_file_can_be_started_again(tmp_path):
    config = run_config(tmp_path, steps=1)
    (tmp_path / "run").mkdir()
    for name in (".lock", ".config.yaml.7.tmp"):
        (tmp_path / "run" / name).touch()
    assert train(config) == 0


def test_a_run_that_failed_before_its_first_step_can_be_started_again(tmp_path):
    config = run_config(tmp_path, text_column="txt", tokenizer=str(tmp_path / "tokenizer"))
    train_tokenizer(["1 and 2 and 3"], 300).save(tmp_path / "tokenizer")
    with pytest.raises(LoadError, match="expected documents to train on, found none"):
        train(config)
    assert (tmp_path / "run" / "config.yaml").is_file()
    config.text_column = "text"
    assert train(config) == 0
    assert [step for step, _, _ in curve(config)] == [1, 2, 3, 4, 5, 6]
    assert 'text_column: "text"' in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", ""),
        ("checkpoints/step-000004/run.json", "{}"),
        ("metrics.jsonl", '{"step": 1, "loss": 3.0}\n'),
        ("metrics.jsonl", "mine\n"),
        ("samples.txt", "mine\n"),
        ("config.yaml", "model: tiny\n"),
    ],
)
def test_a_folder_with_anything_else_is_refused_and_left_alone(tmp_path, name, content):
    config, folder = run_config(tmp_path), tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.as_yaml())
    (folder / "metrics.jsonl").write_text("")
    check_folder(folder, "none")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)
    before = contents(folder)
    with pytest.raises(UsageError, match="is not empty; continue that run with resume=auto"):
        check_folder(folder, "none")
    assert contents(folder) == before


def test_what_the_weights_brought_is_no_training(tmp_path):
    config, folder = run_config(tmp_path), tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.as_yaml())
    (folder / "metrics.jsonl").write_text('{"step": 0, "held_out_loss": 5.0}\n')
    (folder / "samples.txt").write_text("step 0\n")
    check_folder(folder, "none")
