"""Files on disk as a corpus: .parquet, .jsonl, .txt and .py."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from smollm2.errors import LoadError, UsageError
from train.data.source import Block, SingleSource

LAYOUT = "blocks 2"  # a change of the constants below makes other blocks
BYTE_BLOCK = 4 << 20  # of .jsonl and .txt files, and of groups of .py files
ROW_BLOCK = 1024  # of .parquet files
TEXT_DOCUMENT = 2048  # bytes; a .txt file is cut at the paragraph ends that follow so many
SUFFIXES = (".parquet", ".jsonl", ".txt", ".py")
END_OF_TEXT_LINE = b"<|endoftext|>"  # separates documents in some published .txt corpora


@dataclass(frozen=True)
class _Part:
    """A shard: a row group or a stretch of one file, or several whole .py files. size: rows, or bytes."""

    files: tuple[Path, ...]
    number: int
    size: int


class LocalSource(SingleSource):
    """Files on disk. A shard is one row group of a .parquet file, the lines of a .jsonl or .txt file that
    begin in one 4 MiB stretch, or a run of .py files, in the order of their paths, of about 4 MiB together.

    .parquet: the text column, in blocks of 1024 rows. .jsonl: the text key of each object, or each string.
    .txt: runs of whole paragraphs of at least 2 KiB, so that one large file still has many documents. .py:
    each file is a document. Memory: one block.
    """

    revision: str | None = None

    def __init__(
        self, paths: list[str], text_column: str, without: Sequence[str] = (), key: str = "paths"
    ) -> None:
        """paths: files, folders (searched recursively) and globs; without: the same, of what is left out,
        with all that lies in the folders. key: where paths were given. Raises UsageError when they name no
        readable file, or nothing is left.
        """
        self.text_column = text_column
        self.files = _expand(paths, key)
        left_out = _expand(without, "validation_paths") if without else []
        self._left_out = [(file, file.stat()) for file in left_out]
        if without:
            files = {file.resolve() for file in left_out}
            folders = {folder for name in without if (folder := Path(name).expanduser().absolute()).is_dir()}
            kept = [file for file in self.files if file.resolve() not in files]
            self.files = [file for file in kept if folders.isdisjoint(file.absolute().parents)]
            if not self.files:
                raise UsageError(
                    f"validation_paths: expected to leave some of {', '.join(paths)} for training, left none"
                )
        self._states = [(file, file.stat()) for file in self.files]
        self._shards = [part for file in self.files if file.suffix != ".py" for part in self._parts(file)]
        sizes = [(file, state.st_size) for file, state in self._states if file.suffix == ".py"]
        self._shards += _groups(sizes)
        self._noted: set[Path] = set()

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    @cached_property
    def sizes(self) -> Sequence[float]:
        """In bytes: a row group's are its share of its file."""
        rows: Counter[Path] = Counter()
        for part in self._shards:
            rows[part.files[0]] += part.size
        size = {file: state.st_size for file, state in self._states}

        def size_of(part: _Part) -> float:
            file = part.files[0]
            return part.size if file.suffix == ".py" else size[file] * part.size / rows[file]

        return [size_of(part) for part in self._shards]

    def span(self, shard: int, block: int) -> tuple[float, float]:
        part = self._shards[shard]
        if part.files[0].suffix != ".parquet":
            return 0.0, 1.0
        return min(1.0, block * ROW_BLOCK / part.size), min(1.0, (block + 1) * ROW_BLOCK / part.size)

    @property
    def fingerprint(self) -> str:
        states = (f"{file.name} {state.st_size}" for file, state in self._states + self._left_out)
        return f"local {len(self.files)} files {self._digest(states)}"

    @property
    def cache_key(self) -> tuple[str, str]:
        # Paths and times as well: a run may go on with files that were moved, but tokens of other texts must
        # never be taken for theirs.
        states = (f"{file.resolve()} {state.st_size} {state.st_mtime_ns}" for file, state in self._states)
        return f"local {self.files[0].parent.name} {self.text_column}", self._digest(states)

    def describe(self) -> dict[str, Any]:
        counts = {"num_shards": self.num_shards, "files": len(self.files)}
        return {"identity": self.cache_key[0], "fingerprint": self.fingerprint, **counts}

    def read(self, shard: int, first_block: int = 0) -> Iterator[Block]:
        part = self._shards[shard]
        try:
            if part.files[0].suffix == ".parquet":
                yield from _row_blocks(part, self.text_column, first_block)
            elif first_block == 0:
                yield list(self._documents(part))
        except OSError as error:
            remedy = "restore the file and continue with resume=auto"
            raise LoadError(f"{part.files[0]}: cannot be read ({error}); {remedy}") from error

    def _documents(self, part: _Part) -> Iterator[Any]:
        file = part.files[0]
        if file.suffix == ".jsonl":
            yield from (self._json_text(file, line) for line in _lines(file, part.number) if line.strip())
        elif file.suffix == ".txt":
            yield from _paragraph_runs(_lines(file, part.number))
        else:
            yield from (one.read_bytes() for one in part.files)

    def _parts(self, file: Path) -> list[_Part]:
        if file.suffix != ".parquet":
            begins = range(0, size := file.stat().st_size, BYTE_BLOCK)
            return [_Part((file,), n, min(BYTE_BLOCK, size - begin)) for n, begin in enumerate(begins)]
        parquet = _open_parquet(file)
        if self.text_column not in (columns := parquet.schema_arrow.names):
            got = ", ".join(columns)
            raise LoadError(f"{file}: expected a column {self.text_column!r}, got {got}; set text_column")
        rows = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
        return [_Part((file,), number, size) for number, size in enumerate(rows) if size]

    def _json_text(self, file: Path, line: bytes) -> Any:
        """The text of one line; None, which counts as unusable, when it is not JSON or lacks the key."""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if not line.endswith(b"\n") and file not in self._noted:
                self._noted.add(file)
                cut = "the last line is cut off (no line end, not JSON), and passed over"
                print(f"{file}: {cut}; is the file complete?", flush=True)
            return None
        return value.get(self.text_column) if isinstance(value, dict) else value

    @staticmethod
    def _digest(lines: Iterable[str]) -> str:
        content = "\n".join((LAYOUT, *lines)).encode(errors="surrogateescape")
        return hashlib.blake2b(content, digest_size=16).hexdigest()


