"""What takes long is done once, into a folder of the cache: converting, quantising, compiling.

Nothing in the cache is believed because of its name. Every entry has a manifest with size and CRC-32 of each
file, which is compared whenever the entry is used; what differs is made anew. A CRC finds accidents (a bad
disk, a copy cut short), not somebody who means to deceive: that is why compiled code, which could do harm,
is also asked whose it is (smollm2/pretrained/trust.py).
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from smollm2.errors import LoadError
from smollm2.file_lock import lock
from smollm2.pretrained.files import WEIGHTS, json_writer, read_json, write_files

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # of an entry: its name, what it was made from, the fingerprint of each file
CACHE_VERSION = 4  # of the content of all entries
UNFINISHED, LOCK = ".making-", "lock"  # a folder that is being filled; the file in it that its maker locks
_PIECE, _READ = 1 << 24, 1 << 20  # bytes: of a file for each thread, and at a time


class NoHome(LoadError):
    """There is no folder for a cache."""


def cache_folder() -> Path:
    """$SMOLLM2_CACHE, else $XDG_CACHE_HOME/smollm2, else ~/.cache/smollm2.

    Raises NoHome if that needs a home folder and there is none.
    """
    named, base = os.environ.get("SMOLLM2_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(named).expanduser() if named else Path(base or Path.home() / ".cache") / "smollm2"
    except RuntimeError:  # no HOME, and a user whom the system does not know
        raise NoHome("this user has no home folder: let SMOLLM2_CACHE name one for the cache") from None


def is_cached(path: Path) -> bool:
    """Whether a path lies in the cache."""
    try:
        return cache_folder() in path.parents
    except NoHome:
        return False


def cached(
    sources: Sequence[Path],
    name: str,
    prepare: Callable[[], Callable[[Path], None]],
    used: Sequence[str] = ("*",),
) -> Path | None:
    """The folder of the cache that holds what `name` makes of the source files, made now if it is not there.

    prepare() does the work and returns the function that writes the result into a new folder. used: patterns
    of the files that the caller reads, which are compared with their fingerprints. The folder's name holds
    the path of the first source and the identity of all (size, times of the last change, inode,
    CACHE_VERSION): when a source changes, the entry is made anew and the old one is removed, and so it is
    when the entry is damaged. Processes that start together each do the work, and all use the folder of the
    first to finish. Returns None, after a warning, if the cache cannot be written.
    """
    line = f"{name}-{_digest(sources[0].resolve())}"
    status = [(path.name, path.stat()) for path in sources]
    # ctime as well: who copies over a file may keep its size, its inode and its time of change
    states = [(file, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino) for file, now in status]
    root = None
    with contextlib.ExitStack() as stack:
        try:
            root = cache_folder()
            sweep(root)
            target = root / f"{line}-{_digest(CACHE_VERSION, states)}"
            if _is_whole(target, used):
                return target
            temporary = stack.enter_context(unfinished(root))
        except (OSError, LoadError) as error:
            _cannot_write(root, error)
            return None
        write = prepare()
        try:
            write(temporary / target.name)
            _put(temporary / target.name, target, used, sources[0].resolve())
        except (OSError, LoadError) as error:
            _cannot_write(root, error)
            return None
    for earlier in root.glob(f"{glob.escape(line)}-*"):
        if earlier != target:
            for derived in [earlier, *root.glob(f"*-{key_of_copies(earlier)}-*")]:
                shutil.rmtree(derived, ignore_errors=True)
    return target


def key_of_copies(entry: Path) -> str:
    """The part of a name by which entries that were made from this one's weights are found."""
    return _digest((entry / WEIGHTS).resolve())


