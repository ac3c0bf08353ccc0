"""Seeded damage to everything in the cache is found and healed: the model equals that of an untouched cache.
A damaged library of the compiled step is left alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from mutations import mutate, mutate_json
from test_engine_compiled import write_library
from test_tokenizer_files import tokenizer_metadata

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.engine import native
from smollm2.engine.eager import Engine
from smollm2.engine.quantized import quantized_layers
from smollm2.engine.select import select_engine
from smollm2.pretrained.cache import MANIFEST
from smollm2.pretrained.load import load_model, load_tokenizer
from smollm2.pretrained.tokenizer import train_tokenizer

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs the package gguf: pip install gguf"
)


def used(source: Path) -> list[torch.Tensor | str]:
    """All that a start takes from the cache: weights, quantised weights, configuration, tokenizer."""
    model = load_model(source, "torch", dtype="bf16")
    layers, head = quantized_layers(model, "int8")
    matrices = [*head, *(tensor for layer in layers for weight in layer[1:3] for tensor in weight)]
    return [*model.parameters(), *matrices, str(model.config), str(load_tokenizer(source).encode("a cat"))]


def same(ours: list[torch.Tensor | str], expected: list[torch.Tensor | str]) -> bool:
    return len(ours) == len(expected) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(ours, expected, strict=True)
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A GGUF file with a tokenizer, and a cache that is filled with what is made of it."""
    import gguf_files

    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLLM2_CACHE", str(folder / "cache"))
        tokenizer = train_tokenizer(["a cat sat"] * 9, gguf_files.CONFIG.vocab_size)
        metadata = tokenizer_metadata(tokenizer)
        gguf_files.write_gguf(folder / "model.gguf", kind="Q8_0", metadata=metadata)
        yield folder / "model.gguf"


def rewrite(path: Path, content: bytes) -> None:
    """In a file of its own, as what is mapped must not change; with the time that it had before."""
    status = path.stat()
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def bytes_changed(path: Path, random: Random) -> None:
    rewrite(path, mutate(path.read_bytes(), random))


def json_changed(path: Path, random: Random) -> None:
    path = random.choice([*path.parent.glob("*.json")])
    before = json.loads(path.read_bytes())
    after = mutate_json(before, random)
    if json.dumps(after) != json.dumps(before):
        rewrite(path, json.dumps(after).encode())
    else:
        path.unlink()


def deleted(path: Path, random: Random) -> None:
    path.unlink()


def swapped(path: Path, random: Random) -> None:
    other = random.choice([file for file in path.parent.parent.glob("*/*") if file != path])
    mine, theirs = path.read_bytes(), other.read_bytes()
    rewrite(path, theirs if theirs != mine else b"")
    rewrite(other, mine)


def entry_swapped(path: Path, random: Random) -> None:
    other = random.choice([entry for entry in path.parent.parent.iterdir() if entry != path.parent])
    shutil.rmtree(path.parent)
    shutil.copytree(other, path.parent)


KINDS: tuple[Callable[[Path, Random], None], ...] = (
    bytes_changed, bytes_changed, json_changed, deleted, swapped, entry_swapped,
)  # fmt: skip


@needs_gguf
@pytest.mark.slow
def test_damage_to_what_was_converted_and_quantised_is_healed(source, caplog):
    expected = used(source)
    cache = source.parent / "cache"
    names = sorted(path.relative_to(cache) for path in cache.glob("*/*"))
    assert {path.name for path in names} >= {"model.safetensors", "tokenizer.json", "config.json", MANIFEST}
    for seed in range(48):
        random = Random(seed)
        KINDS[seed % len(KINDS)](cache / random.choice(names), random)
        caplog.clear()
        assert same(used(source), expected), seed
        assert "is damaged: made anew" in caplog.text, seed
        names = sorted(path.relative_to(cache) for path in cache.glob("*/*"))


def test_damaged_libraries_are_never_loaded(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_installed", lambda: tmp_path / "not installed")
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), "torch")
    path = native._in_cache()
    path.parent.mkdir()
    for seed in range(60):
        random = Random(seed)
        write_library(path, random.randbytes(5000))
        bytes_changed(path if seed % 2 else path.with_suffix(".sha256"), random)
        caplog.clear()
        assert type(select_engine(model)) is Engine
        assert len(caplog.records) == 1 and str(path) in caplog.text, seed
