"""A dataset on the hub, streamed. Time-outs and failures are retried; without the hub, a dataset that the
token cache knows is read from there.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from smollm2.errors import LoadError
from train.data.prefetch import Prefetch
from train.data.rows import as_conversation, needed_columns
from train.data.source import SingleSource
from train.data.source_record import find_source_record

HUB_BLOCK = 1024  # rows
OPEN_PAUSES = (1, 4)  # seconds between attempts to open a dataset
# seconds between attempts to read a block, each up to a quarter shorter or longer
RETRY_PAUSES = (1, 4, 15, 60, 120)
READ_TIMEOUT = 180.0  # seconds for the next block, opening its file included


class HubSource(SingleSource):
    """The text column of a dataset on the hub, or of a folder of files that `datasets` reads; or its
    conversations. A shard is a file.

    Blocks of 1024 rows in the order of the file. HF_TOKEN is used when it is set; public data need none. A
    read that fails, or that gives nothing for three minutes, is tried again after 1 s to 2 min, from the
    block where it stopped.
    """

    def __init__(
        self, dataset: str, configuration: str, split: str, revision: str | None, text_column: str,
        cache: Path | None = None, train_on: str | None = None,
    ) -> None:  # fmt: skip
        """cache: root of the token cache, from which the dataset is read if the hub cannot be reached and the
        cache has it at this revision. Raises LoadError when neither has it, or it lacks the column.
        """
        self.local = Path(dataset).expanduser().is_dir()
        self.name = dataset if self.local else f"{dataset} {configuration}".strip()
        self.text_column = text_column
        self.train_on = train_on
        self._identity = f"hub {self.name} {split} {text_column if train_on is None else 'conversations'}"
        self._wanted = revision
        self._rows: Any = None
        self._unreachable = ""
        try:
            self.revision, self._rows, self.columns = _retried(
                lambda: self._open(dataset, configuration, split, revision), OPEN_PAUSES, self.name
            )
        except LoadError:
            raise
        except Exception as error:  # each transport and each builder has its own errors; none of them is ours
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            known = None
            if cache is not None and not self.local:
                known = find_source_record(cache, self._identity, revision)
            if known is None:
                check = "check dataset, dataset_config, dataset_split and the network"
                remedy = f"{check}, or train on files with data=local paths=..."
                raise LoadError(f"dataset {self.name}: cannot be read ({reason}); {remedy}") from error
            folder, record = known
            away = f"the hub cannot be reached ({reason[:120]})"
            print(f"dataset {self.name}: {away}; reading the token cache in {folder}", flush=True)
            self._unreachable, self.revision, self.columns = reason, record["revision"], record["columns"]
            self.num_shards, self._examples = int(record["num_shards"]), record["examples"]
            return
        what = f"dataset {self.name}", self.columns, text_column, train_on is not None
        self._rows = self._rows.select_columns(needed_columns(*what))
        self.num_shards = int(self._rows.num_shards)
        splits = self._rows.info.splits or {}
        self._examples = splits[split].num_examples if split in splits else None

    @staticmethod
    def _open(
        dataset: str, configuration: str, split: str, revision: str | None
    ) -> tuple[str | None, Any, list[str]]:
        """The commit, the rows and their columns."""
        try:
            import datasets
        except ModuleNotFoundError:
            hint = "install it with: pip install datasets"
            raise LoadError(f"data=hub needs the package datasets; {hint}") from None
        _retry_here(datasets.config)
        local = Path(dataset).expanduser().is_dir()
        commit = None if local else _commit(dataset, revision)
        rows = datasets.load_dataset(
            dataset, None if local else configuration or None, split=split, streaming=True, revision=commit,
            token=os.environ.get("HF_TOKEN") or None,
        )  # fmt: skip
        # Reads the schema, or where the files have none, as .csv, a row: what cannot be read shows here.
        return commit, rows, rows.column_names or list(next(iter(rows), {}))

    @property
    def sizes(self) -> Sequence[float]:
        """Published datasets come in files of about the same size."""
        return [1.0] * self.num_shards

    def span(self, shard: int, block: int) -> tuple[float, float]:
        if not self._examples:
            return 0.0, 0.0  # the number of rows is not published: only whole shards count
        blocks = self._examples / self.num_shards / HUB_BLOCK
        return min(1.0, block / blocks), min(1.0, (block + 1) / blocks)

    @property
    def fingerprint(self) -> str:
        return f"hub {self.name} {self.revision or 'local'} {self.num_shards} shards"

    @property
    def cache_key(self) -> tuple[str, str]:
        if self.revision is not None:
            return self._identity, self.revision
        # A folder has no commit: what stands for its content is the place, size and time of its files.
        files = [path for path in sorted(Path(self.name).expanduser().resolve().rglob("*")) if path.is_file()]
        listing = "\n".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
        return self._identity, hashlib.blake2b(
            listing.encode(errors="surrogateescape"), digest_size=16
        ).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {
            "identity": self._identity, "revision": self.revision, "wanted": [self._wanted],
            "fingerprint": self.fingerprint, "num_shards": self.num_shards, "columns": self.columns,
            "examples": self._examples,
        }  # fmt: skip

    def read(self, shard: int, first_block: int = 0) -> Generator[list[Any], None, None]:
        if self._rows is None:
            missing = f"shard {shard}, block {first_block} is not in the token cache"
            away = f"the hub cannot be reached ({self._unreachable})"
            remedy = "connect, or fill the cache before with python -m train.prepare"
            raise LoadError(f"dataset {self.name}: {missing}, and {away}; {remedy}")
        rows = self._rows.shard(num_shards=self.num_shards, index=shard)
        failures = 0
        while True:
            try:
                left = rows.skip(first_block * HUB_BLOCK).iter(batch_size=HUB_BLOCK)
                with closing(Prefetch(left, threading.Event(), 1, deadline=READ_TIMEOUT)) as batches:
                    for batch in batches:
                        yield self._documents(batch)
                        first_block += 1
                        failures = 0
                return
            except KeyError as error:
                lacks = f"rows of shard {shard}, block {first_block} lack the column {error}"
                raise LoadError(f"dataset {self.name}: {lacks}, which others have") from error
            except Exception as error:  # see above
                what = (
                    f"dataset {self.name}: reading shard {shard}, block {first_block} failed "
                    f"({type(error).__name__}: {error})"
                )
                if failures == len(RETRY_PAUSES):
                    times = f"{failures + 1} times; continue later with resume=auto"
                    raise LoadError(f"{what} {times}") from error
                _pause(what, RETRY_PAUSES[failures])
                failures += 1

    def _documents(self, batch: dict[str, list[Any]]) -> list[Any]:
        if self.train_on is None:
            return batch[self.text_column]
        rows = zip(*batch.values(), strict=True)
        return [as_conversation(dict(zip(batch, row, strict=True))) for row in rows]


def _commit(dataset: str, revision: str | None) -> str:
    """The commit that a revision (default: the newest) stands for now: what a resumed run reads again."""
    from huggingface_hub import HfApi

    token = os.environ.get("HF_TOKEN") or None
    commit = HfApi().dataset_info(dataset, revision=revision or None, timeout=30, token=token).sha
    if commit is None:
        raise LoadError(f"dataset {dataset}: the hub names no commit for revision {revision!r}")
    return commit


def _retry_here(config: Any) -> None:
    """`datasets` would retry in silence, 20 times. It keeps one retry; the others are made here, and said."""
    config.STREAMING_READ_MAX_RETRIES = 2
    for kind in ("", "SERVER_UNAVAILABLE_", "RATE_LIMIT_"):
        setattr(config, f"STREAMING_READ_{kind}RETRY_INTERVAL", 1)


def _pause(what: str, seconds: float) -> None:
    """Says what failed, and waits, for a random time around `seconds`: processes that failed together should
    not come back together.
    """
    seconds *= random.uniform(0.75, 1.25)
    print(f"{what}; trying again in {seconds:.1f} s", flush=True)
    time.sleep(seconds)


def _retried(action: Callable[[], Any], pauses: Sequence[float], name: str) -> Any:
    """The action's result, after failures that may pass were waited out."""
    for pause in pauses:
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - judged below
            if not _may_pass(error):
                raise
            _pause(f"dataset {name}: opening it failed ({type(error).__name__}: {error})", pause)
    return action()


def _may_pass(error: BaseException) -> bool:
    """Whether trying again may help: the network, an overloaded server; not a wrong name, and not a hub that
    is switched off.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 429) or status >= 500
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline or type(error).__name__ == "OfflineModeIsEnabled":
        return False
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, (ConnectionError, TimeoutError)) or library in ("httpx", "httpx2", "httpcore")
