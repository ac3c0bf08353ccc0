"""A broken or foreign GGUF file gives one LoadError that names the file and what is wrong with it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

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


def changed(folder, **changes):
    """Reads a model with something changed."""
    gguf_files.write_gguf(folder / "model.gguf", **changes)
    file = open_gguf(folder / "model.gguf")
    return file.config, file.tensors()


@pytest.mark.parametrize("kept", [0, 3, 4, 7, 12, 23, 24, 60, 200, 1000, 5000, 9000, 10000, 0.3, 0.9, -1])
def test_a_file_cut_short_is_reported_as_truncated(tmp_path, intact, kept):
    length = int(kept * len(intact)) if isinstance(kept, float) else kept % len(intact)
    path = tmp_path / "cut.gguf"
    path.write_bytes(intact[:length])
    with pytest.raises(LoadError, match=r"cut\.gguf: (not a GGUF file|truncated or corrupt)") as caught:
        open_gguf(path).tensors()
    assert "\n" not in str(caught.value)


def test_flipped_bits_in_the_header_never_hang_or_crash(tmp_path, intact):
    """Counts and lengths are where a reader runs on for ever: the first 24 bytes, and some later ones."""
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


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, ""),  # unchanged, the same writer gives a file that reads
        ({"llama.block_count": None}, "metadata llama.block_count missing"),
        ({"llama.block_count": "thirty"}, "llama.block_count must be of type int, got 'thirty'"),
        ({"llama.block_count": 3}, r"tensors missing: blk\.2\.attn_norm\.weight.*and 5 more"),
        ({"llama.block_count": 1}, r"tensors that SmolLM2 does not have: blk\.1\."),
        ({"llama.attention.head_count": 3}, "must be a multiple of"),
        ({"llama.attention.head_count": 0}, "must be a positive integer"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"llama.rope.dimension_count": 32}, r"rotary embeddings over the whole head \(64\), got 32"),
        ({"llama.attention.head_count_kv": 1}, r"k_proj.*: expected shape \[64, 256\], got \[128, 256\]"),
    ],
)
def test_metadata_that_do_not_describe_a_smollm2(tmp_path, metadata, message):
    if not message:
        assert all(tensor.isfinite().all() for tensor in changed(tmp_path)[1].values())
        return
    with pytest.raises(LoadError, match=message):
        changed(tmp_path, metadata=metadata)


DOWN = "blk.1.ffn_down.weight"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(architecture="gpt2"), "expected general.architecture 'llama' .*, got 'gpt2'"),
        (dict(drop=["blk.1.ffn_up.weight"]), "tensors missing: blk.1.ffn_up.weight; the file is incomplete"),
        (dict(drop=["token_embd.weight"]), "tensor token_embd.weight missing"),
        (dict(extra={"blk.0.attn_q.bias": np.zeros(256, np.float32)}), "does not have: blk.0.attn_q.bias"),
        (dict(drop=[DOWN], extra={DOWN: np.zeros((256, 512), np.int32)}), "of type I32, .* use a file in"),
    ],
    ids=["another architecture", "tensor missing", "embedding missing", "unexpected tensor", "integers"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, changes, message):
    with pytest.raises(LoadError, match=message):
        changed(tmp_path, **changes)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    parts = {"tokens": ["a", "b"], "token_type": [1, 1, 3], "model": "gpt2"}
    for metadata, message in (
        ({f"tokenizer.ggml.{key}": value for key, value in parts.items()}, "must be an id below 2, got 2"),
        ({}, "metadata tokenizer.ggml.tokens missing"),
    ):
        gguf_files.write_gguf(tmp_path / "model.gguf", metadata=metadata)
        with pytest.raises(LoadError, match=message):
            open_gguf(tmp_path / "model.gguf").tokenizer()


def test_without_the_gguf_package_the_message_names_it(tmp_path, monkeypatch):
    gguf_files.write_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LoadError, match="pip install gguf"):
        open_gguf(tmp_path / "model.gguf")
