"""Model files with seeded damage: each is refused by name, or read as if nothing had happened.

What a file says once has no second witness. So an accepted config.json may say something else if transformers
reads it alike; an accepted tokenizer.json is what the `tokenizers` library makes of it; and in a GGUF file
the numbers that no tensor confirms (such as rms_norm_eps) and the strings of tokens are not compared. Weights
carry no checksum in either format, so that the damage is in the headers, not in the data.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from mutations import mutate, mutate_json
from safetensors.torch import load_file, save_file
from test_tokenizer_files import TEXTS, tokenizer_metadata

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.gguf import open_gguf
from smollm2.pretrained.load import load_model, save_model
from smollm2.pretrained.tokenizer import (
    Tokenizer,
    tokenizer_from_folder,
    tokenizer_from_gguf,
    train_tokenizer,
)

IDS = torch.arange(40).view(2, 20)
SECONDS = 60  # the slowest case takes 0.2 s here
MEGABYTES = 500
# Fields of a GGUF file that no tensor and no other field confirms.
SAID_ONCE = (
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip


def outcome(read: Callable[[], Any]) -> Any:
    """What is read, or None if it is refused in one line, in bounded time and memory."""
    begun, before = time.monotonic(), peak_megabytes()
    try:
        result = read()
    except (LoadError, UsageError) as error:
        one_line = "\n" not in str(error) and len(str(error)) < 1000
        assert one_line, str(error)[:500]
        result = None
    assert time.monotonic() - begun < SECONDS
    assert peak_megabytes() - before < MEGABYTES
    return result


def peak_megabytes() -> float:
    if sys.platform != "linux":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def damaged_bytes(content: bytes, seed: int, header: int | None = None) -> bytes:
    """One change in the bytes before `header`."""
    return mutate(content[:header], random.Random(seed)) + (b"" if header is None else content[header:])


def damaged_json(path: Path, seed: int) -> bytes:
    """One change of a value in three cases of four, else of the bytes."""
    if seed % 4 == 0:
        return damaged_bytes(path.read_bytes(), seed)
    value = mutate_json(json.loads(path.read_text()), random.Random(seed))
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS * 10, 300)


@pytest.fixture(scope="module")
def model() -> SmolLM2ForCausalLM:
    torch.manual_seed(0)
    return SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), "torch").eval()


@pytest.fixture
def folder(model, trained, tmp_path):
    save_model(model, tmp_path)
    trained.save(tmp_path)
    return tmp_path


@pytest.fixture
def shards(folder):
    """The same folder, its weights in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for file, members in names.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file in names for name in names[file]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("seed", range(28))
def test_config_json(model, folder, seed):
    path = folder / "config.json"
    path.write_bytes(damaged_json(path, seed))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return load_model(folder, "torch")(IDS).logits

    found = outcome(logits)
    with torch.no_grad():
        if found is None or torch.equal(found, model(IDS).logits):
            return
        transformers = pytest.importorskip("transformers", reason="needs transformers to say what is right")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(found, theirs(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(28))
def test_the_header_of_a_safetensors_file(model, folder, seed):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(damaged_bytes(content, seed, 8 + int.from_bytes(content[:8], "little")))
    loaded = outcome(lambda: load_model(folder, "torch"))
    assert loaded is None or same_weights(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("seed", range(20))
def test_an_index_of_shards(model, shards, seed):
    path = shards / "model.safetensors.index.json"
    path.write_bytes(damaged_json(path, seed))
    loaded = outcome(lambda: load_model(shards, "torch"))
    assert loaded is None or same_weights(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("seed", range(24))
def test_tokenizer_json(folder, seed):
    path = folder / "tokenizer.json"
    path.write_bytes(damaged_json(path, seed))
    loaded = outcome(lambda: tokenizer_from_folder(folder))
    if loaded is not None:
        theirs = tokenizers.Tokenizer.from_file(str(path))
        theirs.no_truncation()
        theirs.no_padding()
        for text in TEXTS:
            assert loaded.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def gguf_file(trained, tmp_path_factory):
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    import gguf_files

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    config = gguf_files.CONFIG.replace(hidden_size=32, intermediate_size=64, head_dim=8, num_hidden_layers=2)
    weights = gguf_files.random_weights(config)
    gguf_files.write_gguf(path, weights, config=config, metadata=tokenizer_metadata(trained))
    return path, open_gguf(path)


@pytest.mark.parametrize("seed", range(40))
def test_the_header_of_a_gguf_file(gguf_file, tmp_path, seed):
    path, intact = gguf_file
    damaged = tmp_path / "damaged.gguf"
    # half of the cases in the first bytes and the last: the counts, and the shapes and offsets of tensors
    content, header = path.read_bytes(), int(intact._reader.data_offset)
    start = (0, header - 1200)[seed % 2] if seed % 4 < 2 else 0
    end = start + 1200 if seed % 4 < 2 else header
    damaged.write_bytes(content[:start] + damaged_bytes(content[start:], seed, end - start))

    def read() -> tuple[SmolLM2Config, dict[str, torch.Tensor]]:
        file = open_gguf(damaged)
        return file.config, file.tensors()

    found = outcome(read)
    if found is not None:
        config, tensors = found
        changes = {name: getattr(intact.config, name) for name in SAID_ONCE}
        assert dataclasses.replace(config, **changes) == intact.config
        assert same_weights(tensors, intact.tensors())
        outcome(lambda: tokenizer_from_gguf(open_gguf(damaged)).encode_batch(TEXTS))
