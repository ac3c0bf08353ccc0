"""Files on disk as a corpus: .parquet, .jsonl, .json, .csv, .txt, .md and .py.

Sizes in a file are claims: no document of more than DOCUMENT_LIMIT bytes is kept in memory, no block of more
than BLOCK_LIMIT, and nothing is unpacked to more than RATIO times its size. What lies beyond counts as
unusable, and is named once.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from smollm2.errors import LoadError, UsageError
from train.data.files import SUFFIXES, compression, find_files, fingerprints, kind
from train.data.rows import as_conversation, is_chat, needed_columns
from train.data.source import Block, SingleSource
from train.data.tables import (
    check_json,
    column_values,
    conversations,
    csv_columns,
    csv_rows,
    json_rows,
    open_parquet,
    text_sizes,
)

# A change of the constants below makes other blocks; those of .txt files have changed once more.
LAYOUT, TEXT_LAYOUT = "blocks 2", "blocks 3"
BYTE_BLOCK = 4 << 20  # of .jsonl and .txt files, and of groups of .py files
ROW_BLOCK = 1024  # of .parquet, .json and .csv files
TEXT_DOCUMENT = 2048  # bytes; a .txt file is cut at the paragraph ends that follow so many
TEXT_LIMIT = 16 * TEXT_DOCUMENT  # bytes; where no paragraph ends, it is cut at the line end after so many
DOCUMENT_LIMIT = 128 << 20  # bytes of a document, or of the line that holds it
BLOCK_LIMIT = 512 << 20  # bytes; 1024 rows of more than 512 KiB on average are several blocks
TABLES = (".json", ".csv")  # read from their beginning, in blocks of rows
TEXTS = (".txt", ".md")
CHAT_SUFFIXES = (".jsonl", ".parquet", *TABLES)  # of files that can hold conversations
ROWS_AT_ONCE = 8  # of a .parquet file, in memory beside the block
RATIO = 1000  # times their size, beyond DOCUMENT_LIMIT, to which files are unpacked: no text shrinks as much
END_OF_TEXT_LINE = b"<|endoftext|>"  # separates documents in some published .txt corpora


@dataclass(frozen=True)
class _Part:
    """A shard: a row group or a stretch of one file, or several whole .py files. size: rows, or bytes."""

    files: tuple[Path, ...]
    number: int
    size: int


class LocalSource(SingleSource):
    """Files on disk. A shard is one row group of a .parquet file, the lines of a .jsonl or .txt file that
    begin in one 4 MiB stretch, or a run of .py files, in the order of their paths, of about 4 MiB together. A
    compressed .jsonl or .txt file is one shard, and its stretches are the blocks. So is a .csv or .json file.

    .parquet, .csv: the text column, in blocks of 1024 rows. .jsonl, .json: the text key of each object, or
    each string; of .json, an array that is read at once. .txt, .md: runs of whole paragraphs of at least 2
    KiB, or where there are none of lines, of at least 32 KiB, so that one large file still has many
    documents. .py: each file is a document. Or conversations (train/data/rows.py): a row of a file of
    CHAT_SUFFIXES each. Memory: one block, or a .json file.
    """

    revision: str | None = None

    def __init__(
        self, paths: list[str], text_column: str, without: Sequence[str] = (), key: str = "paths",
        train_on: str | None = None,
    ) -> None:  # fmt: skip
        """paths: files, folders (searched recursively) and globs; without: the same, of what is left out,
        with all that lies in the folders. key: where paths were given. train_on: None, or what is learned of
        conversations, of which only files of CHAT_SUFFIXES hold any. Raises UsageError when they name no
        readable file, or nothing is left, LoadError for a file that lacks the columns.
        """
        self.text_column, self.train_on = text_column, train_on
        self.files = find_files(paths, key, kinds=SUFFIXES if train_on is None else CHAT_SUFFIXES)
        if train_on is not None:
            found, self.files = self.files, [file for file in self.files if kind(file) in CHAT_SUFFIXES]
            if not self.files:
                suffixes = f"{', '.join(CHAT_SUFFIXES[:-1])} or {CHAT_SUFFIXES[-1]}"
                wanted = f"expected {suffixes} files for format=chat, got {found[0].name}"
                raise UsageError(f"{key}: {wanted}")
        left_out = find_files(without, "validation_paths", quiet=True) if without else []
        self._left_out = [(file, file.stat()) for file in left_out]
        if without:
            files = {file.resolve() for file in left_out}
            folders = {
                folder for name in without if (folder := Path(os.path.expanduser(name)).absolute()).is_dir()
            }
            kept = [file for file in self.files if file.resolve() not in files]
            self.files = [file for file in kept if folders.isdisjoint(file.absolute().parents)]
            if not self.files:
                raise UsageError(
                    f"validation_paths: expected to leave some of {', '.join(paths)} for training, left none"
                )
        self._states = [(file, file.stat()) for file in self.files]
        self._noted: set[str] = set()
        for file, state in self._states:
            if state.st_size == 0 and kind(file) != ".py":
                self._note(file, "is empty")
        self._shards = [part for file in self.files if kind(file) != ".py" for part in self._parts(file)]
        sizes = [(file, state.st_size) for file, state in self._states if kind(file) == ".py"]
        self._shards += _groups(sizes)

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
            return part.size if kind(file) == ".py" else size[file] * part.size / rows[file]

        return [size_of(part) for part in self._shards]

    def span(self, shard: int, block: int) -> tuple[float, float]:
        part = self._shards[shard]
        if compression(part.files[0]) or kind(part.files[0]) in TABLES:
            return 0.0, 0.0  # how many blocks there are is not known: only whole shards count
        if kind(part.files[0]) != ".parquet":
            return 0.0, 1.0
        return min(1.0, block * ROW_BLOCK / part.size), min(1.0, (block + 1) * ROW_BLOCK / part.size)

    @cached_property
    def fingerprint(self) -> str:
        try:
            lines = [*fingerprints(self._states), "left out", *fingerprints(self._left_out)]
        except OSError as error:
            raise LoadError(f"{error.filename}: cannot be read ({error.strerror})") from error
        return self._fingerprint(self._layout, lines)

    @property
    def older_fingerprints(self) -> Mapping[str, str]:
        lines = [f"{file.name} {state.st_size}" for file, state in self._states + self._left_out]
        changed = ".txt files are cut into documents otherwise since this version" if self._has_text else ""
        return {self._fingerprint(LAYOUT, lines): changed}

    def _fingerprint(self, layout: str, lines: Iterable[str]) -> str:
        return f"local {len(self.files)} files {_digest(layout, lines)}"

    @property
    def cache_key(self) -> tuple[str, str]:
        # Paths and times as well: a run may go on with files that were moved, but tokens of other texts must
        # never be taken for theirs.
        states = (f"{file.resolve()} {state.st_size} {state.st_mtime_ns}" for file, state in self._states)
        what = self.text_column if self.train_on is None else "conversations"
        return f"local {self.files[0].parent.name} {what}", _digest(self._layout, states)

    def describe(self) -> dict[str, Any]:
        counts = {"num_shards": self.num_shards, "files": len(self.files)}
        return {"identity": self.cache_key[0], "fingerprint": self.fingerprint, **counts}

    def read(self, shard: int, first_block: int = 0) -> Generator[Block, None, None]:
        part = self._shards[shard]
        file = part.files[0]
        try:
            if kind(file) == ".parquet":
                yield from self._row_blocks(part, first_block)
            elif kind(file) in TABLES:
                yield from self._table_blocks(file, first_block)
            elif compression(file):
                yield from self._unpacked_blocks(file, first_block)
            elif first_block == 0 and kind(file) == ".py":
                yield [self._whole(one) for one in part.files]
            elif first_block == 0:
                with file.open("rb", buffering=1 << 20) as stream:
                    begin = part.number * BYTE_BLOCK
                    yield self._documents(file, _Lines(stream, begin).until(begin + BYTE_BLOCK))
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise LoadError(f"{file}: cannot be unpacked ({error}); copy or download it again") from error
        except OSError as error:
            remedy = "restore the file and continue with resume=auto"
            raise LoadError(f"{file}: cannot be read ({error}); {remedy}") from error

    def _documents(self, file: Path, lines: Iterator[bytes | None]) -> Block:
        if kind(file) in TEXTS:
            return list(_paragraph_runs(self._limited(file, line) for line in lines))
        return [self._json_document(file, line) for line in lines if line is None or line.strip()]

    def _whole(self, file: Path) -> bytes | None:
        if file.stat().st_size > DOCUMENT_LIMIT:
            return self._limited(file, None)
        return file.read_bytes().removeprefix(codecs.BOM_UTF8)

    def _limited(self, file: Path, document: bytes | None) -> bytes | None:
        """The document, or None, with a note, if it is too large."""
        if document is None:
            self._note(file, f"documents of more than {DOCUMENT_LIMIT:,} bytes are passed over")
        return document

    def _note(self, file: Path, what: str) -> None:
        if (line := f"{file}: {what}") not in self._noted:
            self._noted.add(line)
            print(line, flush=True)

    def _unpacked_blocks(self, file: Path, first_block: int) -> Iterator[Block]:
        limit = RATIO * file.stat().st_size + DOCUMENT_LIMIT
        with _unpack(file) as stream:
            lines = _Lines(stream)
            for block in itertools.count():
                begin = lines.position
                if begin > limit:
                    self._note(file, f"unpacks to over {RATIO:,} times its size; the rest is passed over")
                    return
                stretch = lines.until((begin // BYTE_BLOCK + 1) * BYTE_BLOCK)
                found = self._documents(file, stretch) if block >= first_block else [*stretch]
                if lines.position == begin:
                    return
                if block >= first_block:
                    yield found

    def _table_blocks(self, file: Path, first_block: int) -> Iterator[Block]:
        """Blocks of ROW_BLOCK rows, or of fewer where they would exceed BLOCK_LIMIT characters."""
        rows: Iterable[Any] = csv_rows(file, DOCUMENT_LIMIT)
        if kind(file) == ".json":
            rows = json_rows(file)
            if rows and isinstance(rows[0], dict):
                self._needed(f"{file}: row 1", list(rows[0]))
        found: Block = []
        size = block = 0
        for row in rows:
            document = self._document(file, row)
            characters = len(document) if isinstance(document, str) else 0
            if len(found) == ROW_BLOCK or (found and size + characters > BLOCK_LIMIT):
                if block >= first_block:
                    yield found
                found, size, block = [], 0, block + 1
            found.append(document)
            size += characters
        if found and block >= first_block:
            yield found

    def _row_blocks(self, part: _Part, first_block: int) -> Iterator[Block]:
        """Blocks of ROW_BLOCK rows of one row group, or of fewer where they would exceed BLOCK_LIMIT."""
        import pyarrow
        import pyarrow.compute

        file, size, block = part.files[0], 0, 0
        rows: Block = []
        try:
            with open_parquet(file) as parquet:
                columns = self._needed(str(file), parquet.schema_arrow.names)
                for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[part.number], columns=columns):
                    column = batch.column(0) if self.train_on is None else conversations(batch)
                    if column.type == pyarrow.string_view():  # which few functions take
                        column = column.cast(pyarrow.large_string())
                    sizes = text_sizes(column)
                    if max(sizes) > DOCUMENT_LIMIT:
                        self._limited(file, None)
                        keep = pyarrow.array([one <= DOCUMENT_LIMIT for one in sizes])
                        column = pyarrow.compute.if_else(keep, column, pyarrow.scalar(None, column.type))
                        sizes = [one if one <= DOCUMENT_LIMIT else 0 for one in sizes]
                    # blocks that are not asked for are counted, not converted
                    wanted = block + len(sizes) >= first_block
                    values = column_values(column) if wanted else [None] * len(sizes)
                    for value, bytes_of_value in zip(values, sizes, strict=True):
                        if len(rows) == ROW_BLOCK or (rows and size + bytes_of_value > BLOCK_LIMIT):
                            if block >= first_block:
                                yield rows
                            rows, size, block = [], 0, block + 1
                        rows.append(value)
                        size += bytes_of_value
        except (OSError, pyarrow.ArrowException) as error:
            what = f"row group {part.number} is damaged ({' '.join(str(error).split())})"
            raise LoadError(f"{file}: {what}; copy or download the file again") from error
        if rows and block >= first_block:
            yield rows

    def _parts(self, file: Path) -> list[_Part]:
        if kind(file) == ".csv" and file.stat().st_size:
            self._needed(str(file), csv_columns(file))
        if kind(file) == ".json":
            check_json(file, DOCUMENT_LIMIT)
        if compression(file) or (kind(file) in TABLES and file.stat().st_size):
            return [_Part((file,), 0, file.stat().st_size)]
        if kind(file) != ".parquet":
            begins = range(0, size := file.stat().st_size, BYTE_BLOCK)
            return [_Part((file,), n, min(BYTE_BLOCK, size - begin)) for n, begin in enumerate(begins)]
        parquet = open_parquet(file)
        columns = self._needed(str(file), parquet.schema_arrow.names)
        parts = []
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            if _is_bomb(group, columns):
                claim = f"row group {number} claims to unpack to more than {RATIO:,} times its size"
                self._note(file, f"{claim}; its {group.num_rows:,} rows are passed over")
            elif group.num_rows > 0:
                parts.append(_Part((file,), number, group.num_rows))
        return parts

    def _needed(self, where: str, columns: list[str]) -> list[str]:
        return needed_columns(where, columns, self.text_column, self.train_on is not None)

    def _json_document(self, file: Path, line: bytes | None) -> Any:
        """The text or conversation of a line; None (unusable) where it is too long, not JSON or has none."""
        if line is None:
            return self._limited(file, None)
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if not line.endswith(b"\n"):
                cut = "the last line is cut off (no line end, not JSON), and passed over"
                self._note(file, f"{cut}; is the file complete?")
            else:
                self._note(file, "lines that are not JSON in UTF-8 are passed over")
            return None
        return self._document(file, value)

    def _document(self, file: Path, value: Any) -> Any:
        """The text or conversation of a row; None where it has none."""
        if self.train_on is not None:
            if (conversation := as_conversation(value)) is None:
                self._note(file, "rows without a conversation to learn from are passed over")
            return conversation
        if isinstance(value, dict) and self.text_column not in value and is_chat(value):
            self._note(file, f"conversations, not {self.text_column!r}, are passed over; add format=chat")
        return value.get(self.text_column) if isinstance(value, dict) else value

    @cached_property
    def _has_text(self) -> bool:
        return any(kind(file) == ".txt" for file in self.files)

    @property
    def _layout(self) -> str:
        return TEXT_LAYOUT if self._has_text else LAYOUT


def _digest(layout: str, lines: Iterable[str]) -> str:
    content = "\n".join((layout, *lines)).encode(errors="surrogateescape")
    return hashlib.blake2b(content, digest_size=16).hexdigest()


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


def _is_bomb(group: Any, names: list[str]) -> bool:
    """Whether a column of a row group, or what lies in it, claims more than can be true."""
    columns = [group.column(number) for number in range(group.num_columns)]
    return any(
        column.total_uncompressed_size > max(DOCUMENT_LIMIT, RATIO * column.total_compressed_size)
        for column in columns
        if column.path_in_schema.partition(".")[0] in names
    )


def _unpack(file: Path) -> Any:
    """A compressed file as a stream of its content."""
    if compression(file) != ".zst":
        opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[compression(file)]
        return opener(file)
    try:
        import pyarrow
    except ModuleNotFoundError:
        install = "install it with: pip install pyarrow"
        raise LoadError(f"{file}: reading .zst needs pyarrow; {install}") from None
    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


class _Lines:
    """The lines of a stream, from the first that begins at or after a place.

    position: bytes before the next line.
    """

    def __init__(self, stream: BinaryIO, begin: int = 0) -> None:
        """begin: of a stretch of BYTE_BLOCK bytes. Where no line begins in it, position is behind it."""
        self._stream, self.position = stream, begin
        if begin > 0:
            stream.seek(begin - 1)
            self.position -= 1
            self._read(BYTE_BLOCK + 1)

    def until(self, end: int) -> Iterator[bytes | None]:
        """The lines that begin before `end`; None for one of more than DOCUMENT_LIMIT bytes."""
        while (begin := self.position) < end and (line := self._read(DOCUMENT_LIMIT + 1)):
            if len(line) <= DOCUMENT_LIMIT:
                yield line.removeprefix(codecs.BOM_UTF8) if begin == 0 else line
                continue
            yield None
            while line and not line.endswith(b"\n"):
                line = self._read(BYTE_BLOCK)

    def _read(self, limit: int) -> bytes:
        line = self._stream.readline(limit)
        self.position += len(line)
        return line


def _paragraph_runs(lines: Iterator[bytes | None]) -> Iterator[bytes | None]:
    """Documents of lines: each ends at a blank line after TEXT_DOCUMENT bytes, at any after TEXT_LIMIT, or at
    an end-of-text line.
    """
    run: list[bytes] = []
    size = 0
    for line in lines:
        if line is None:
            yield None
            continue
        ends = line.strip() == END_OF_TEXT_LINE
        if not ends:
            run.append(line)
            size += len(line)
        if ends or size >= TEXT_LIMIT or (size >= TEXT_DOCUMENT and not line.strip()):
            if size:
                yield b"".join(run).strip()
            run, size = [], 0
    if size:
        yield b"".join(run).strip()
