"""Tokenised documents on disk: filled while a run streams, read by later epochs and runs without network and
without tokenising.

    ROOT/<source>/<revision or content>/source.json     what the source is, so that it opens without the hub
    ROOT/<source>/<revision or content>/<tokenizer>/    its shards (train/data/shards.py)

A process may be killed at any moment. One process writes a shard at a time; whoever finds it locked tokenises
without storing. Every block is verified when it is read, with its place and with what it is cached for, and a
damaged one is tokenised again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from smollm2.errors import UsageError
from smollm2.pretrained.tokenizer import Tokenizer
from train.config import RunConfig
from train.data.conversations import ChatFormat
from train.data.shards import Locked, Shard, ShardWriter
from train.data.source import Single, Source
from train.data.source_record import cache_root, source_folder, write_source_record
from train.data.tokenise import TokenBlock
from train.data.worker_pool import token_dtype

# seconds that the other ranks of a node wait for the leader's block
WAIT_NOTE, WAIT_TIMEOUT, WAIT_POLL = 15.0, 120.0, 0.05


def open_cache(
    config: RunConfig, source: Single, tokenizer: Tokenizer, *, leader: bool = True
) -> TokenCache | None:
    """The cache of a source and tokenizer, or None where config wants none.

    leader: this process stores what it tokenises; others of the node (local_rank > 0) wait for it. Where the
    folder cannot be written, token_cache=auto says so in a line and keeps no cache. Raises UsageError when it
    is one that token_cache names.
    """
    root = cache_root(config)
    if root is None:
        return None
    home = source_folder(root, *source.cache_key)
    dtype = token_dtype(tokenizer, source.train_on)
    chat = "" if source.train_on is None else f"-chat-{ChatFormat.of(tokenizer, source.train_on).key}"
    folder = home / f"{tokenizer.fingerprint()[:16]}-end{tokenizer.eot_token_id}-{dtype}{chat}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if leader:
            write_source_record(home / "source.json", source.describe())
    except OSError as error:
        reason = f"token_cache: {root} cannot be written ({error.strerror})"
        if config.token_cache != "auto":
            raise UsageError(f"{reason}; name another folder, or token_cache=none") from None
        print(f"{reason}; continuing without", flush=True)
        return None
    identity = "\n".join((*source.cache_key, tokenizer.fingerprint(), folder.name))
    return TokenCache(folder, dtype, identity, leader=leader)


class Caches(Protocol):
    """The caches of a source's parts. A TokenCache is that of a single source."""

    @property
    def parts(self) -> Sequence[TokenCache | None]: ...

    def release(self) -> None: ...

    def close(self) -> None: ...


class MixtureCache:
    """The token caches of a mixture's sources, in their order; None for a source without one."""

    def __init__(self, parts: Sequence[TokenCache | None]) -> None:
        self.parts = parts

    def release(self) -> None:
        for cache in self.parts:
            if cache is not None:
                cache.release()

    def close(self) -> None:
        for cache in self.parts:
            if cache is not None:
                cache.close()


def open_caches(
    config: RunConfig, source: Source, tokenizer: Tokenizer, *, leader: bool = True
) -> MixtureCache:
    """As open_cache, for each part of the source that config names."""
    pairs = zip(config.mixture_parts(), source.parts, strict=True)
    return MixtureCache(
        [open_cache(one.config, part.source, tokenizer, leader=leader) for one, part in pairs]
    )


