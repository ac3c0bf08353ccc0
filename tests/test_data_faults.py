"""A dataset over HTTP from a hub that drops, stalls, truncates and refuses: the text is the clean text; and
from the cache without it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import datasets
import pytest
from fake_hub import COMMIT, CONFIGURATION, FAULTS, REPOSITORY, FakeHub, fake_hub
from test_data_sources import write_cosmopedia
from train_cases import DEADLINE

from smollm2.errors import LoadError
from smollm2.pretrained.tokenizer import train_tokenizer
from train.config import RunConfig
from train.data import hub
from train.data.batches import training_batches
from train.data.open import open_source
from train.data.prefetch import Prefetch

STEPS = 400  # of 4 x 512 tokens: more than two epochs

# The pauses of huggingface_hub's own attempts are left out, so that they are used up and the project's come
# to bear.
PROGRAM = """
import hashlib, itertools, json, sys, threading
import huggingface_hub.utils._http as http

class Hurried:
    def __getattr__(self, name):
        return getattr(real, name)
    def sleep(self, seconds):
        real.sleep(min(seconds, 0.01))

real, http.time = http.time, Hurried()
from train.data import hub
from train.data.open import open_source
from train.config import RunConfig
from train.data.batches import training_batches
from train.data.token_cache import open_cache
from smollm2.pretrained.tokenizer import train_tokenizer

hub.RETRY_PAUSES, hub.OPEN_PAUSES = (0.05,) * 5, (0.05,) * 3
keys = dict(dataset={repository!r}, dataset_config={configuration!r}, token_cache={cache!r})
config = RunConfig(data="hub", **keys)
source = open_source(config)
tokenizer = train_tokenizer(["Course unit 0123456789: why the sky is blue, part."], 300)
cache = open_cache(config, source, tokenizer)
print("ready", flush=True)
sys.stdin.readline()
batches = training_batches(source, tokenizer, rows=4, length=512, seed=5, workers={workers}, cache=cache)
digest = hashlib.sha256()
for batch in itertools.islice(batches, {steps}):
    digest.update(batch.input_ids.numpy().tobytes() + batch.digests.tobytes())
batches.close()
blocks = [cache.blocks(shard) for shard in range(source.num_shards)]
print(json.dumps([source.fingerprint, digest.hexdigest(), blocks]))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_cosmopedia(folder, files=3, rows=1500, row_group=700)
    return folder


@pytest.fixture(scope="module")
def clean(corpus):
    """What all batches together are, read from the files."""
    source = open_source(RunConfig(data="hub", dataset=str(corpus)))
    tokenizer = train_tokenizer(["Course unit 0123456789: why the sky is blue, part."], 300)
    digest = hashlib.sha256()
    for batch in itertools.islice(training_batches(source, tokenizer, rows=4, length=512, seed=5), STEPS):
        digest.update(batch.input_ids.numpy().tobytes() + batch.digests.tobytes())
    return digest.hexdigest()


