"""`python -m smollm2.cache`: it lists what is there, and removes what was asked for and nothing else."""

from __future__ import annotations

import fcntl
import io
import json
import os
import sys
import time

import pytest
import torch
from in_process import printed

from smollm2.cache import main
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.cache import LOCK, cached
from smollm2.pretrained.files import WEIGHTS, weights_writer

TOKENS = "tokens/corpus-01234567/commit"


def fill(sources, name):
    return cached(sources, name, lambda: weights_writer({"weight": torch.zeros(1000)}))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with something of every kind, and with files of somebody else."""
    root = tmp_path / "cache"
    monkeypatch.setenv("SMOLLM2_CACHE", str(root))
    source = tmp_path / "small.gguf"
    source.write_bytes(b"GGUF")
    model = fill([source], "small")
    copy = fill([model / WEIGHTS], "bfloat16")
    other = fill([tmp_path / "small.gguf"], "other")
    contents = {
        f"{TOKENS}/source.json": '{"identity": "hub corpus"}', f"{TOKENS}/tokenizer/shard-00000.jsonl": "",
        "compiled/decode_step-avx2-01.library": "a", "compiled/decode_step-avx2-01.sha256": "b",
        "compiled/notes.txt": "somebody's", "chat_history": "typed", "bench/0123456789abcdef.F16.gguf": "c",
        ".making-left/lock": "", "letter.txt": "somebody's", "photos-2024/cat.png": "somebody's",
    }  # fmt: skip
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root, model.name, copy.name, other.name


def listed(*flags):
    return {entry["name"]: entry for entry in json.loads(printed(main, "list", "--json", *flags))}


def test_everything_of_ours_is_listed_with_size_and_source(cache, tmp_path):
    root, model, copy, other = cache
    found = listed()
    assert {name: entry["kind"] for name, entry in found.items()} == {
        model: "model", other: "model", copy: "copy", "tokens/corpus-01234567": "tokens",
        "compiled": "compiled", "bench": "bench", "chat_history": "history", ".making-left": "unfinished",
    }  # fmt: skip
    assert found[model]["source"] == str(tmp_path / "small.gguf") and found[copy]["parent"] == model
    assert found["tokens/corpus-01234567"]["source"] == "hub corpus"
    assert found[model]["size"] == sum(path.stat().st_size for path in (root / model).iterdir())
    assert list(listed("--kind", "model")) == [model, other]
    assert listed("--older-than", "1") == {}
    old = time.time() - 3 * 86400
    for path in ((root / "chat_history"), (root / "letter.txt")):
        os.utime(path, (old, old))
    assert list(listed("--older-than", "2.5")) == ["chat_history"]
    lines = printed(main).splitlines()
    assert any(
        line.endswith(f"{model} (0.0 MB with its copies; from {tmp_path / 'small.gguf'})") for line in lines
    )
    (tmp_path / "small.gguf").unlink()
    assert ", which is gone)" in printed(main)


@pytest.mark.parametrize("damage", ["cut", "file", "manifest", "name"])
def test_damaged_entries_are_listed_as_such(cache, damage):
    root, model, _, other = cache
    entry = root / model
    if damage == "cut":
        os.truncate(entry / WEIGHTS, 100)
    elif damage == "file":
        (entry / WEIGHTS).unlink()
    elif damage == "manifest":
        (entry / "manifest.json").write_bytes(b"\xff{")
    else:
        (entry / "manifest.json").write_bytes((root / other / "manifest.json").read_bytes())
    found = listed()
    assert (found[model]["state"], found[other]["state"]) == ("damaged", "")
    printed(main, "clear", model, "--yes")
    assert not entry.exists()


def test_a_model_is_cleared_with_its_copies_and_what_is_used_later_is_made_anew(cache, tmp_path):
    root, model, copy, other = cache
    assert printed(main, "clear", "small-*", "--yes").splitlines()[-1].startswith("removed 2, ")
    assert not (root / model).exists() and not (root / copy).exists() and (root / other).is_dir()
    assert fill([tmp_path / "small.gguf"], "small").name == model


def test_all_is_all_of_ours_and_nothing_else(cache):
    root, *_ = cache
    printed(main, "clear", "--all", "--yes")
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert left == ["compiled/notes.txt", "letter.txt", "photos-2024/cat.png"]
    assert not (root / "tokens").exists() or not any((root / "tokens").iterdir())
    assert printed(main, "clear", "--all") == f"{root}: nothing to clear\n"


def test_a_link_is_removed_and_not_what_it_leads_to(cache, tmp_path):
    root, model, *_ = cache
    for name in ("tokens", model):
        (root / name).rename(tmp_path / f"far {name}")
        (root / name).symlink_to(tmp_path / f"far {name}")
    (root / "bench" / "litgpt-venv").symlink_to(tmp_path)
    found = listed()
    assert found["tokens"]["state"] == found[model]["state"] == found["bench"]["state"] == "link"
    printed(main, "clear", "--all", "--yes")
    assert not (root / "tokens").is_symlink() and not (root / model).is_symlink()
    assert (tmp_path / "far tokens" / TOKENS.partition("/")[2] / "source.json").is_file()
    assert (tmp_path / f"far {model}" / WEIGHTS).is_file() and (tmp_path / "small.gguf").is_file()


def test_what_a_running_process_writes_is_left(cache, capsys):
    root, *_ = cache
    shard, making = root / TOKENS / "tokenizer" / "shard-00000.jsonl", root / ".making-left" / LOCK
    with shard.open("a") as first, making.open("a") as second:
        for file in (first, second):
            fcntl.flock(file, fcntl.LOCK_EX)
        assert {name for name, entry in listed().items() if entry["state"] == "in use"} == {
            "tokens/corpus-01234567", ".making-left"
        }  # fmt: skip
        printed(main, "clear", "--kind", "tokens", "--yes", code=1)
        printed(main, "clear", "--kind", "unfinished", "--yes", code=1)
    assert shard.exists() and making.exists()
    assert "tokens/corpus-01234567: left, a running process writes it" in capsys.readouterr().err
    printed(main, "clear", "--kind", "unfinished", "--yes")
    assert not making.exists() and shard.exists()


def test_nothing_is_removed_without_a_yes(cache, monkeypatch):
    root, *_ = cache
    with pytest.raises(
        UsageError, match="asks before it removes anything; answer on a terminal, or add --yes"
    ):
        main(["clear", "--all"])

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for answer in ("", "n\n", "yes, maybe\n"):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        with pytest.raises(UsageError, match="clear: nothing was removed"):
            main(["clear", "--all"])
    assert len(listed()) == 8
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    printed(main, "clear", "--kind", "history")
    assert not (root / "chat_history").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["clear"], "clear: expected names, --kind or --older-than, or --all alone"),
        (["clear", "--all", "--kind", "model"], "or --all alone"),
        (["clear", "../letter.txt"], "nothing in the cache is called '../letter.txt'; .* list` shows them"),
        (["clear", "letter.txt"], "nothing in the cache is called 'letter.txt'"),
        (["list", "--yes"], "--yes: does not belong to list"),
        (["list", "--kind", "photos"], "argument --kind: invalid choice: 'photos'"),
    ],
)
def test_wrong_usage_is_one_line(cache, flags, message):
    with pytest.raises(UsageError, match=message):
        main(flags)


def test_a_folder_that_is_absent_is_empty_and_one_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "absent"))
    assert printed(main) == f"{tmp_path / 'absent'}: nothing is there\n"
    assert printed(main, "clear", "--all") == f"{tmp_path / 'absent'}: nothing to clear\n"
    assert not (tmp_path / "absent").exists()

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "absent").mkdir()
    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(LoadError, match="absent: cannot be read .Permission denied."):
        main([])
