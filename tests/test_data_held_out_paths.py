"""`validation_paths`: files held out whole, never trained on, whatever `paths` names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_cases import run_config

from smollm2.errors import UsageError
from train import run as train_run
from train.config import RunConfig
from train.data.batches import read_stored
from train.data.local import LocalSource
from train.distributed import World


@pytest.fixture
def tree(tmp_path):
    """Three packages of Python files, each of which names its package in every line."""
    for package in ("alpha", "beta", "gamma"):
        (tmp_path / "tree" / package).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "tree" / package / f"m{number}.py").write_text(
                f"{package} = {number}\n" * 40, encoding="utf-8"
            )
    return tmp_path / "tree"


def built(tmp_path: Path, tree: Path, **changes: object) -> train_run.Run:
    config: RunConfig = run_config(tmp_path, **{"paths": [str(tree)], "eval_every": 2, **changes})
    config.validate()
    return train_run.build(config, World(torch.device("cpu")))


def test_training_reads_what_is_left_and_evaluation_what_is_named(tmp_path, tree):
    run = built(tmp_path, tree, validation_paths=[str(tree / "beta"), str(tree / "gamma" / "m0.py")])
    trained = [document.text for document in read_stored(run.source, run.config.held_out_fraction)]
    assert len(trained) == 4 + 3
    assert not any("beta" in text or text.startswith("gamma = 0\n") for text in trained)
    held_out = run.tokenizer.decode(run.held_out[0].flatten().tolist())
    assert "beta" in held_out and "alpha" not in held_out


def test_the_fraction_takes_nothing_besides(tmp_path, tree):
    run = built(tmp_path, tree, validation_paths=[str(tree / "beta")], validation_fraction=0.5)
    assert len(list(read_stored(run.source, run.config.held_out_fraction))) == 8


def test_without_evaluation_the_files_stay_out_of_training(tmp_path, tree):
    config = run_config(tmp_path, paths=[str(tree)], validation_paths=[str(tree / "beta")], eval_every=0)
    run = train_run.build(config, World(torch.device("cpu")))
    assert len(run.held_out[0]) == 0 and run.source.num_shards == 1
    assert not any("beta" in document.text for document in read_stored(run.source, 0.0))


def test_all_that_lies_in_a_held_out_folder_is_left_out(tmp_path, tree):
    """A glob follows links and enters hidden folders where the walk through a folder does not."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.py").write_text("beta = 9\n" * 40, encoding="utf-8")
    (tree / "beta" / "link").symlink_to(tmp_path / "elsewhere")
    (tree / "beta" / ".hidden").mkdir()
    (tree / "beta" / ".hidden" / "m.py").write_text("beta = 8\n" * 40, encoding="utf-8")
    source = LocalSource([f"{tree}/**/*.py", f"{tree}/beta/.hidden/m.py"], "text", [str(tree / "beta")])
    assert source.files and not any("beta" in file.parts for file in source.files)


def test_a_resumed_run_wants_the_same_held_out_files(tree):
    def fingerprint() -> str:
        return LocalSource([str(tree)], "text", [str(tree / "beta")]).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    (tree / "beta" / "m0.py").write_text("beta = 100\n", encoding="utf-8")
    assert fingerprint() != before


def test_held_out_files_that_fill_no_row_are_an_error(tmp_path, tree):
    (tree / "beta" / "short.py").write_text("b", encoding="utf-8")
    with pytest.raises(
        UsageError, match="validation_paths: expected documents that fill a row of 40 tokens, got none"
    ):
        built(tmp_path, tree, validation_paths=[str(tree / "beta" / "short.py")])


def test_where_nothing_is_held_out_a_line_says_what_to_change(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("A note of some words.\n" * 2500, encoding="utf-8")
    keys = {"paths": [str(tmp_path / "notes.txt")], "eval_every": 2, "validation_fraction": 1e-6}
    config = run_config(tmp_path, **keys)
    assert not len(train_run.build(config, World(torch.device("cpu"))).held_out.ids)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held out")]
    assert "validation_fraction=1e-06 takes do not fill a row of 40 tokens" in line
    assert "raise it, or name files in validation_paths" in line


def test_what_cannot_be_is_refused(tmp_path, tree):
    with pytest.raises(UsageError, match=r"validation_paths: .*nowhere: expected a file, folder or glob"):
        built(tmp_path, tree, data="embedded", paths=[], validation_paths=[str(tree / "nowhere")])
    with pytest.raises(UsageError, match=r"validation_paths: .*nowhere: expected a file, folder or glob"):
        LocalSource([str(tree)], "text", [str(tree / "nowhere")])
    with pytest.raises(
        UsageError, match=r"validation_paths: expected to leave some of .*tree for training, left none"
    ):
        LocalSource([str(tree)], "text", [str(tree)])
