"""What a run promises about its folder, its logs, its output and its configuration, whatever happens."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import arguments, checkpoint_folder, curve, run_config, torchrun, wait_for, wait_for_steps

from smollm2.cli import run_command
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.load import load_tokenizer
from train import build, folder, plot, run
from train.checkpoint import Progress, newest_checkpoint, verify
from train.command_line import parse
from train.config import RunConfig
from train.distributed import StopRequest
from train.folder import claimed, open_folder
from train.journal import BEGINNING, Journal, cut_back
from train.metrics import read_metrics
from train.resume import compare_for_resume
from train.run import main, train

EVENTS = dict(eval_every=2, sample_every=2, sample_tokens=3, checkpoint_every=4)
TIMED = ("tokens_per_second", "mfu", "wait_ms", "memory_gb", "memory_peak_gb", "eta_seconds")


def lines(config: RunConfig) -> list[dict[str, Any]]:
    """metrics.jsonl without what tells the time, and without the notes of resumes."""
    kept = (
        {k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(Path(config.output_dir))
    )
    return [line for line in kept if "resumed" not in line]


def samples(config: RunConfig) -> str:
    return (Path(config.output_dir) / "samples.txt").read_text(encoding="utf-8")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of six steps, and its folder, which has the corpus of the others too."""
    where = tmp_path_factory.mktemp("unbroken")
    config = run_config(where, **EVENTS)
    train(config)
    return config


# ---- the logs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name
)
@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_signal_at_an_evaluation_loses_nothing(unbroken, tmp_path, monkeypatch, number, step):
    config = RunConfig(**{**vars(unbroken), "output_dir": str(tmp_path / "run")})
    original = StopRequest.agree

    def agree(self: StopRequest) -> int:
        agree.calls += 1  # type: ignore[attr-defined]
        if agree.calls == step:  # type: ignore[attr-defined]
            os.kill(os.getpid(), number)
        return original(self)

    agree.calls = 0  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agree", agree)
        assert train(config) == 128 + number
    assert curve(config)[-1][0] == step
    config.resume = "auto"
    assert train(config) == 0
    assert lines(config) == lines(unbroken) and samples(config) == samples(unbroken)
    assert train(config) == 0 and samples(config) == samples(unbroken)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["before the first checkpoint", "after it"])
def test_what_was_logged_after_the_checkpoint_is_not_there_twice(unbroken, tmp_path, monkeypatch, where):
    last = 3 if where.startswith("before") else 6
    config = RunConfig(**{**vars(unbroken), "output_dir": str(tmp_path / "run"), "background_save": False})
    original = run.sample

    def sample(*given: Any) -> list[str]:
        if len(curve(config)) >= last - 1:
            raise Killed
        return original(*given)

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(run, "sample", sample)
            train(config)
        config.resume = "auto"
    train(config)
    assert lines(config) == lines(unbroken) and samples(config) == samples(unbroken)


def test_a_damaged_log_is_named_and_kept(unbroken, tmp_path, capsys):
    config = RunConfig(**{**vars(unbroken), "output_dir": str(tmp_path / "run"), "steps": 4})
    train(config)
    log = Path(config.output_dir) / "metrics.jsonl"
    damaged = log.read_text(encoding="utf-8").replace('"loss"', '"lost"', 1)
    log.write_text(damaged, encoding="utf-8")
    (Path(config.output_dir) / "samples.txt").write_text("", encoding="utf-8")
    config.steps, config.resume = 6, "auto"
    capsys.readouterr()
    train(config)
    out = capsys.readouterr().out
    assert "metrics.jsonl: its first" in out and "a copy is kept as metrics.jsonl.damaged" in out
    assert "samples.txt: expected the" in out
    assert log.with_name("metrics.jsonl.damaged").read_text(encoding="utf-8") == damaged


def test_a_journal_is_cut_back_to_its_mark_and_to_a_whole_line(tmp_path):
    path = tmp_path / "log"
    journal = Journal(path)
    journal.write("one\n")
    mark = journal.mark()
    journal.write("two\n")
    journal.close()
    assert Journal(path).mark()["bytes"] == 8
    assert cut_back(path, mark) is None and path.read_text() == "one\n"
    journal = Journal(path)
    journal.write("torn")
    assert cut_back(path, journal.mark()) is None and path.read_text() == "one\n"
    path.write_text("One\n")
    assert "its first 4 bytes" in (cut_back(path, mark) or "") and path.read_text() == "One\n"
    path.unlink()
    assert "found 0" in (cut_back(path, mark) or "")


