"""What smollm2/pretrained/gguf.py reads equals what an independent decoder finds in the same bytes, in every
supported type.
"""

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
        torch.testing.assert_close(
            gguf_files.interleave_rows(tensors[name], heads).double(), stored, rtol=3e-7, atol=1e-7
        )


def test_unquantised_weights_come_back_bit_for_bit(tmp_path):
    weights = gguf_files.random_weights()
    gguf_files.write_gguf(tmp_path / "model.gguf", weights)
    tensors = open_gguf(tmp_path / "model.gguf").tensors()
    for name, weight in weights.items():
        assert torch.equal(tensors[name], weight), name


def test_rotate_half_on_our_rows_gives_the_scores_of_interleaved_rotation_on_the_stored_rows(tmp_path):
    """The reason for the permutation: attention scores are the same under either convention."""
    raw = gguf_files.write_gguf(tmp_path / "model.gguf")
    tensors = open_gguf(tmp_path / "model.gguf").tensors()
    x = torch.randn(2, 256, dtype=torch.float64)
    angles = [
        torch.tensor([position * 100000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
        for position in (3, 11)
    ]

    def rotate_halves(head: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        first, second = head[:32], head[32:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
        )

    def rotate_pairs(head: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        rotated = torch.view_as_complex(head.view(32, 2)) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(rotated).flatten()

    for head in range(4):
        query, key = slice(64 * head, 64 * head + 64), slice(64 * (head // 2), 64 * (head // 2) + 64)
        ours = rotate_halves(tensors[QUERY][query].double() @ x[0], angles[0]) @ rotate_halves(
            tensors[KEY][key].double() @ x[1], angles[1]
        )
        stored_query, stored_key = (
            torch.from_numpy(raw[f"blk.1.attn_{name}.weight"]).double() for name in "qk"
        )
        theirs = rotate_pairs(stored_query[query] @ x[0], angles[0]) @ rotate_pairs(
            stored_key[key] @ x[1], angles[1]
        )
        assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-9)


def test_a_bf16_file_stays_bf16_only_when_the_norms_lose_nothing(tmp_path):
    weights = gguf_files.random_weights()
    gguf_files.write_gguf(tmp_path / "fp32_norms.gguf", weights, "BF16")
    assert {tensor.dtype for tensor in open_gguf(tmp_path / "fp32_norms.gguf").tensors().values()} == {
        torch.float32
    }
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
    absent = (
        "llama.rope.freq_base",
        "llama.rope.dimension_count",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.padding_token_id",
    )
    config = gguf_files.CONFIG.replace(num_key_value_heads=4)
    metadata = {**dict.fromkeys(absent), "llama.attention.head_count_kv": None, "llama.vocab_size": 999}
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
    with pytest.raises(
        RuntimeError, match=r"output.weight differs from token_embd.weight; SmolLM2's head is tied"
    ):
        open_gguf(tmp_path / "untied.gguf").tensors()