def _expand(paths: Sequence[str], key: str = "paths") -> list[Path]:
    """The files behind paths, sorted, each once. key: where they were given."""
    found: set[Path] = set()
    for name in paths:
        path = Path(name).expanduser()
        matches = [] if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        files = _walk(path) if path.is_dir() else [match for match in matches if match.is_file()]
        known = ", ".join(SUFFIXES)
        if not files:
            raise UsageError(f"{key}: {name}: expected a file, folder or glob with {known}, found none")
        for file in files:
            if file.suffix not in SUFFIXES:
                got = file.suffix or "no suffix"
                raise UsageError(f"{key}: {file}: expected one of {known}, got {got}")
        found.update(files)
    return sorted(found)


def _walk(folder: Path) -> list[Path]:
    """The files below a folder that can be read, without those of hidden folders and of __pycache__."""
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        files += [Path(root, name) for name in names if name.endswith(SUFFIXES)]
    return [file for file in files if file.is_file()]


def _groups(files: list[tuple[Path, int]]) -> list[_Part]:
    """Runs of files that reach BYTE_BLOCK bytes together."""
    groups: list[_Part] = []
    run: list[Path] = []
    size = 0
    for file, bytes_of_file in files:
        run.append(file)
        size += bytes_of_file
        if size >= BYTE_BLOCK:
            groups.append(_Part(tuple(run), len(groups), size))
            run, size = [], 0
    return [*groups, _Part(tuple(run), len(groups), size)] if run else groups


def _open_parquet(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        install = "install it with: pip install 'smollm2-kernels[train]'"
        raise LoadError(f"{file}: reading .parquet needs pyarrow; {install}") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise LoadError(
            f"{file}: not a readable parquet file ({reason}); copy or download it again"
        ) from None


def _row_blocks(part: _Part, column: str, first_block: int) -> Iterator[Block]:
    """Blocks of ROW_BLOCK rows of one row group."""
    import pyarrow

    file, waiting, skip = part.files[0], [], first_block * ROW_BLOCK
    try:
        with _open_parquet(file) as parquet:
            for batch in parquet.iter_batches(ROW_BLOCK, row_groups=[part.number], columns=[column]):
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                waiting += column_values(batch.column(0).slice(skip))
                skip = 0
                while len(waiting) >= ROW_BLOCK:
                    yield waiting[:ROW_BLOCK]
                    waiting = waiting[ROW_BLOCK:]
    except (OSError, pyarrow.ArrowException) as error:
        what = f"row group {part.number} is damaged ({' '.join(str(error).split())})"
        raise LoadError(f"{file}: {what}; copy or download the file again") from error
    if waiting:
        yield waiting


def column_values(column: Any) -> Block:
    """The values of an arrow column: bytes where one is not UTF-8, so that only that document is lost."""
    import pyarrow

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        large = pyarrow.types.is_large_string(column.type)
        return list(column.cast(pyarrow.large_binary() if large else pyarrow.binary()).to_pylist())


def _lines(file: Path, part: int) -> Iterator[bytes]:
    """The lines whose first byte lies in the part-th stretch of BYTE_BLOCK bytes."""
    begin, end = part * BYTE_BLOCK, (part + 1) * BYTE_BLOCK
    with file.open("rb") as stream:
        if begin > 0:
            stream.seek(begin - 1)
            stream.readline()  # the rest of a line that began earlier
        while stream.tell() < end and (line := stream.readline()):
            yield line


def _paragraph_runs(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Documents of lines: each ends at a blank line after TEXT_DOCUMENT bytes, or at an end-of-text line."""
    run: list[bytes] = []
    size = 0
    for line in lines:
        ends = line.strip() == END_OF_TEXT_LINE
        if not ends:
            run.append(line)
            size += len(line)
        if ends or (size >= TEXT_DOCUMENT and not line.strip()):
            if size:
                yield b"".join(run).strip()
            run, size = [], 0
    if size:
        yield b"".join(run).strip()