def run(
    url: str, cache: Path, project_root: Path, server: FakeHub | None = None, faults: list[str] | None = None
) -> tuple[int, str, str]:
    """One run in a process of its own -> exit code, stdout, stderr. The faults begin when the dataset is
    open.
    """
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"NO_PROXY": "*", "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache / "hf")}
    environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    program = PROGRAM.format(
        repository=REPOSITORY, configuration=CONFIGURATION, cache=str(cache), workers=1, steps=STEPS
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=project_root, env=environment,
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    first = ""
    while not first.endswith("ready\n") and (line := process.stdout.readline()):
        first += line
    if server is not None:
        server.faults, server.every = list(faults or []), 1
    try:
        out, errors = process.communicate("go\n" if process.poll() is None else None, timeout=DEADLINE)
    except BaseException:
        process.kill()
        raise
    return process.returncode, first + out, errors


@pytest.mark.slow
def test_faults_of_every_kind_change_nothing_and_the_second_run_needs_no_hub(
    tmp_path, corpus, clean, project_root
):
    with fake_hub(corpus) as server:
        # Seven in a row: one more than huggingface_hub tries. Then each of them once more.
        faults = ["drop", "500", "truncate", "429", "500", "drop", "truncate", *FAULTS]
        code, out, errors = run(server.url, tmp_path, project_root, server, faults)
        assert code == 0, errors
        assert server.met == faults
        url = server.url
    fingerprint, digest, blocks = json.loads(out.splitlines()[-1])
    assert digest == clean
    assert blocks == [2, 2, 2] and COMMIT in fingerprint
    assert f"dataset {REPOSITORY} {CONFIGURATION}: reading shard" in out and "trying again in 0." in out

    code, out, errors = run(url, tmp_path, project_root)
    assert code == 0, errors
    assert json.loads(out.splitlines()[-1]) == [fingerprint, digest, blocks]
    assert out.count("the hub cannot be reached") == 1 and "reading the token cache in" in out

    for file in tmp_path.glob("hub-*/*/*/shard-00001.*"):
        file.unlink()
    code, out, errors = run(url, tmp_path, project_root)
    assert code == 1
    message = errors.splitlines()[-1]
    assert "shard 1, block 0 is not in the token cache" in message and "train.prepare" in message


def test_a_hub_that_stays_away_is_given_up_with_what_to_do(tmp_path, corpus, project_root):
    with fake_hub(corpus) as server:
        code, _, errors = run(server.url, tmp_path, project_root, server, ["500"] * 1000)
    assert code == 1
    assert "failed (" in errors and "6 times; continue later with resume=auto" in errors


def test_a_reader_that_gives_nothing_is_left_after_the_deadline():
    over = threading.Event()

    def trickle() -> Generator[int, None, None]:
        yield 1
        over.wait()

    items = Prefetch(trickle(), threading.Event(), 1, deadline=DEADLINE)
    assert next(items) == 1
    items.deadline = 0.2
    with pytest.raises(TimeoutError, match="nothing came for 0"):
        next(items)
    over.set()


def write_csv(folder: Path, *rows: str) -> None:
    (folder / "train.csv").write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def test_a_wrong_column_of_a_csv_is_named_at_once(tmp_path, monkeypatch):
    write_csv(tmp_path, "id,text", *(f"{number},words {number}" for number in range(9)))
    monkeypatch.setattr(hub.time, "sleep", pytest.fail)
    config = RunConfig(data="hub", dataset=str(tmp_path), text_column="foo")
    with pytest.raises(LoadError, match="expected a column 'foo', got id, text; set text_column"):
        open_source(config)
    (block,) = open_source(RunConfig(data="hub", dataset=str(tmp_path))).parts[0].source.read(0)
    assert block == [f"words {number}" for number in range(9)]


def test_conversations_of_a_csv(tmp_path):
    write_csv(tmp_path, "id,prompt,completion", *(f"{n},a {n},b {n}" for n in range(3)))
    keys = {"data": "hub", "dataset": str(tmp_path)}
    (block,) = open_source(RunConfig(format="chat", **keys)).parts[0].source.read(0)
    assert [json.loads(row) for row in block] == [
        {"prompt": f"a {n}", "completion": f"b {n}"} for n in range(3)
    ]
    with pytest.raises(LoadError, match="expected a column 'text', got id, prompt, completion; add format=c"):
        open_source(RunConfig(**keys))


def test_the_first_row_is_asked_for_again_where_the_network_fails(tmp_path, monkeypatch, capsys):
    write_csv(tmp_path, "text", "words")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub.time, "sleep", lambda _: None)
    failures = iter([ConnectionError("reset"), None])

    class Rows(datasets.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, str]]:
            if (error := next(failures, None)) is not None:
                raise error
            return super().__iter__()

    def load_dataset(*args: object, **keys: object) -> object:
        rows = load(*args, **keys)
        rows.__class__ = Rows
        return rows

    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source(RunConfig(data="hub", dataset=str(tmp_path)))
    assert list(source.parts[0].source.read(0)) == [["words"]]
    assert "opening it failed (ConnectionError: reset); trying again" in capsys.readouterr().out


def test_rows_without_the_column_of_others_are_no_network_fault(tmp_path, monkeypatch):
    write_csv(tmp_path, "text", "words")
    (tmp_path / "train2.csv").write_text("body\nother\n", encoding="utf-8")
    monkeypatch.setattr(hub.time, "sleep", pytest.fail)
    source = open_source(RunConfig(data="hub", dataset=str(tmp_path))).parts[0].source
    with pytest.raises(LoadError, match="rows of shard 1, block 0 lack the column .*text"):
        list(source.read(1))


def test_opening_is_tried_again_where_that_may_help_and_only_there(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    pauses: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    attempts = iter([ConnectionError("reset"), TimeoutError("slow"), None])

    def flaky() -> str:
        if (error := next(attempts)) is not None:
            raise error
        return "open"

    assert hub._retried(flaky, (1, 4), "name") == "open"
    assert len(pauses) == 2 and 0.75 <= pauses[0] <= 1.25 and 3 <= pauses[1] <= 5

    def wrong() -> str:
        raise LoadError("no such dataset")

    with pytest.raises(LoadError):
        hub._retried(wrong, (1, 4), "name")
    assert len(pauses) == 2
