"""What checkpoints survive: damage anywhere, full disks, kills in the middle of a save; and which of them are
kept.
"""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import DEADLINE, arguments, checkpoint_folder, curve, run_config
from transformers import AutoModelForCausalLM

from smollm2.cli import run_command
from smollm2.errors import LoadError
from smollm2.pretrained.load import load_model
from train import checkpoint
from train.checkpoint import MANIFEST, SaveError, main, newest_checkpoint, verify
from train.metrics import read_metrics
from train.run import train
from train.saver import Saver


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with a checkpoint after each; tests copy it."""
    folder = tmp_path_factory.mktemp("trained")
    train(run_config(folder, steps=2, checkpoint_every=1))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "numbers.jsonl").symlink_to(trained / "numbers.jsonl")  # a resumed run wants the same paths
    return tmp_path


def damage(path: Path, position: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.safetensors",
        "training_state.pt",
        "run.json",
        "tokenizer.json",
        "manifest.json",
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_line(folder, name, capsys):
    config = run_config(folder, steps=3, resume="auto")
    damage(checkpoint_folder(config, 2) / name)
    with pytest.raises(LoadError, match="step-000002"):
        train(run_config(folder, steps=3, resume=str(checkpoint_folder(config, 2))))
    train(config)
    out = capsys.readouterr().out
    assert "skipped a damaged checkpoint: " in out and name in out.split("skipped", 1)[1].splitlines()[0]
    assert "resumed at step 1" in out
    assert [step for step, _, _ in curve(config)] == [1, 2, 3]
    verify(checkpoint_folder(config, 3))


def test_every_flipped_byte_and_every_truncation_is_found(folder):
    generator = random.Random(2024)
    files = sorted(path for path in checkpoint_folder(run_config(folder), 2).iterdir())
    # Every file in turn, the manifest's own bytes several times over: damage there must not hide behind equal
    # JSON.
    chosen = [*files, *[path for path in files if path.name == MANIFEST] * 12]
    chosen += [generator.choice(files) for _ in range(50 - len(chosen))]
    for path in chosen:
        intact = path.read_bytes()
        position = generator.randrange(len(intact))
        flipped = bytearray(intact)
        flipped[position] ^= generator.randrange(1, 256)
        for content in (bytes(flipped), intact[:position]):
            path.write_bytes(content)
            with pytest.raises(LoadError):
                verify(path.parent)
        path.write_bytes(intact)
    assert verify(files[0].parent) > 1_000_000


def test_a_manifest_that_says_the_same_in_other_bytes_is_damage(folder):
    path = checkpoint_folder(run_config(folder), 2) / MANIFEST
    path.write_text(path.read_text(encoding="utf-8").replace(": ", ":\t", 1), encoding="utf-8")
    with pytest.raises(LoadError, match="its sha256 is not that of its content"):
        verify(path.parent)


def test_another_schema_is_named(folder):
    path = checkpoint_folder(run_config(folder), 2) / MANIFEST
    path.write_text('{"schema": 1}', encoding="utf-8")
    with pytest.raises(LoadError, match="expected schema 2, got 1: written by another version"):
        verify(path.parent)


def test_a_missing_file_is_named(folder):
    config = run_config(folder)
    for step in (1, 2):
        (checkpoint_folder(config, step) / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="model.safetensors: expected in a checkpoint, found nothing"):
        verify(checkpoint_folder(config, 2))
    with pytest.raises(LoadError, match="all 2 are damaged"):
        newest_checkpoint(Path(config.output_dir), print)


@pytest.mark.parametrize("content", [b"", b"step-000099\n", b"\xff\xfe nonsense", b"step-000001\n"])
def test_a_wrong_pointer_costs_nothing(folder, content):
    run = Path(run_config(folder).output_dir)
    (run / "checkpoints" / "latest").write_bytes(content)
    # it may point back: a run that went back to an earlier step
    expected = 1 if content == b"step-000001\n" else 2
    assert newest_checkpoint(run, print) == checkpoint_folder(run_config(folder), expected)


def test_the_command_checks_a_checkpoint_or_a_whole_run(folder, capsys):
    config = run_config(folder)
    assert run_command(main, ["verify", config.output_dir]) == 0
    assert capsys.readouterr().out.count("sound") == 2
    damage(checkpoint_folder(config, 1) / "run.json")
    assert run_command(main, ["verify", config.output_dir]) == 1
    out = capsys.readouterr().out
    assert (
        out.count("sound") == 1
        and "damaged" in out
        and "run.json: its sha256 is not that of the manifest" in out
    )
    assert run_command(main, ["verify", str(checkpoint_folder(config, 2))]) == 0
    assert run_command(main, ["verify", str(folder / "nowhere")]) == 2
    assert run_command(main, ["repair", config.output_dir]) == 2


def test_a_checkpoint_is_a_model_folder_for_us_and_for_transformers(folder, generator):
    path = checkpoint_folder(run_config(folder), 2)
    ids = torch.randint(0, 300, (1, 12), generator=generator)
    with torch.no_grad():
        ours = load_model(path, dtype="fp32")(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(path)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


# ---- full disks --------------------------------------------------------------------------------------------


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name"), [(torch, "save"), (checkpoint, "save_file"), (checkpoint, "write_weights")]
)
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_does_not_end_the_training_and_leaves_the_checkpoint_before(
    folder, module, name, background, monkeypatch, capsys
):
    config = run_config(folder, steps=5, resume="auto", checkpoint_every=1, background_save=background)
    original, calls = getattr(module, name), []

    def full_for_a_while(*arguments: Any, **keys: Any) -> Any:
        calls.append(1)
        return no_space() if len(calls) <= 2 else original(*arguments, **keys)

    monkeypatch.setattr(module, name, full_for_a_while)
    assert train(config) == 0
    out = capsys.readouterr().out
    assert (
        "cannot be saved ([Errno 28] No space left on device); free some space, then continue from "
        "step-000002" in out
    )
    assert "training goes on" in out
    assert [step for step, _, _ in curve(config)] == [1, 2, 3, 4, 5]
    assert any("failed_save" in line for line in read_metrics(Path(config.output_dir)))
    names = sorted(path.name for path in (Path(config.output_dir) / "checkpoints").iterdir())
    assert names == ["latest", "step-000001", "step-000002", "step-000005"]
    assert newest_checkpoint(Path(config.output_dir), print) == checkpoint_folder(config, 5)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(folder, monkeypatch):
    config = run_config(folder, steps=4, resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_space)
        with pytest.raises(
            SaveError,
            match="No space left on device.*free some space, then continue from step-000002 with resume=auto",
        ):
            train(config)
    names = sorted(path.name for path in (Path(config.output_dir) / "checkpoints").iterdir())
    assert names == ["latest", "step-000001", "step-000002"]
    train(config)
    assert [step for step, _, _ in curve(config)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_file_size_limit_of_the_system_is_a_full_disk(folder, project_root):
    keys = arguments(run_config(folder, steps=5, resume="auto", checkpoint_every=2, background_save=False))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); "
        "from smollm2.cli import run_command; from train.run import main; sys.exit(run_command(main, "
        "sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *keys],
        cwd=project_root,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 1, done.stderr
    assert "training goes on" in done.stdout and "step 5/5" in done.stdout
    assert "cannot be saved" in done.stderr and "File too large" in done.stderr
    assert newest_checkpoint(Path(run_config(folder).output_dir), print) == checkpoint_folder(
        run_config(folder), 2
    )


# ---- which are kept, and saving in the background ----------------------------------------------------------


def test_milestones_are_kept_beside_the_newest(tmp_path):
    config = run_config(tmp_path, steps=7, checkpoint_every=1, keep_checkpoints=2, keep_every=3)
    train(config)
    names = sorted(path.name for path in (Path(config.output_dir) / "checkpoints").iterdir())
    assert names == ["latest", "step-000003", "step-000006", "step-000007"]


@pytest.mark.parametrize("background", [True, False])
def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(folder, monkeypatch, capsys, background):
    config = run_config(
        folder, steps=4, resume="auto", checkpoint_every=1, keep_checkpoints=1, background_save=background
    )
    original = Path.rename

    def rename(self: Path, target: Any) -> Path:
        if Path(target).name.startswith(".tmp-old-"):
            raise PermissionError(errno.EPERM, "Operation not permitted", str(self))
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        assert train(config) == 0
    out, err = capsys.readouterr()
    assert "checkpoints: what is old cannot be removed ([Errno 1] Operation not permitted" in out
    assert "Traceback" not in err and verify(checkpoint_folder(config, 4)) > 0
    config.steps = 5
    assert train(config) == 0
    names = sorted(path.name for path in (Path(config.output_dir) / "checkpoints").iterdir())
    assert names == ["latest", "step-000005"]


def test_what_a_killed_save_left_behind_is_removed(folder):
    config = run_config(folder, steps=3, resume="auto")
    leftover = checkpoint_folder(config, 1).with_name(".tmp-step-000002-1")
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    train(config)
    assert not leftover.exists()


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, monkeypatch):
    """The write of step 1 is held back until step 3 is logged; it contains step 1 all the same."""
    held, plain = (
        run_config(tmp_path, "held", steps=3, checkpoint_every=2),
        run_config(tmp_path, "plain", steps=2),
    )
    train(plain)
    original, released = checkpoint.write_weights, threading.Event()

    def held_back(*values: Any) -> None:
        if threading.current_thread().name == "checkpoint" and not released.is_set():
            assert released.wait(DEADLINE)
        original(*values)

    original_wait = Saver.wait

    def wait(self: Saver) -> None:
        if len(curve(held)) == 3:  # the last save: the third step is done while the first write still waits
            released.set()
        original_wait(self)

    monkeypatch.setattr(checkpoint, "write_weights", held_back)
    monkeypatch.setattr(Saver, "wait", wait)
    train(held)
    assert released.is_set()
    one, other = (load_model(checkpoint_folder(config, 2)).state_dict() for config in (held, plain))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
