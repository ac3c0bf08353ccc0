"""A broken or foreign GGUF file gives one LoadError that names the file and what is wrong with it."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

import gguf_files  # noqa: E402

from smollm2.errors import LoadError  # noqa: E402
from smollm2.pretrained.gguf import open_gguf  # noqa: E402


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tokens = [f"token{i}" for i in range(300)]
    gguf_files.write_gguf(path, metadata={"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.model": "gpt2"})
    return path.read_bytes()


@pytest.fixture
def model(tmp_path):
    """Writes a model with something changed and reads it."""

    def read(**changes: Any) -> Any:
        gguf_files.write_gguf(tmp_path / "model.gguf", **changes)
        file = open_gguf(tmp_path / "model.gguf")
        return file.config, file.tensors()

    return read


@pytest.mark.parametrize("kept", [0, 3, 4, 7, 12, 23, 24, 60, 200, 1000, 5000, 9000, 10000, 0.3, 0.9, -1])
def test_a_file_cut_short_is_reported_as_truncated(tmp_path, intact, kept):
    length = int(kept * len(intact)) if isinstance(kept, float) else kept % len(intact)
    path = tmp_path / "cut.gguf"
    path.write_bytes(intact[:length])
    with pytest.raises(LoadError, match=r"cut\.gguf: (not a GGUF file|truncated or corrupt)") as caught:
        open_gguf(path).tensors()
    assert "\n" not in str(caught.value)


def test_flipped_bits_in_the_header_never_hang_or_crash(tmp_path, intact):
    """Counts and lengths are where a reader runs on for ever: every high byte of the first 24 and some later
    ones.
    """
    outcomes = set()
    for position in (*range(4, 24), *range(24, 9000, 331)):
        damaged = bytearray(intact)
        damaged[position] ^= 0xFF
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        try:
            file = open_gguf(path)
            file.tensors()
            file.tokenizer()
            outcomes.add("read")
        except LoadError as error:
            assert str(path) in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_what_is_no_gguf_file(tmp_path):
    (tmp_path / "text.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(LoadError, match=r"not a GGUF file: expected it to begin with b'GGUF', got b'vers'"):
        open_gguf(tmp_path / "text.gguf")
    with pytest.raises(LoadError, match="no such file"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(LoadError, match="not readable"):
        open_gguf(tmp_path)


def test_another_architecture_is_refused(model):
    with pytest.raises(LoadError, match="expected general.architecture 'llama' .*, got 'gpt2'"):
        model(architecture="gpt2")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, "metadata llama.block_count missing"),
        ({"llama.block_count": "thirty"}, "llama.block_count must be of type int, got 'thirty'"),
        ({"llama.block_count": 3}, r"tensors missing: blk\.2\.attn_norm\.weight.*and 5 more"),
        ({"llama.block_count": 1}, r"tensors that SmolLM2 does not have: blk\.1\."),
        ({"llama.attention.head_count": 3}, "must be a multiple of"),
        ({"llama.attention.head_count": 0}, "must be a positive integer"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        (
            {"llama.rope.dimension_count": 32},
            r"expected rotary embeddings over the whole head \(64\), got 32",
        ),
        (
            {"llama.attention.head_count_kv": 1},
            r"k_proj.weight: expected shape \[64, 256\], got \[128, 256\]",
        ),
    ],
)
def test_metadata_that_do_not_describe_a_smollm2(model, metadata, message):
    with pytest.raises(LoadError, match=message):
        model(metadata=metadata)


def test_missing_and_unexpected_tensors_are_named(model):
    with pytest.raises(
        LoadError, match=re.escape("tensors missing: blk.1.ffn_up.weight; the file is incomplete")
    ):
        model(drop=["blk.1.ffn_up.weight"])
    with pytest.raises(LoadError, match=re.escape("tensor token_embd.weight missing")):
        model(drop=["token_embd.weight"])
    with pytest.raises(LoadError, match=re.escape("tensors that SmolLM2 does not have: blk.0.attn_q.bias")):
        model(extra={"blk.0.attn_q.bias": np.zeros(256, np.float32)})


def test_a_type_that_cannot_be_dequantised_is_named(model):
    integers = np.zeros((256, 512), np.int32)
    with pytest.raises(LoadError, match=r"blk\.1\.ffn_down\.weight is of type I32, .* use a file in F32"):
        model(drop=["blk.1.ffn_down.weight"], extra={"blk.1.ffn_down.weight": integers})


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    kinds = [1, 1, 3]
    gguf_files.write_gguf(
        tmp_path / "model.gguf",
        metadata={
            "tokenizer.ggml.tokens": ["a", "b"],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.model": "gpt2",
        },
    )
    with pytest.raises(LoadError, match="must be an id below 2, got 2"):
        open_gguf(tmp_path / "model.gguf").tokenizer()
    gguf_files.write_gguf(tmp_path / "none.gguf")
    with pytest.raises(LoadError, match="metadata tokenizer.ggml.tokens missing"):
        open_gguf(tmp_path / "none.gguf").tokenizer()


def test_without_the_gguf_package_the_message_names_it(tmp_path, monkeypatch):
    gguf_files.write_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LoadError, match="pip install gguf"):
        open_gguf(tmp_path / "model.gguf")


def test_the_test_files_are_sound(tmp_path):
    """The changes above are refused because of the change: unchanged, the same writer gives a file that
    reads.
    """
    gguf_files.write_gguf(tmp_path / "model.gguf")
    assert all(
        torch.isfinite(tensor).all() for tensor in open_gguf(tmp_path / "model.gguf").tensors().values()
    )