# ---- the folder --------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused_and_touches_nothing(
    unbroken, tmp_path, capsys, monkeypatch
):
    config = RunConfig(**{**vars(unbroken), "output_dir": str(tmp_path / "run"), "steps": 1})
    train(config)
    (tmp_path / "run" / "checkpoints" / ".tmp-step-000002-1").mkdir()
    (tmp_path / "run" / "checkpoints" / ".tmp-step-000002-1" / "half").write_bytes(b"half")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.setattr(build, "open_source", lambda *_: pytest.fail("the data were opened"))
    with claimed(tmp_path / "run"):
        before = contents(tmp_path / "run")
        for name in ("run", "link"):
            keys = arguments(
                RunConfig(**{**vars(config), "output_dir": str(tmp_path / name), "resume": "auto"})
            )
            assert run_command(main, keys) == 2
            error = capsys.readouterr().err
            assert f"is in use by process {os.getpid()} on" in error and error.count("\n") == 1
        assert contents(tmp_path / "run") == before


def test_another_run_may_continue_from_a_folder_in_use(unbroken, tmp_path):
    other = RunConfig(
        **{**vars(unbroken), "output_dir": str(tmp_path / "run"), "resume": unbroken.output_dir, "steps": 7}
    )
    before = contents(Path(unbroken.output_dir))
    with claimed(Path(unbroken.output_dir)):
        before = contents(Path(unbroken.output_dir))
        assert train(other) == 0
        assert contents(Path(unbroken.output_dir)) == before
    assert [step for step, _, _ in curve(other)] == [7]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_folder_that_cannot_be_written_is_found_first(tmp_path, monkeypatch, code, call):
    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    config = run_config(tmp_path)
    monkeypatch.setattr(build, "open_source", lambda *_: pytest.fail("the data were opened"))
    monkeypatch.setattr(folder.os, call, fail)
    with pytest.raises(
        LoadError, match=f"output_dir: .*run cannot be written .{os.strerror(code)}.*output_dir="
    ):
        train(config)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt", ".lock"])
def test_no_link_in_the_folder_is_written_through(unbroken, tmp_path, name):
    shutil.copytree(unbroken.output_dir, tmp_path / "run")
    (tmp_path / "mine").write_text("mine\n")
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    config = RunConfig(
        **{**vars(unbroken), "output_dir": str(tmp_path / "run"), "resume": "auto", "steps": 7}
    )
    with pytest.raises(LoadError, match=re.escape(name) + "|cannot be written"):
        train(config)
    assert (tmp_path / "mine").read_text() == "mine\n"


def test_a_record_cuts_back_no_file_but_the_runs_own(unbroken, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine\n")
    marks = {"../mine": BEGINNING, str(tmp_path / "mine"): BEGINNING}
    progress = Progress(None, {}, "", "", step=1, files=marks)
    open_folder(tmp_path / "run", unbroken, load_tokenizer(Path(unbroken.output_dir) / "tokenizer"), progress)
    assert (tmp_path / "mine").read_text() == "mine\n"


def test_without_locks_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder, "lock", lambda _: False)
    train(run_config(tmp_path, steps=1))
    assert "this file system has no locks" in capsys.readouterr().out


# ---- output ------------------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """A stream that fails from a moment on."""

    def __init__(self, error: OSError, when: Callable[[], bool]) -> None:
        super().__init__()
        self._error, self._when = error, when

    def write(self, text: str) -> int:
        if self._when():
            raise self._error
        return super().write(text)


