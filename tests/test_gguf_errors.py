"""A broken or foreign GGUF file gives one LoadError that names the file and what is wrong with it."""

from __future__ import annotations

import os
import struct
import sys

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

import gguf  # noqa: E402
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
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path, tmp_path / "pipe.gguf"):
        with pytest.raises(LoadError, match=r"not readable \(it is a folder, a pipe or a device\)"):
            open_gguf(path)


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
        ({"llama.rope.scaling.type": "linear"}, "rope scaling 'linear' is not supported"),
        ({"llama.rope.scaling.factor": 4.0}, r"llama\.rope\.scaling\.factor must be 0 or 1 .*, got 4.0"),
        ({"llama.rope.scale_linear": 2.0}, r"llama\.rope\.scale_linear must be 0 or 1"),
        ({"llama.rope.scaling.yarn_beta_fast": 32.0}, "yarn_beta_fast must be absent"),
        ({"llama.attention.scale": 0.5}, r"llama\.attention\.scale must be 0 for SmolLM2, got 0.5"),
        ({"llama.attention.value_length": 32}, "value_length must be 64"),
        ({"llama.attention.sliding_window": 64}, "sliding_window must be 0"),
        ({"llama.attention.causal": 0}, "causal must be True"),
        ({"llama.logit_scale": 8.0}, "logit_scale must be 0 or 1"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping must be 0"),
        ({"llama.expert_count": 8}, "expert_count must be 0"),
        ({"split.count": 2}, "split.count must be 0 or 1"),
        (
            {"llama.block_count": 200_000},
            "llama.block_count is 200000, but the file has no more than 20 tens",
        ),
        ({"llama.block_count": 5_000_000}, "num_hidden_layers must be at most 262144, got 5000000"),
        ({"llama.context_length": 2**32 - 1}, "max_position_embeddings must be at most 2147483647"),
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


def test_metadata_that_change_nothing_are_accepted(tmp_path):
    metadata = {
        "rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.scale_linear": 0.0,
        "attention.scale": 0.125, "attention.sliding_window": 4096, "attention.value_length": 64,
        "expert_count": 0, "logit_scale": 1.0, "rope.scaling.original_context_length": 2048,
    }  # fmt: skip
    found = changed(tmp_path, metadata={f"llama.{key}": value for key, value in metadata.items()})
    assert found[0] == gguf_files.CONFIG


@pytest.mark.parametrize(
    ("limit", "what"), [("FIELDS_LIMIT", "fields"), ("ENTRIES_LIMIT", "entries of arrays")]
)
def test_more_than_any_model_has_is_not_read(tmp_path, intact, monkeypatch, limit, what):
    (tmp_path / "model.gguf").write_bytes(intact)
    monkeypatch.setattr(f"smollm2.pretrained.gguf.{limit}", 100)
    with pytest.raises(LoadError, match=f"its header claims more than 100 {what}"):
        open_gguf(tmp_path / "model.gguf")


def test_arrays_in_arrays_are_refused(tmp_path):
    nested = struct.pack("<IQ", 9, 1) * 5000  # type 9 is an array
    header = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 9)
    (tmp_path / "model.gguf").write_bytes(header + nested)
    with pytest.raises(LoadError, match=r"corrupt GGUF file \(an array of arrays\)"):
        open_gguf(tmp_path / "model.gguf")


def test_arrays_are_read_as_the_package_reads_them(tmp_path):
    metadata = {"some.words": ["", "é", "x" * 300], "some.numbers": [1, -2], "some.floats": [0.5, 1e9]}
    gguf_files.write_gguf(tmp_path / "model.gguf", metadata=metadata)
    ours, theirs = open_gguf(tmp_path / "model.gguf")._reader, gguf.GGUFReader(tmp_path / "model.gguf")
    for name, value in metadata.items():
        assert ours.get_field(name).contents() == theirs.get_field(name).contents() == value


def test_tensors_lie_one_after_the_other_and_fill_the_file(tmp_path, intact):
    name = b"output_norm.weight"
    at = intact.index(name) + len(name) + 4 + 8 + 4  # after the number of dimensions, the one, and the type
    path = tmp_path / "model.gguf"
    path.write_bytes(intact[:at] + bytes(8) + intact[at + 8 :])
    with pytest.raises(LoadError, match=r"corrupt GGUF file \(output_norm.weight begins at byte \d+, not at"):
        open_gguf(path)
    path.write_bytes(intact + bytes(100))
    with pytest.raises(LoadError, match=r"corrupt GGUF file \(its last tensor ends at byte \d+, the file at"):
        open_gguf(path)


def test_numbers_that_are_none_are_refused(tmp_path):
    weights = gguf_files.random_weights()
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    with pytest.raises(LoadError, match=r"1 tensors hold NaN or inf: model\.layers\.1\.mlp\.up_proj\.weight"):
        changed(tmp_path, weights=weights)


DOWN = "blk.1.ffn_down.weight"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(architecture="gpt2"), "expected general.architecture 'llama' .*, got 'gpt2'"),
        (dict(drop=["blk.1.ffn_up.weight"]), "tensors missing: blk.1.ffn_up.weight; the file is incomplete"),
        (dict(drop=["token_embd.weight"]), "tensor token_embd.weight missing"),
        (dict(extra={"blk.0.attn_q.bias": np.zeros(256, np.float32)}), "does not have: blk.0.attn_q.bias"),
        (dict(extra={"rope_freqs.weight": np.ones(32, np.float32)}), "does not have: rope_freqs.weight"),
        (
            dict(drop=[DOWN], extra={DOWN: np.zeros((512, 256), np.float32)}),
            r"down_proj.weight: expected shape \[256, 512\], got \[512, 256\]",
        ),
        (dict(drop=[DOWN], extra={DOWN: np.zeros((256, 512), np.int32)}), "of type I32, .* use a file in"),
    ],
    ids=[
        "another architecture",
        "tensor missing",
        "embedding missing",
        "unexpected tensor",
        "rope scaling",
        "shape",
        "integers",
    ],
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
