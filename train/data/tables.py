"""Files that hold rows with columns: .parquet by way of pyarrow, .csv, and .json with an array."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smollm2.errors import LoadError
from train.data.rows import as_conversation
from train.data.source import Block


def csv_columns(file: Path) -> list[str]:
    """The fields of the first line, all different. Raises LoadError, OSError."""
    columns = next(_csv_records(file), [])
    if twice := [name for index, name in enumerate(columns) if name in columns[:index]]:
        raise LoadError(f"{file}: expected columns with different names, got {twice[0]!r} twice")
    return columns


def csv_rows(file: Path, limit: int) -> Iterator[dict[str, str]]:
    """The rows behind the first line, which names the columns. What is not UTF-8 becomes lone surrogates.

    limit: characters of a field. Raises LoadError with the file and row that cannot be read, OSError.
    """
    csv.field_size_limit(limit)  # of the whole process, in which nothing else reads .csv
    columns, records = csv_columns(file), _csv_records(file)
    next(records, None)
    for number, fields in enumerate(filter(None, records), 1):
        if len(fields) != len(columns):
            wanted = f"expected {len(columns)} fields ({', '.join(columns)}), got {len(fields)}"
            raise LoadError(f'{file}: row {number}: {wanted}; a text with a comma needs "quotes"')
        yield dict(zip(columns, fields, strict=True))


def _csv_records(file: Path) -> Iterator[list[str]]:
    number = 0
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            for fields in reader:
                yield fields
                number += bool(fields)
        except csv.Error as error:
            where = f"row {number}, which ends in line {reader.line_num}"
            raise LoadError(f"{file}: {where}: cannot be read ({error}); mend its quotes") from error


def check_json(file: Path, limit: int) -> None:
    """Raises LoadError for a file that is too large to be read at once."""
    if (size := file.stat().st_size) > limit:
        remedy = "write one object a line into a .jsonl file"
        raise LoadError(f"{file}: expected at most {limit:,} bytes of .json, got {size:,}; {remedy}")


def json_rows(file: Path) -> list[Any]:
    """The objects or texts of the array in a file. Raises LoadError with the file and row, OSError."""
    lines = "one object a line is a .jsonl file"
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{file}: not JSON in UTF-8 ({error}); {lines}") from error
    if not isinstance(rows, list):
        raise LoadError(f"{file}: expected an array of objects, got {_named(rows)}; {lines}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, (dict, str)):
            raise LoadError(f"{file}: row {number}: expected an object, got {_named(row)}")
    return rows


def _named(value: Any) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")


# ---- .parquet ----------------------------------------------------------------------------------------------


def open_parquet(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        install = "install it with: pip install pyarrow"
        raise LoadError(f"{file}: reading .parquet needs pyarrow; {install}") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise LoadError(
            f"{file}: not a readable parquet file ({reason}); copy or download it again"
        ) from None


def text_sizes(column: Any) -> list[int]:
    """Bytes of each value of an arrow column; 0 for what is not text."""
    import pyarrow.compute
    import pyarrow.types as types

    if types.is_dictionary(column.type):  # a value is stored once, and read as often as it occurs
        sizes = text_sizes(column.dictionary)
        return [0 if index is None else sizes[index] for index in column.indices.to_pylist()]
    kinds = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(is_kind(column.type) for is_kind in kinds):
        return [0] * len(column)
    return [size or 0 for size in pyarrow.compute.binary_length(column).to_pylist()]


def column_values(column: Any) -> Block:
    """The values of an arrow column: bytes where one is not UTF-8, so that only that document is lost."""
    import pyarrow

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        large = pyarrow.types.is_large_string(column.type)
        return list(column.cast(pyarrow.large_binary() if large else pyarrow.binary()).to_pylist())


def conversations(batch: Any) -> Any:
    """The conversations of some rows as a column of texts."""
    import pyarrow

    return pyarrow.array([as_conversation(row) for row in batch.to_pylist()], pyarrow.large_string())