@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_fails_ends_no_run(tmp_path, monkeypatch, capsys, name, code):
    config = run_config(tmp_path)
    stream = Broken(OSError(code, os.strerror(code)), lambda: len(curve(config)) >= 2)
    monkeypatch.setattr(sys, name, stream)
    original = run._due

    def due(*given: Any) -> bool:
        print("a line", file=sys.stderr)
        return original(*given)

    monkeypatch.setattr(run, "_due", due)
    assert run_command(main, arguments(config)) == 0
    monkeypatch.undo()
    assert [step for step, _, _ in curve(config)] == [1, 2, 3, 4, 5, 6]
    assert verify(checkpoint_folder(config, 6)) > 0
    notes = [line for line in read_metrics(Path(config.output_dir)) if f"lost_{name}" in line]
    assert len(notes) == 1 and os.strerror(code) in notes[0][f"lost_{name}"]
    warned = capsys.readouterr().err.count(f"{os.strerror(code)}); training goes on")
    assert warned == (name == "stdout")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_dry_run_whose_text_is_lost_fails(tmp_path, monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert run_command(main, [*arguments(run_config(tmp_path)), "--dry-run"]) == 1
    assert "standard output: cannot be written" in capsys.readouterr().err


def test_a_terminal_without_a_character_shows_another(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    config = run_config(tmp_path, steps=2, sample_every=1, sample_prompts=["naïve \U0001f30a"])
    assert train(config) == 0
    sys.stdout.flush()
    assert b"na?ve ?" in raw.getvalue() and "naïve \U0001f30a" in samples(config)


# ---- samples and evaluations -------------------------------------------------------------------------------


def test_samples_that_fail_leave_the_run_to_its_guard(tmp_path, monkeypatch, capsys):
    def sample(*_: Any) -> list[str]:
        raise IndexError("index 40 is out of bounds")

    monkeypatch.setattr(run, "sample", sample)
    config = run_config(tmp_path, lr=1e30, warmup_steps=0, steps=50, max_skipped_steps=3, sample_every=1)
    with pytest.raises(FloatingPointError, match="3 steps in a row .* not finite.*lower lr"):
        train(config)
    assert newest_checkpoint(Path(config.output_dir), print) is not None
    assert "warning: no samples at step 1 (IndexError: index 40" in capsys.readouterr().out


def test_diverged_weights_end_with_the_guards_message(tmp_path):
    config = run_config(tmp_path, lr=1e30, warmup_steps=0, steps=50, max_skipped_steps=3, **EVENTS)
    with pytest.raises(FloatingPointError, match="3 steps in a row .* not finite.*lower lr"):
        train(config)
    assert newest_checkpoint(Path(config.output_dir), print) is not None


def test_an_evaluation_that_fails_leaves_a_checkpoint_and_is_done_again(unbroken, tmp_path, monkeypatch):
    def evaluate(*_: Any) -> float:
        raise torch.OutOfMemoryError("out of memory")

    config = RunConfig(**{**vars(unbroken), "output_dir": str(tmp_path / "run")})
    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", evaluate)
        with pytest.raises(torch.OutOfMemoryError):
            train(config)
    assert verify(checkpoint_folder(config, 2)) > 0
    config.resume = "auto"
    train(config)
    assert lines(config) == lines(unbroken) and samples(config) == samples(unbroken)


# ---- the configuration -------------------------------------------------------------------------------------


def test_what_an_interpolation_stands_for_is_used_and_never_shown(tmp_path, monkeypatch, capsys):
    config = run_config(tmp_path, steps=1)
    monkeypatch.setenv("CORPUS", config.paths[0])
    monkeypatch.setenv("SECRET", "hunter2")
    file = tmp_path / "run.yaml"
    file.write_text("paths: ['${oc.env:CORPUS}']\ntracker_project: x-${oc.env:SECRET}\n", encoding="utf-8")
    keys = [key for key in arguments(config) if not key.startswith("paths=")]
    assert parse([str(file), *keys])[0].tracker_project == "x-hunter2"
    assert run_command(main, [str(file), *keys, "--dry-run"]) == 0
    assert run_command(main, [str(file), *keys]) == 0
    out = capsys.readouterr()
    assert "x-${oc.env:SECRET}" in out.out and "hunter2" not in out.out + out.err
    assert not [name for name, content in contents(tmp_path / "run").items() if b"hunter2" in content]
    record = json.loads((checkpoint_folder(config, 1) / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["paths"] == ["${oc.env:CORPUS}"]
    # its own config.yaml continues it, also with another secret; an old record had the value
    monkeypatch.setenv("SECRET", "another")
    assert run_command(main, [str(tmp_path / "run" / "config.yaml"), "steps=2", "resume=auto"]) == 0
    again, _ = parse([str(file), *keys])
    assert compare_for_resume({**again.as_written(), "paths": config.paths}, again) == []


def test_numbers_and_choices_behind_an_interpolation_are_compared_at_a_resume(tmp_path, monkeypatch):
    keys = ["sequence_length: ${oc.env:LENGTH}", "optimizer: ${oc.env:OPTIMIZER}", "lr: ${oc.env:RATE}"]
    (tmp_path / "run.yaml").write_text("\n".join(keys), encoding="utf-8")

    def configuration(length: str, optimizer: str, rate: str) -> RunConfig:
        for name, value in (("LENGTH", length), ("OPTIMIZER", optimizer), ("RATE", rate)):
            monkeypatch.setenv(name, value)
        return parse([str(tmp_path / "run.yaml")])[0]

    saved = configuration("64", "adamw", "0.1").as_saved()
    assert compare_for_resume(saved, configuration("64", "adamw", "0.2")) == ["lr: 0.1 -> 0.2"]
    for changed in (("32", "adamw", "0.1"), ("64", "muon", "0.1")):
        with pytest.raises(UsageError, match="the checkpoint was made with"):
            compare_for_resume(saved, configuration(*changed))


def test_every_text_survives_the_configuration_file(tmp_path):
    texts = ["\U0001f30a naïve", "a\x7f\x85\u2028\ufeff\x00z", '\\ " \t \\ud83c', "%: # null"]
    (tmp_path / "config.yaml").write_text(RunConfig(sample_prompts=texts).as_yaml(), encoding="utf-8")
    assert parse([str(tmp_path / "config.yaml")])[0].sample_prompts == texts


@pytest.mark.parametrize("key", ["steps", "tensorboard", "optimizer", "lr", "paths"])
def test_a_secret_of_the_wrong_type_is_not_shown_either(tmp_path, monkeypatch, capsys, key):
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "run.yaml").write_text(f"{key}: ${{oc.env:SECRET}}\n", encoding="utf-8")
    assert run_command(main, [str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert "hunter2" not in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["7B", "135m", "360", "medium"])
def test_a_name_that_is_no_preset_lists_them(tmp_path, name):
    with pytest.raises(UsageError, match="model: expected a preset .135M, 360M, 1.7B, tiny.*got"):
        train(run_config(tmp_path, model=name, tokenizer="auto"))
    assert not (tmp_path / "run").exists()


def test_dropout_with_another_attention_is_refused_before_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "open_source", lambda *_: pytest.fail("the data were opened"))
    with pytest.raises(UsageError, match="attention_dropout: .*attention=torch"):
        train(run_config(tmp_path, backend="triton", attention_dropout=0.1))


def test_other_libraries_at_a_resume_are_said_in_a_line(unbroken, tmp_path, monkeypatch, capsys):
    config = RunConfig(
        **{**vars(unbroken), "output_dir": str(tmp_path / "run"), "resume": unbroken.output_dir}
    )
    monkeypatch.setattr(build, "library_versions", lambda: {"torch": "9.9", "python": "3.99"})
    train(RunConfig(**{**vars(config), "steps": 7}))
    out = capsys.readouterr().out
    assert (
        out.count("changed since the checkpoint: python") == 1
        and f"torch {torch.__version__.partition('+')[0]}" in out
    )


def test_wrong_usage_of_the_plot_is_one_line(capsys):
    assert run_command(plot.main, ["--nonsense"]) == 2
    assert run_command(plot.main, []) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_ranks_whose_launcher_was_killed_save_and_release_the_folder(tmp_path, project_root):
    config = run_config(tmp_path, steps=100_000)
    command = [*torchrun(2), "-m", "train.run", *arguments(config)]
    with subprocess.Popen(
        command, cwd=project_root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            wait_for_steps(config, 2, process)
            os.kill(process.pid, signal.SIGKILL)

            def released() -> bool:
                try:
                    with claimed(Path(config.output_dir)):
                        return True
                except UsageError:
                    return False

            wait_for(released)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    newest = newest_checkpoint(Path(config.output_dir), print)
    assert newest is not None and curve(config)[-1][0] == int(newest.name.removeprefix("step-"))
