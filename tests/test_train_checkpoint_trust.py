"""A checkpoint that somebody has tampered with, its manifest included: nothing in it runs code, and nothing
outside of it is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from train_cases import checkpoint_folder, run_config

from smollm2.cli import run_command
from smollm2.errors import LoadError
from train.checkpoint import SHARDS, STATE, load_progress, main, newest_checkpoint, read_moments, verify
from train.manifest import MANIFEST, as_json, file_entries, manifest
from train.run import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(run_config(folder, steps=1))
    return checkpoint_folder(run_config(folder), 1)


@pytest.fixture
def checkpoint(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run" / "checkpoints" / "step-000001")
    return tmp_path / "run" / "checkpoints" / "step-000001"


def seal(folder: Path, **more: Any) -> None:
    """Writes the manifest that a forger would: it fits the files that are there."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    (folder / MANIFEST).write_text(manifest({**file_entries(folder, files), **more}), encoding="utf-8")


class Shell:
    """Unpickled, it makes a folder named `trap` in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trap",)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda folder: (folder / "notes.txt").write_text("mine"), "notes.txt: not in manifest.json"),
        (lambda folder: (folder / SHARDS).mkdir(), "shards/: not in manifest.json"),
        (lambda folder: (folder / "a" / "b").mkdir(parents=True), "a/b/: not in manifest.json"),
        (lambda folder: (folder / "more.json").symlink_to(folder / "run.json"), "found a link"),
        (lambda folder: (folder / SHARDS).symlink_to(folder), "found a link"),
        (lambda folder: os.mkfifo(folder / "pipe"), "found a pipe"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "not a readable checkpoint"),
        (lambda folder: (folder / MANIFEST).write_text(" " * (1 << 24) + "{}"), "at most 16,777,216 bytes"),
        (lambda folder: seal(folder, **{"../outside": {"bytes": 1, "sha256": ""}}), "outside: expected in a"),
        (lambda folder: seal(folder, **{"/etc/passwd": {"bytes": 1, "sha256": ""}}), "passwd: expected in a"),
        (
            lambda folder: seal(folder, **{"./run.json": {"bytes": 1, "sha256": ""}}),
            "run.json: expected in a",
        ),
    ],
    ids="file empty-folder nested link link-to-folder pipe deep large outside absolute alias".split(),
)
def test_what_no_save_wrote_is_refused(checkpoint, plant, message, capsys):
    (checkpoint.parent / "outside").write_text("x")
    plant(checkpoint)
    with pytest.raises(LoadError, match=message):
        verify(checkpoint)
    assert run_command(main, ["verify", str(checkpoint)]) == 1
    assert capsys.readouterr().out.startswith("damaged  ")


def test_a_listed_link_is_refused(checkpoint, tmp_path):
    target = tmp_path / "elsewhere.json"
    (checkpoint / "run.json").rename(target)
    (checkpoint / "run.json").symlink_to(target)
    with pytest.raises(LoadError, match="run.json: expected a file, found a link"):
        verify(checkpoint)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: torch.save({"unique": Shell()}, folder / STATE),
        lambda folder: (folder / STATE).write_bytes(pickle.dumps(Shell())),
        lambda folder: (folder / "run.json").write_text("[1]"),
        lambda folder: (folder / "run.json").write_text('{"data": 3}'),
        lambda folder: (folder / "run.json").write_text(
            as_json({**json.loads((folder / "run.json").read_text()), "more": 1})
        ),
    ],
    ids=["state", "bare-pickle", "list", "no-data", "unknown-entry"],
)
def test_a_forged_record_or_state_is_one_error_and_runs_nothing(checkpoint, spoil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil(checkpoint)
    seal(checkpoint)
    assert verify(checkpoint) > 0
    with pytest.raises(LoadError, match=r"run\.json"):
        load_progress(checkpoint)
    assert not Path("trap").exists()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight/exp_avg", [1]),
        ("model.norm.weight/exp_avg_sq", []),
        ("model.norm.weight/step", [3]),
        ("another/exp_avg", [3]),
    ],
)
def test_moments_that_do_not_fit_are_refused(checkpoint, name, shape):
    moments = load_file(checkpoint / "optimizer.safetensors")
    save_file({**moments, name: torch.zeros(shape)}, checkpoint / "optimizer.safetensors")
    seal(checkpoint)
    config = run_config(checkpoint.parents[2], resume="auto")
    (checkpoint.parents[1] / "config.yaml").touch()
    config.paths = json.loads((checkpoint / "run.json").read_text())["config"]["paths"]
    with pytest.raises(LoadError, match=f"optimizer state '{name}': .*, got {re.escape(str(shape))}"):
        train(config)


TENSORS = {"a/exp_avg": torch.arange(6.0).view(2, 3), "a/step": torch.tensor(7.0)}


@pytest.fixture
def shards(checkpoint):
    """The same checkpoint with its moments in shards."""
    (checkpoint / "optimizer.safetensors").unlink()
    dcp.save(dict(TENSORS), storage_writer=dcp.FileSystemWriter(checkpoint / SHARDS), no_dist=True)
    seal(checkpoint)
    return checkpoint / SHARDS


def test_shards_are_read_without_torchs_unpickler(shards, monkeypatch):
    assert verify(shards.parent) > 0
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("pickle.load was called"))
    found = read_moments(shards.parent)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def set_all(metadata: Any, **values: Any) -> None:
    for part in metadata.storage_data.values():
        vars(part).update(values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda metadata: setattr(metadata, "planner_data", Shell()), r"names (posix|nt)\.mkdir"),
        (lambda metadata: setattr(metadata, "planner_data", [print]), r"names builtins\.print"),
        (lambda metadata: setattr(metadata, "planner_data", torch.load), r"names torch\.serialization\.load"),
        (lambda metadata: metadata.state_dict_metadata.update(x=BytesStorageMetadata()), "BytesStorage"),
        (lambda metadata: metadata.state_dict_metadata.update(x=[]), "expected tensors alone, got list"),
        (
            lambda metadata: set_all(metadata, relative_path="../run.json"),
            "expected plain files of its folder",
        ),
        (
            lambda metadata: set_all(metadata, relative_path="/etc/passwd"),
            "expected plain files of its folder",
        ),
        (lambda metadata: set_all(metadata, transform_descriptors=["zstd"]), "expected plain files"),
        (
            lambda metadata: setattr(
                metadata.state_dict_metadata["a/exp_avg"], "size", torch.Size([1 << 20, 1 << 20])
            ),
            "its tensors need 4,398,046,511,108 bytes",
        ),
        (
            lambda metadata: metadata.state_dict_metadata.update(
                x=dataclasses.replace(
                    metadata.state_dict_metadata["a/exp_avg"], size=torch.Size([-(1 << 40)])
                )
            ),
            "expected sizes, got",
        ),
    ],
    ids="call function torch bytes other outside absolute transform huge negative".split(),
)
def test_forged_metadata_of_shards_is_refused_and_runs_nothing(shards, spoil, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    spoil(metadata)
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(shards.parent)
    for read in (read_moments, verify):
        with pytest.raises(LoadError, match=f"not what a sharded save writes.*{message}"):
            read(shards.parent)
    assert not Path("trap").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"cos\nsystem\n(S'mkdir trap'\ntR."])
def test_metadata_that_is_no_metadata(shards, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (shards / ".metadata").write_bytes(content)
    seal(shards.parent)
    with pytest.raises(LoadError, match=r"\.metadata: not what a sharded save writes"):
        verify(shards.parent)
    assert not Path("trap").exists()


def test_a_whole_checkpoint_with_a_stray_file_is_not_passed_over_for_an_earlier_one(checkpoint):
    newer = checkpoint.with_name("step-000002")
    shutil.copytree(checkpoint, newer)
    (newer / ".DS_Store").write_bytes(b"mine")
    said: list[str] = []
    with pytest.raises(LoadError, match=r"step-000002/\.DS_Store: not in manifest.json.*move it elsewhere"):
        newest_checkpoint(checkpoint.parent.parent, said.append)
    (newer / "model.safetensors").write_bytes(b"damaged")
    assert newest_checkpoint(checkpoint.parent.parent, said.append) == checkpoint
    assert len(said) == 1 and "model.safetensors" in said[0]