class TokenCache:
    """The stored blocks of one source under one tokenizer. Threads may share it; see the module's text for
    processes.
    """

    def __init__(self, folder: Path, dtype: str, identity: str = "", *, leader: bool = True) -> None:
        """identity: of the source, its version and the tokenizer. What was stored for another is not read."""
        self.folder, self.dtype, self.leader = folder, np.dtype(dtype).newbyteorder("<"), leader
        self._identity = identity
        self._said: set[str] = set()
        self._lock = threading.RLock()
        self._shards: dict[int, Shard] = {}
        self._writer: ShardWriter | None = None
        self._full = False
        self._refused: set[int] = set()  # shards that another process was writing
        self._patience = WAIT_TIMEOUT
        self.stored_tokens = 0  # by this object

    @property
    def parts(self) -> Sequence[TokenCache | None]:
        return [self]

    def has(self, shard: int, block: int) -> bool:
        """Whether the block is stored, as far as its manifest says."""
        with self._lock:
            return self._shard(shard).entry(block) is not None

    def blocks(self, shard: int) -> int | None:
        """How many blocks the shard has, once it was read to its end."""
        with self._lock:
            return self._shard(shard).blocks

    def get(self, shard: int, block: int, stop: threading.Event | None = None) -> TokenBlock | None:
        """The block if it is stored and sound; a damaged one is reported and counts as absent.

        In a process that is not the leader it is waited for, until the leader gives the shard up, two minutes
        have passed or `stop`.
        """
        found = self._read(shard, block)
        if found is not None or self.leader:
            return found
        begin, noted = time.monotonic(), False
        while stop is None or not stop.is_set():
            found = self._read(shard, block)
            blocks = self.blocks(shard)
            if found is not None or (blocks is not None and block >= blocks) or self._marker(shard).exists():
                self._patience = WAIT_TIMEOUT
                return found
            waited = time.monotonic() - begin
            if waited > WAIT_NOTE and not noted:
                noted = True
                _say(f"waiting for {self._name(shard, block)} from the first rank of this node")
            if waited > self._patience:
                _say(f"{self._name(shard, block)} did not appear in {waited:.0f} s; tokenising it here")
                self._patience = min(1.0, self._patience)  # the next one is not waited for as long again
                return None
            time.sleep(WAIT_POLL)
        return None

    def put(self, shard: int, block: int, tokens: TokenBlock) -> None:
        """Stores a block, unless it is there, another process writes its shard, or the disk is full."""
        with self._lock:
            if not self.has(shard, block) and (writer := self._writer_of(shard)) is not None:
                ids = tokens.tokens.astype(self.dtype)
                self._store(shard, lambda: writer.append(block, ids, tokens.lengths, tokens.digests))
                self.stored_tokens += len(tokens.tokens)

    def finish(self, shard: int, blocks: int) -> None:
        """Notes how many blocks the shard has."""
        with self._lock:
            if self.blocks(shard) is None and (writer := self._writer_of(shard)) is not None:
                self._store(shard, lambda: writer.line({"blocks": blocks}))
            self.release()

    def release(self) -> None:
        """Lets other processes write the shard that this one was writing."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def close(self) -> None:
        """Closes every file. The cache can be used again afterwards."""
        with self._lock:
            self.release()
            self._shards.clear()

    def shards(self) -> list[int]:
        """The shards of which something is stored."""
        numbers = [path.stem.removeprefix("shard-") for path in self.folder.glob("shard-*.jsonl")]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def verify(self) -> Iterator[tuple[int, int, TokenBlock | None]]:
        """Every stored block as (shard, block, its documents), read from the disk and verified; None for a
        damaged one, and for what follows a damaged line.
        """
        for shard in self.shards():
            stored = self._shard(shard).stored()
            for block in stored:
                yield shard, block, self._read(shard, block, heal=False)
            if self._shard(shard).damage:
                yield shard, len(stored), None
            with self._lock:
                self._shards.pop(shard, None)

    def tokens_of(self, shards: int) -> int | None:
        """The tokens of the source, if every block of all its `shards` is stored."""
        total = 0
        for shard in range(shards):
            with self._lock:
                one = self._shard(shard)
                entries = [one.entry(block) for block in range(one.blocks or 0)]
            if one.blocks is None or None in entries:
                return None
            total += sum(entry.token_count for entry in entries if entry is not None)
        return total

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def _read(self, shard: int, block: int, heal: bool = True) -> TokenBlock | None:
        with self._lock:
            one = self._shard(shard)
            entry = one.entry(block)
            if one.damage is not None and one.damage not in self._said:
                self._said.add(one.damage)
                _say(one.damage)
                if heal:
                    self._writer_of(shard)  # cuts the manifest off before the damage
            found = None if entry is None else one.read(entry)
            if entry is not None and found is None:
                one.damaged.add(entry)
                _say(f"{one.path('.tokens')}: block {block} is damaged; it is tokenised again")
            return found

    def _shard(self, shard: int) -> Shard:
        if shard not in self._shards:
            while len(self._shards) >= 4:  # files and maps held open; runs read one or two shards at a time
                self._shards.pop(next(iter(self._shards)))
            self._shards[shard] = Shard(self.folder / f"shard-{shard:05d}", self.dtype, self._identity)
        return self._shards[shard]

    def _writer_of(self, shard: int) -> ShardWriter | None:
        if self._full and shard not in self._refused:
            self._give_up(shard)
        if not self.leader or shard in self._refused:
            return None
        stem = self.folder / f"shard-{shard:05d}"
        if self._writer is not None and self._writer.stem == stem:
            return self._writer
        self.release()

        def begin() -> None:
            self._writer = ShardWriter(stem, self.dtype, self._identity)

        try:
            self._store(shard, begin)
        except Locked:
            _say(f"{stem.name} is being written by another process; it is not stored from here")
            self._give_up(shard)
        return self._writer

    def _store(self, shard: int, action: Callable[[], None]) -> None:
        try:
            action()
            self._marker(shard).unlink(missing_ok=True)
        except Locked:
            raise
        except OSError as error:
            rest = "training goes on, nothing more is stored"
            _say(f"{self.folder} cannot be written ({error.strerror}); {rest}")
            self._full = True
            self.release()
            self._give_up(shard)

    def _give_up(self, shard: int) -> None:
        """Tells the other ranks of the node not to wait for blocks of this shard."""
        self._refused.add(shard)
        with suppress(OSError):  # they wait until they lose patience
            self._marker(shard).touch()

    def _marker(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.unstored"

    def _name(self, shard: int, block: int) -> str:
        return f"shard {shard}, block {block} in {self.folder}"


def _say(text: str) -> None:
    print(f"token cache: {text}", flush=True)
