"""What takes long is done once, into a folder of the cache: converting, quantising, compiling."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from smollm2.errors import LoadError
from smollm2.pretrained.files import WEIGHTS, json_writer, read_json, write_files

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # of an entry: the size of each of its files
CACHE_VERSION = 3  # of the content of all entries


def cache_folder() -> Path:
    """$SMOLLM2_CACHE, else $XDG_CACHE_HOME/smollm2, else ~/.cache/smollm2."""
    if os.environ.get("SMOLLM2_CACHE"):
        return Path(os.environ["SMOLLM2_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smollm2"


def cached(sources: Sequence[Path], name: str, prepare: Callable[[], Callable[[Path], None]]) -> Path | None:
    """The folder of the cache that holds what `name` makes of the source files, made now if it is not there.

    prepare() does the work and returns the function that writes the result into a new folder. The folder's
    name holds the path of the first source and the identity of all (size, time of the last change, inode,
    CACHE_VERSION): when a source changes, the entry is made anew and the old one is removed. An entry that
    misses a file, or has one of another size, is replaced. Processes that start together each do the work,
    and all use the folder of the first to finish. Returns None if the cache cannot be written.
    """
    line = f"{name}-{_digest(sources[0].resolve())}"
    status = [(path.name, path.stat()) for path in sources]
    states = [(file, now.st_size, now.st_mtime_ns, now.st_ino) for file, now in status]
    target = cache_folder() / f"{line}-{_digest(CACHE_VERSION, states)}"
    if _complete(target):
        return target
    write = prepare()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in target.parent.glob(".making-*"):  # by a process that was killed
            with contextlib.suppress(FileNotFoundError):  # a living one may just have finished
                if time.time() - abandoned.stat().st_mtime > 3600:
                    shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as temporary:
            folder = Path(temporary) / "entry"
            write(folder)
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            write_files(folder, {MANIFEST: json_writer(sizes)})
            if target.exists() and not _complete(target):
                logger.warning("%s is damaged: made anew", target)
                target.rename(Path(temporary) / "damaged")
            try:
                folder.rename(target)
            except OSError:
                if not _complete(target):  # else another process was faster: its folder is as good
                    raise
    except (OSError, LoadError) as error:
        hint = "the work is done at every start; SMOLLM2_CACHE names another folder"
        logger.warning("the cache cannot be written (%s): %s", error, hint)
        return None
    for earlier in target.parent.glob(f"{glob.escape(line)}-*"):
        if earlier != target:
            for derived in [earlier, *target.parent.glob(f"*-{_digest((earlier / WEIGHTS).resolve())}-*")]:
                shutil.rmtree(derived, ignore_errors=True)
    return target


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _complete(entry: Path) -> bool:
    """Whether an entry has all the files that were written into it, whole."""
    try:
        sizes = read_json(entry / MANIFEST)
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, LoadError):
        return False
