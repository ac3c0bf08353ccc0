"""Which files the keys paths and validation_paths name, and what is left out beside them."""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from smollm2.errors import UsageError

# In any case. Of a folder the first of these groups is read that it has: a README.md or metadata.json beside
# texts is none of them.
GROUPS = ((".parquet", ".jsonl", ".txt", ".py"), (".json", ".csv"), (".md",))
SUFFIXES = tuple(suffix for group in GROUPS for suffix in group)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # behind .jsonl and .txt
# What a run writes into its folder; documents would be made of the first two.
RUN_TEXTS = {"metrics.jsonl", "samples.txt"}
RUN_NAMES = RUN_TEXTS | {"config.yaml", "checkpoints", "tokenizer"}

EDGE = 64 << 10  # bytes at either end of a file that its fingerprint depends on, besides its size
LEAST_EDGE, ALL_EDGES = 4 << 10, 256 << 20  # of many files, so that a fingerprint reads no more in all

LeftOut = dict[str, list[Path]]  # why -> what


def kind(file: Path) -> str:
    """What the file holds, as its suffix in small letters, without that of a compression."""
    return (Path(file.stem) if compression(file) else file).suffix.lower()


def compression(file: Path) -> str:
    """The suffix of its compression in small letters, or nothing."""
    suffix = file.suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def find_files(
    paths: Sequence[str], key: str = "paths", *, quiet: bool = False, kinds: Sequence[str] = SUFFIXES
) -> list[Path]:
    """The files behind files, folders (searched recursively, linked ones too) and globs, sorted, each once.

    A path that exists is taken as it is, whatever its characters mean in a glob. Of a folder, .json and .csv
    files are read where it has none of the first of GROUPS, and .md where it has nothing else. Folders of
    runs and token caches that are not named themselves are left out, as are hidden folders and __pycache__.
    Says in a line what else was left out, unless quiet. key: where the paths were given. kinds: suffixes of
    what can be used, which alone count in a folder that has some. Raises UsageError when one of the paths
    names nothing that can be read.
    """
    found: set[Path] = set()
    left_out: LeftOut = {}
    for name in paths:
        passed: LeftOut = {}
        files = [file for file in _named(name, key, passed, kinds) if not _is_utf16(file, passed)]
        if not files:
            wanted = f"expected a file, folder or glob with {', '.join(SUFFIXES)}, found none"
            raise UsageError(f"{key}: {name}: {wanted}{_listed(passed, '; left out: ')}")
        found.update(files)
        for reason, what in passed.items():
            left_out.setdefault(reason, []).extend(what)
    if left_out and not quiet:
        print(f"{key}: {_listed(left_out, 'left out: ')}", flush=True)
    return sorted(found)


