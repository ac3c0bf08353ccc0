"""Seeded damage to the files of a token cache: the batches are those of the untouched cache."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from random import Random

import pytest
from data_sources import same, some_source
from mutations import mutate

from smollm2.pretrained.tokenizer import train_tokenizer
from train.config import RunConfig
from train.data.batches import training_batches
from train.data.token_cache import TokenCache, open_cache

SHAPE = dict(rows=2, length=16, seed=3, validation_fraction=0.2)
STEPS = 40  # more than an epoch of some_source()


def damage(folder: Path, random: Random) -> str:
    """Changes one file, or exchanges, renames, copies or deletes some. Returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file, other = random.sample(files, 2)
    kind = random.choice(("bytes", "bytes", "digit", "exchange", "rename", "copy", "delete", "lines"))
    content = file.read_bytes()
    if kind == "bytes":
        file.write_bytes(mutate(content, random))
    elif kind == "digit":  # of a manifest, or whatever byte of another file is one
        places = [place for place, byte in enumerate(content) if chr(byte).isdigit()] or [0]
        place = random.choice(places)
        file.write_bytes(content[:place] + str(random.randrange(10)).encode() + content[place + 1 :])
    elif kind == "exchange":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "rename":
        file.rename(other)
    elif kind == "copy":
        shutil.copy(file, other)
    elif kind == "lines":
        lines = content.splitlines(keepends=True)
        random.shuffle(lines)
        file.write_bytes(b"".join(lines[: random.randrange(len(lines) + 1)] + lines[:1]))
    else:
        file.unlink()
    return f"{kind}: {file.name}, {other.name}"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["document 0123456789 . " * 5], 280)


@pytest.fixture(scope="module")
def expected(tokenizer):
    return list(itertools.islice(training_batches(some_source(), tokenizer, **SHAPE), STEPS))


@pytest.mark.parametrize("seed", range(40))
def test_damage_to_a_token_cache_changes_no_batch(tmp_path, tokenizer, expected, seed):
    random = Random(seed)
    config = RunConfig(data="local", paths=["-"], token_cache=str(tmp_path))

    def opened() -> TokenCache:
        cache = open_cache(config, some_source(), tokenizer)
        assert cache is not None
        return cache

    def check(what: str) -> None:
        batches = training_batches(some_source(), tokenizer, **SHAPE, cache=opened())
        assert all(same(next(batches), batch) for batch in expected), what
        batches.close()

    check("untouched")
    done: list[str] = []
    for _ in range(3):  # each on what the last one left
        done.append(damage(tmp_path, random))
        check("; ".join(done))
    assert all(block is not None for _, _, block in opened().verify()), done
