"""Where documents come from: Python's own documentation, local files, or a dataset on the hub.

A source is a list of shards; a shard is a sequence of blocks; a block is a list of documents that is read at once:

    source.num_shards                              how many there are
    source.read(shard, first_block)                the blocks of one shard from that one on
    source.fingerprint                             changes when the documents do

so that any document has an address (shard, block, index), and a reader can start anywhere. Nothing here depends on a seed: train/data.py
chooses the order. A document is whatever was stored; what is not text is sorted out, and counted, by the reader.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import os
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from smollm2.cli import LoadError, UsageError
from train.config import RunConfig

Block = list[Any]


class Source(Protocol):
    """What train/data.py reads.

    revision: the pinned version of the documents, where they have one. one_block: every shard is a single block, so that a position
    in it is a known part of the whole.
    """

    revision: str | None
    one_block: bool

    @property
    def num_shards(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def read(self, shard: int, first_block: int = 0) -> Iterator[Block]: ...


def open_source(config: RunConfig, revision: str | None = None) -> Source:
    """The source that config.data names. revision: the commit pinned by the checkpoint of a resumed run."""
    if config.data == "embedded":
        return EmbeddedSource()
    if config.data == "local":
        return LocalSource(config.paths, config.text_column)
    return HubSource(config.dataset, config.dataset_config, config.dataset_split, revision or config.dataset_revision, config.text_column)


# The standard library without its tests, its applications and what an installation may lack.
_NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


class EmbeddedSource:
    """The documentation inside every CPython: the language reference's topics, and each function's and class's docstrings.

    One shard of one block. Modules are parsed, never imported: some open windows or start servers at import.
    """

    revision: str | None = None
    one_block = True
    num_shards = 1

    def read(self, shard: int, first_block: int = 0) -> Iterator[Block]:
        if first_block == 0:
            yield self.documents

    @cached_property
    def documents(self) -> list[str]:
        """All documents, in a fixed order, without the paragraphs that earlier ones have."""
        from pydoc_data.topics import topics

        documents = [topics[name].strip() for name in sorted(topics)]
        library = Path(sysconfig.get_path("stdlib"))
        for path in sorted(library.rglob("*.py")):
            parts = path.relative_to(library).parts
            if not _NOT_DOCUMENTATION.intersection(parts):
                documents.extend(_docstrings(path, ".".join(parts).removesuffix(".py").removesuffix(".__init__")))
        return list(_without_repeats(dict.fromkeys(documents)))

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for document in self.documents:
            digest.update(document.encode(errors="replace") + b"\0")
        return f"embedded {len(self.documents)} documents {digest.hexdigest()}"


REPEAT = 80  # characters; shorter paragraphs ("Return a string.") repeat by nature


def _without_repeats(documents: Iterable[str]) -> Iterator[str]:
    """Drops paragraphs that an earlier document has, and documents of which little is left.

    Topics contain one another and classes copy docstrings: without this, held-out text would also be trained on.
    """
    seen: set[str] = set()
    for document in documents:
        paragraphs = [(paragraph, " ".join(paragraph.split())) for paragraph in document.split("\n\n")]
        kept = [paragraph for paragraph, words in paragraphs if len(words) < REPEAT or words not in seen]
        seen.update(words for _, words in paragraphs)
        text = "\n\n".join(kept)
        if len(kept) == len(paragraphs) or len(text) >= REPEAT:
            yield text


def _docstrings(path: Path, module: str) -> Iterator[str]:
    """Documents of one module as `help()` would show it: the module's text, then every documented function, and class with its methods."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return  # a template, or a file that is not UTF-8: it documents nothing
    if text := ast.get_docstring(tree):
        yield f"module {module}\n\n{text}"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            yield f"{_signature(node, module + '.')}\n\n{text}"
        elif isinstance(node, ast.ClassDef):
            parts = [text] if (text := ast.get_docstring(node)) else []
            for method in node.body:
                if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(method)):
                    parts.append(f"{_signature(method)}\n\n{text}")
            if parts:
                yield "\n\n".join([f"class {module}.{node.name}", *parts])


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str = "") -> str:
    return f"def {prefix}{node.name}({ast.unparse(node.args)})"