def fingerprints(files: Sequence[tuple[Path, os.stat_result]]) -> Iterator[str]:
    """A line for each file: name, size, and a digest of its first and last EDGE bytes; of more than two
    thousand files of fewer. Where the files lie does not matter. Raises OSError.
    """
    edge = max(LEAST_EDGE, min(EDGE, ALL_EDGES // (2 * len(files) or 1)))
    for file, state in files:
        with file.open("rb", buffering=0) as stream:
            edges = hashlib.blake2b(stream.read(edge), digest_size=16)
            if state.st_size > edge:
                stream.seek(max(edge, state.st_size - edge))
                edges.update(stream.read(edge))
        yield f"{file.name} {state.st_size} {edges.hexdigest()}"


def _named(name: str, key: str, left_out: LeftOut, kinds: Sequence[str]) -> list[Path]:
    if not name.strip():
        raise UsageError(f"{key}: expected the name of a file or folder, or a glob, got {name!r}")
    path = Path(name)
    if not os.path.lexists(path):
        path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _first_group(list(_walk(path, left_out)), left_out, kinds)
    files = [path] if os.path.lexists(path) else _matches(path, left_out)
    for file in files:
        if not _is_read(file):
            got = file.suffix or "no suffix"
            raise UsageError(f"{key}: {file}: expected one of {', '.join(SUFFIXES)}, got {got}")
    return [file for file in files if _is_file(file, left_out)]


def _first_group(files: list[Path], left_out: LeftOut, kinds: Sequence[str]) -> list[Path]:
    there = {kind(file) for file in files}
    there = there.intersection(kinds) or there
    group = there.intersection(next((group for group in GROUPS if there.intersection(group)), ()))
    for file in files:
        if kind(file) not in group:
            left_out.setdefault(f"{file.suffix} beside others", []).append(file)
    return [file for file in files if kind(file) in group]


def _matches(pattern: Path, left_out: LeftOut) -> list[Path]:
    # A folder that exists is no pattern, though its name may have brackets.
    start = next(folder for folder in pattern.parents if folder.is_dir())
    rest = str(pattern.relative_to(start))
    matches = [start / match for match in glob.glob(rest, root_dir=start, recursive=True)]
    own = cache(_own)
    files = []
    for match in matches:
        above = [folder for folder in match.parents if folder != start and folder.is_relative_to(start)]
        if reason := next(filter(None, (own(folder) for folder in above)), ""):
            left_out.setdefault(f"matches in {reason}", []).append(match)
        elif match.is_dir():
            if not rest.endswith("**"):
                left_out.setdefault("matching folder", []).append(match)
        else:
            files.append(match)
    return files


def _walk(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """The files below a folder that can be read. Linked folders come last, and no folder comes twice."""
    waiting, seen = [str(folder)], set()

    def failed(error: OSError) -> None:
        left_out.setdefault("unreadable folder", []).append(Path(error.filename))

    while waiting:
        for root, folders, names in os.walk(waiting.pop(0), onerror=failed):
            state = os.stat(root)
            reason = "" if root == str(folder) else _owner(folders, names)
            if reason:
                left_out.setdefault(reason, []).append(Path(root))
            if reason or (state.st_dev, state.st_ino) in seen:
                folders[:] = []
                continue
            seen.add((state.st_dev, state.st_ino))
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            waiting += sorted(link for name in folders if os.path.islink(link := os.path.join(root, name)))
            for file in (Path(root, name) for name in names):
                if not _is_read(file):
                    left_out.setdefault(file.suffix or "file without a suffix", []).append(file)
                elif _is_file(file, left_out):
                    yield file


def _own(folder: Path) -> str:
    names = os.listdir(folder) if folder.is_dir() else []
    return _owner(names, names)


def _owner(folders: Iterable[str], names: Iterable[str]) -> str:
    """What this program wrote a folder for, if it did."""
    every = {*folders, *names}
    if every & RUN_TEXTS and len(every & RUN_NAMES) > 1:
        return "folder of a run"
    return "token cache" if any(re.fullmatch(r"shard-\d{5,}\.tokens", name) for name in every) else ""


def _is_read(file: Path) -> bool:
    return kind(file) in ((".jsonl", ".txt") if compression(file) else SUFFIXES)


def _is_file(file: Path, left_out: LeftOut) -> bool:
    if file.is_file():
        return True
    left_out.setdefault("not a regular file" if file.exists() else "broken link", []).append(file)
    return False


def _is_utf16(file: Path, left_out: LeftOut) -> bool:
    """Read as UTF-8, such a text would be garbage, or nothing."""
    if file.suffix.lower() not in (".jsonl", ".txt", ".json", ".csv", ".md") or file.stat().st_size < 2:
        return False
    with file.open("rb") as stream:
        if stream.read(2) not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return False
    left_out.setdefault("UTF-16 (expected UTF-8)", []).append(file)
    return True


def _listed(left_out: LeftOut, begin: str) -> str:
    """How many of each, the most frequent first, each with one of them."""
    by_count = sorted(left_out.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    parts = [f"{len(files)} {reason} ({min(files)})" for reason, files in by_count[:6]]
    others = sum(len(files) for _, files in by_count[6:])
    return begin + ", ".join([*parts, *([f"{others} others"] if others else [])]) if parts else ""
