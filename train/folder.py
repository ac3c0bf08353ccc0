"""The folder of a run: one process at a time trains into it, and what it holds besides checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from smollm2.errors import LoadError, UsageError
from smollm2.file_lock import lock
from smollm2.pretrained.files import write_files
from smollm2.pretrained.tokenizer import Tokenizer
from train.checkpoint import Progress
from train.config import RunConfig
from train.journal import BEGINNING, cut_back
from train.metrics import METRICS_FILE, SAMPLES_FILE, forget_after, read_metrics

CONFIG, LOCK, TOKENIZER = "config.yaml", ".lock", "tokenizer"
JOURNALS = METRICS_FILE, SAMPLES_FILE


def run_folder(config: RunConfig) -> Path:
    """output_dir, with ~ for the user's own folder. Raises UsageError where that has none."""
    try:
        return Path(config.output_dir).expanduser()
    except RuntimeError:
        wanted = "a folder, or HOME in the environment for ~"
        raise UsageError(f"output_dir: expected {wanted}, got {config.output_dir!r}") from None


def check_folder(folder: Path, resume: str) -> None:
    """Raises UsageError for a folder with something in it, unless the run that made it is to go on or ended
    before its first step.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir: {folder} is a file; name a folder")
    if not folder.is_dir() or _untrained(folder):
        return
    where = f"output_dir: {folder} is not empty"
    if resume == "none":
        remedy = "continue that run with resume=auto, or start another with output_dir=..."
        raise UsageError(f"{where}; {remedy}")
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{where} and not the folder of a run; name another with output_dir=...")


def _untrained(folder: Path) -> bool:
    """Whether all that lies in a folder is what a run writes before its first step: it is written anew."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith((LOCK, f".{CONFIG}."))}
    if not names:
        return True  # as of a run that was killed at its first file
    if CONFIG not in names or not names <= {CONFIG, TOKENIZER, *JOURNALS}:
        return False
    try:
        keys = {line.partition(":")[0] for line in (folder / CONFIG).read_text("utf-8").splitlines()}
        text, samples = ((folder / name).read_bytes() if name in names else b"" for name in JOURNALS)
        found = [line["step"] for line in read_metrics(folder)]
    except (OSError, ValueError):
        return False
    whole = len(found) == len(text.splitlines()) and (bool(found) or not samples)
    return keys >= {entry.name for entry in dataclasses.fields(RunConfig)} and whole and not any(found)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder of a run if need be, and keeps other processes from training into it. One in which
    nothing was written is removed again.

    Raises UsageError when another process trains there, and LoadError when nothing can be written there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise _unusable(folder, error) from None
    try:
        try:
            locked = lock(descriptor)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            remedy = "wait for that run or stop it, or name another folder with output_dir=..."
            raise UsageError(f"output_dir: {folder} is in use by {holder}; {remedy}") from None
        if not locked:
            print(f"warning: {folder}: this file system has no locks; start no second run there", flush=True)
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            os.fsync(descriptor)  # a full disk may show no earlier
        except OSError as error:
            raise _unusable(folder, error) from None
        yield
    finally:
        with contextlib.suppress(OSError):
            if made and os.listdir(folder) == [LOCK]:
                path.unlink()
                for parent in made:
                    parent.rmdir()
        os.close(descriptor)  # releases the lock, as the end of the process does


def _unusable(folder: Path, error: OSError) -> LoadError:
    return LoadError(
        f"output_dir: {folder} cannot be written ({error.strerror}); free some space, or name another folder "
        "with output_dir=..."
    )


def open_folder(folder: Path, config: RunConfig, tokenizer: Tokenizer, progress: Progress) -> None:
    """Writes what does not change, and takes back what was logged after the checkpoint that the run continues
    from. Raises LoadError.
    """
    for name in JOURNALS:  # appended to, and so never somebody's link to another file
        path = folder / name
        if os.path.islink(path) or (path.exists() and not path.is_file()):
            raise LoadError(f"{path}: expected a file of the run's own; move it elsewhere")
    write_files(folder, {CONFIG: lambda path: path.write_text(config.as_yaml(), encoding="utf-8")})
    tokenizer.save(folder / TOKENIZER)
    marks = dict.fromkeys(JOURNALS, BEGINNING)
    if progress.step:
        marks = {name: mark for name, mark in progress.files.items() if name in JOURNALS}
    damaged = {name: found for name, mark in marks.items() if (found := cut_back(folder / name, mark))}
    for name, damage in damaged.items():
        if (folder / name).is_file():
            shutil.copyfile(folder / name, folder / f"{name}.damaged")
            damage += f"; a copy is kept as {name}.damaged"
        print(f"warning: {damage}", flush=True)
    if METRICS_FILE in damaged or METRICS_FILE not in marks:  # so that its lines have to tell
        forget_after(folder, progress.step)