BYTE_BLOCK = 4 << 20  # of .jsonl and .txt files
TEXT_DOCUMENT = 2048  # characters; a .txt file is cut at the paragraph ends that follow so many
SUFFIXES = (".parquet", ".jsonl", ".txt")
END_OF_TEXT_LINE = "<|endoftext|>"  # separates documents in some published .txt corpora


class LocalSource:
    """Files on disk. A shard is one row group of a .parquet file, or the lines of a .jsonl or .txt file that begin in one 4 MiB stretch.

    .parquet: the text column. .jsonl: the text key of each object, or each string. .txt: runs of whole paragraphs of at least 2048
    characters, so that one large file still has many documents. Memory: one row group or stretch.
    """

    revision: str | None = None
    one_block = True

    def __init__(self, paths: list[str], text_column: str) -> None:
        """paths: files, folders (searched recursively) and globs. Raises UsageError when they name no readable file."""
        self.text_column = text_column
        self.files = _expand(paths)
        self._shards = [(file, part) for file in self.files for part in range(self._parts(file))]

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    @property
    def fingerprint(self) -> str:
        listing = "\n".join(f"{file.name} {file.stat().st_size}" for file in self.files)
        return f"local {len(self.files)} files {hashlib.blake2b(listing.encode(), digest_size=16).hexdigest()}"

    def read(self, shard: int, first_block: int = 0) -> Iterator[Block]:
        if first_block > 0:
            return
        file, part = self._shards[shard]
        if file.suffix == ".parquet":
            yield _open_parquet(file).read_row_group(part, columns=[self.text_column]).column(0).to_pylist()
        elif file.suffix == ".jsonl":
            yield [self._json_text(line) for line in _lines(file, part) if line.strip()]
        else:
            yield list(_paragraph_runs(_lines_of_paragraphs(file, part)))

    def _parts(self, file: Path) -> int:
        if file.suffix != ".parquet":
            return -(-file.stat().st_size // BYTE_BLOCK)
        parquet = _open_parquet(file)
        if self.text_column not in parquet.schema_arrow.names:
            raise LoadError(f"{file}: expected a column {self.text_column!r}, got {', '.join(parquet.schema_arrow.names)}; set text_column")
        return parquet.num_row_groups

    def _json_text(self, line: bytes) -> Any:
        """The text of one line; None, which is counted as invalid, when it is not JSON or has no such key."""
        try:
            value = json.loads(line)
        except ValueError:
            return None
        return value.get(self.text_column) if isinstance(value, dict) else value


def _expand(paths: list[str]) -> list[Path]:
    """The files behind paths, sorted, each once."""
    found: set[Path] = set()
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
        else:
            files = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
        if not files:
            raise UsageError(f"paths: {name}: expected a file, folder or glob with {', '.join(SUFFIXES)}, found none")
        unknown = [file for file in files if file.suffix not in SUFFIXES]
        if unknown:
            raise UsageError(f"paths: {unknown[0]}: expected one of {', '.join(SUFFIXES)}, got {unknown[0].suffix or 'no suffix'}")
        found.update(files)
    return sorted(found)


def _open_parquet(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise LoadError(f"{file}: reading .parquet needs pyarrow; install it with: pip install 'smollm2-kernels[train]'") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise LoadError(f"{file}: not a readable parquet file ({error}); copy or download it again") from None


def _lines(file: Path, part: int) -> Iterator[bytes]:
    """The lines whose first byte lies in the part-th stretch of BYTE_BLOCK bytes: every line belongs to exactly one stretch."""
    begin, end = part * BYTE_BLOCK, (part + 1) * BYTE_BLOCK
    with file.open("rb") as stream:
        if begin > 0:
            stream.seek(begin - 1)
            stream.readline()  # the rest of a line that began earlier
        while stream.tell() < end and (line := stream.readline()):
            yield line


def _lines_of_paragraphs(file: Path, part: int) -> Iterator[str]:
    for line in _lines(file, part):
        yield line.decode("utf-8", errors="replace")


def _paragraph_runs(lines: Iterator[str]) -> Iterator[str]:
    """Groups lines into documents that end at a blank line after TEXT_DOCUMENT characters, or at an end-of-text line."""
    run: list[str] = []
    size = 0
    for line in lines:
        ends = line.strip() == END_OF_TEXT_LINE
        if not ends:
            run.append(line)
            size += len(line)
        if ends or (size >= TEXT_DOCUMENT and not line.strip()):
            if size:
                yield "".join(run).strip()
            run, size = [], 0
    if size:
        yield "".join(run).strip()


HUB_BLOCK = 1024  # rows
RETRY_PAUSES = (1, 4, 15, 60, 120)  # seconds


class HubSource:
    """A dataset on the hub (or a folder of files that `datasets` reads), streamed: only the text column, one file per shard.

    Blocks of 1024 rows in the order of the file. HF_TOKEN is used when set; public data need none. A read that fails is tried
    again after 1 s to 2 min, from the block where it stopped.
    """

    one_block = False

    def __init__(self, dataset: str, configuration: str, split: str, revision: str | None, text_column: str) -> None:
        """Raises LoadError when the dataset cannot be reached or lacks the column."""
        try:
            from datasets import load_dataset
        except ModuleNotFoundError:
            raise LoadError("data=hub needs the package datasets; install it with: pip install 'smollm2-kernels[train]'") from None
        local = Path(dataset).expanduser().is_dir()
        name = dataset if local else f"{dataset} {configuration}".strip()
        try:
            self.revision = None if local else _commit(dataset, revision)
            rows = load_dataset(
                dataset, None if local else configuration or None, split=split, streaming=True, revision=self.revision,
                token=os.environ.get("HF_TOKEN") or None,
            )  # fmt: skip
            columns = rows.column_names
        except Exception as error:  # each transport and each builder has its own errors; none of them is ours
            raise LoadError(
                f"dataset {name}: cannot be read ({type(error).__name__}: {error}); check dataset, dataset_config, dataset_split and the "
                "network, or train on files with data=local paths=..."
            ) from error
        if columns is not None and text_column not in columns:
            raise LoadError(f"dataset {name}: expected a column {text_column!r}, got {', '.join(columns)}; set text_column")
        self.name, self.text_column = name, text_column
        self._rows = rows.select_columns([text_column])

    @property
    def num_shards(self) -> int:
        return int(self._rows.num_shards)

    @property
    def fingerprint(self) -> str:
        return f"hub {self.name} {self.revision or 'local'} {self.num_shards} shards"

    def read(self, shard: int, first_block: int = 0) -> Iterator[Block]:
        rows = self._rows.shard(num_shards=self.num_shards, index=shard)
        failures = 0
        while True:
            try:
                for batch in rows.skip(first_block * HUB_BLOCK).iter(batch_size=HUB_BLOCK):
                    yield batch[self.text_column]
                    first_block += 1
                    failures = 0
                return
            except Exception as error:  # see above
                what = f"dataset {self.name}: reading shard {shard}, block {first_block} failed ({type(error).__name__}: {error})"
                if failures == len(RETRY_PAUSES):
                    raise LoadError(f"{what} {failures + 1} times; continue later with resume=auto") from error
                print(f"{what}; trying again in {RETRY_PAUSES[failures]} s", flush=True)
                time.sleep(RETRY_PAUSES[failures])
                failures += 1


def _commit(dataset: str, revision: str | None) -> str:
    """The commit that a revision (default: the newest) stands for now: what a resumed run reads again."""
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(dataset, revision=revision or None, timeout=30, token=os.environ.get("HF_TOKEN") or None).sha
    if commit is None:
        raise LoadError(f"dataset {dataset}: the hub names no commit for revision {revision!r}")
    return commit
