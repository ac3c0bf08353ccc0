"""What smollm2/pretrained/gguf.py reads is what an independent decoder and transformers find in the bytes."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

import gguf_files  # noqa: E402

from smollm2.pretrained.gguf import open_gguf  # noqa: E402

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
DOWN, QUERY, KEY = (
    f"model.layers.1.{name}.weight" for name in ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj")
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_dequantised_as_ggml_defines_it(tmp_path, kind):
    raw = gguf_files.write_gguf(tmp_path / "model.gguf", kind=kind)
    tensors = open_gguf(tmp_path / "model.gguf").tensors()
    assert set(tensors) == set(gguf_files.random_weights())
    expected = gguf_files.decode(raw["blk.1.ffn_down.weight"], kind)
    assert tensors[DOWN].shape == (256, 512)
    # Two roundings at most separate fp32 arithmetic from the double precision of the independent decoder.
    torch.testing.assert_close(tensors[DOWN].double(), expected, rtol=3e-7, atol=1e-7)
    for name, ours, heads in ((QUERY, "attn_q", 4), (KEY, "attn_k", 2)):
        stored = gguf_files.decode(raw[f"blk.1.{ours}.weight"], kind)
        found = gguf_files.interleave_rows(tensors[name], heads).double()
        torch.testing.assert_close(found, stored, rtol=3e-7, atol=1e-7)


def test_unquantised_weights_come_back_bit_for_bit(tmp_path):
    weights = gguf_files.random_weights()
    gguf_files.write_gguf(tmp_path / "model.gguf", weights)
    tensors = open_gguf(tmp_path / "model.gguf").tensors()
    for name, weight in weights.items():
        assert torch.equal(tensors[name], weight), name


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0"])
def test_weights_are_those_that_transformers_reads(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    pytest.importorskip("accelerate", reason="transformers' GGUF reader needs accelerate")
    metadata = {"llama.vocab_size": 300, "tokenizer.ggml.tokens": [f"token{index}" for index in range(300)]}
    gguf_files.write_gguf(tmp_path / "model.gguf", kind=kind, metadata=metadata)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for name, tensor in open_gguf(tmp_path / "model.gguf").tensors().items():
        assert torch.equal(tensor, theirs[name]), name


def test_our_rows_rotated_by_halves_score_as_the_stored_rows_rotated_by_pairs(tmp_path):
    """The reason for the permutation: attention scores are the same under either convention."""
    raw = gguf_files.write_gguf(tmp_path / "model.gguf")
    tensors = open_gguf(tmp_path / "model.gguf").tensors()
    x = torch.randn(2, 256, dtype=torch.float64)
    frequencies = 100000.0 ** (-2 * torch.arange(32, dtype=torch.float64) / 64)
    turns = [torch.polar(torch.ones_like(frequencies), place * frequencies) for place in (3, 11)]

    def rotated(head: torch.Tensor, turn: torch.Tensor, halves: bool) -> torch.Tensor:
        pairs = torch.complex(*head.view(2, 32)) if halves else torch.view_as_complex(head.view(32, 2))
        return torch.view_as_real(pairs * turn)

    stored = [torch.from_numpy(raw[f"blk.1.attn_{name}.weight"]).double() for name in "qk"]
    ours = [tensors[name].double() for name in (QUERY, KEY)]
    for head in range(4):
        rows = slice(64 * head, 64 * head + 64), slice(64 * (head // 2), 64 * (head // 2) + 64)
        scores = []
        for weights, halves in ((ours, True), (stored, False)):
            q, k = (rotated(weights[i][rows[i]] @ x[i], turns[i], halves) for i in range(2))
            scores.append((q * k).sum().item())
        assert math.isclose(*scores, rel_tol=1e-9)


def test_a_bf16_file_stays_bf16_only_when_the_norms_lose_nothing(tmp_path):
    weights = gguf_files.random_weights()
    gguf_files.write_gguf(tmp_path / "fp32_norms.gguf", weights, "BF16")
    tensors = open_gguf(tmp_path / "fp32_norms.gguf").tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    rounded = {name: weight.bfloat16().float() for name, weight in weights.items()}
    gguf_files.write_gguf(tmp_path / "bf16.gguf", rounded, "BF16")
    tensors = open_gguf(tmp_path / "bf16.gguf").tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.equal(tensors[name].float(), weight) for name, weight in rounded.items())


def test_configuration_is_read_from_the_metadata(tmp_path):
    gguf_files.write_gguf(tmp_path / "model.gguf")
    # eps = 1e-5 too, although the file holds 9.999999747e-06
    assert open_gguf(tmp_path / "model.gguf").config == gguf_files.CONFIG


def test_configuration_defaults_follow_the_format(tmp_path):
    llama, tokens = ("rope.freq_base", "rope.dimension_count", "attention.head_count_kv"), ("bos", "padding")
    absent = [f"llama.{key}" for key in llama] + [f"tokenizer.ggml.{name}_token_id" for name in tokens]
    config = gguf_files.CONFIG.replace(num_key_value_heads=4)
    metadata = {**dict.fromkeys(absent), "llama.vocab_size": 999}
    gguf_files.write_gguf(tmp_path / "model.gguf", config=config, metadata=metadata)
    read = open_gguf(tmp_path / "model.gguf").config
    assert (read.rope_theta, read.head_dim, read.num_key_value_heads) == (10000.0, 64, 4)
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (None, 2, None)
    assert read.vocab_size == 300, "the embedding's rows, whatever the metadata say"


def test_an_output_matrix_is_accepted_only_if_it_is_the_embedding(tmp_path):
    weights = gguf_files.random_weights()
    head = weights["model.embed_tokens.weight"].numpy().copy()
    gguf_files.write_gguf(tmp_path / "tied.gguf", weights, extra={"output.weight": head})
    assert "lm_head.weight" not in open_gguf(tmp_path / "tied.gguf").tensors()
    head[7, 7] += 1
    gguf_files.write_gguf(tmp_path / "untied.gguf", weights, extra={"output.weight": head})
    with pytest.raises(RuntimeError, match="output.weight differs from token_embd.weight; SmolLM2's head is"):
        open_gguf(tmp_path / "untied.gguf").tensors()