def _put(entry: Path, target: Path, used: Sequence[str], source: Path) -> None:
    """Gives a new entry its manifest and its place, unless another process was faster."""
    fingerprints = {path.name: _fingerprint(path) for path in sorted(entry.iterdir())}
    readable = str(source) == str(source).encode(errors="replace").decode()  # else JSON cannot hold it
    about = {"entry": entry.name, **({"source": str(source)} if readable else {})}
    write_files(entry, {MANIFEST: json_writer({**about, **fingerprints})})
    with _one_process_at_a_time(target.parent):
        if os.path.lexists(target):
            if _is_whole(target, used):
                return
            logger.warning("%s is damaged: made anew", target)
            target.rename(entry.with_name("damaged"))
        try:
            entry.rename(target)
        except OSError:
            if not _is_whole(target, used):  # else another process was faster, where there are no locks
                raise


def _is_whole(entry: Path, used: Sequence[str]) -> bool:
    """Whether an entry has the files that were written into it and no others, the used ones unchanged."""
    try:
        recorded = read_json(entry / MANIFEST)
        source = recorded.pop("source", None)  # absent in entries of earlier versions
        if source is not None and f"-{_digest(Path(source))}-" not in entry.name:
            return False
        names = {path.name for path in entry.iterdir() if not path.name.startswith(".")} - {MANIFEST}
        read = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in used))
        if recorded.pop("entry", None) != entry.name or recorded.keys() != names:
            return False
        return all(recorded[name] == _fingerprint(entry / name) for name in read)
    except (OSError, LoadError, RecursionError, TypeError):
        return False


def looks_whole(entry: Path) -> bool:
    """Whether an entry's files have the names and sizes that its manifest gives; no content is read."""
    if not _is_whole(entry, ()):
        return False
    sizes = {path.name: path.stat().st_size for path in entry.iterdir()}
    recorded = read_json(entry / MANIFEST).items()
    return all(line.startswith(f"{sizes[name]} bytes") for name, line in recorded if name in sizes)


def _fingerprint(path: Path) -> str:
    """Size and CRC-32 of a file, read by several threads: about 3 GB/s each."""

    def crc(start: int) -> int:
        value = 0
        with path.open("rb", buffering=0) as stream:
            stream.seek(start)
            for _ in range(_PIECE // _READ):
                value = zlib.crc32(stream.read(_READ), value)
        return value

    size = path.stat().st_size
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pieces = list(pool.map(crc, range(0, size, _PIECE)))
    return f"{size} bytes, crc32 {zlib.crc32(repr(pieces).encode()):08x}"


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder` for what is not complete yet. It is removed at the end; after a kill, by
    the next `sweep`. Raises OSError if `folder` cannot be written.
    """
    # Each by itself: mkdir(parents=True) makes parents that the whole group may be able to write to.
    new = [place for place in (*reversed(folder.parents), folder) if not place.exists()]
    for place in new:
        place.mkdir(mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if new:
            stack.callback(_remove_if_empty, folder)
        with _one_process_at_a_time(folder):  # no sweep sees the new folder before its lock is held
            temporary = tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder, ignore_cleanup_errors=True)
            path = Path(stack.enter_context(temporary))
            file = stack.enter_context((path / LOCK).open("w"))
            lock(file.fileno())
        yield path


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def sweep(folder: Path, *patterns: str) -> None:
    """Removes the unfinished folders that killed processes left in `folder`; those of living ones are locked,
    and stay. patterns: of the names that an earlier version gave them.
    """
    left = [path for pattern in (f"{UNFINISHED}*", *patterns) for path in folder.glob(pattern)]
    if not left:
        return
    with contextlib.suppress(OSError), _one_process_at_a_time(folder):
        for path in left:
            with contextlib.suppress(OSError), (path / LOCK).open("a") as file:
                if lock(file.fileno()):  # without locks nobody knows who lives, and all of it stays
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process is in this part of the program for the same folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _cannot_write(root: Path | None, error: OSError | LoadError) -> None:
    cause = error.__cause__ or error  # the reason alone: a temporary folder has another name each time
    _warn_once(root, getattr(cause, "strerror", None) or str(cause))


@functools.cache
def _warn_once(root: Path | None, reason: str) -> None:
    hint = "the work is done at every start; SMOLLM2_CACHE names another folder"
    logger.warning("%sthe cache cannot be written (%s): %s", f"{root}: " if root else "", reason, hint)


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]
