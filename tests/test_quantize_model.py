"""A whole model quantised: every matrix, cached per source, made anew when the weights change."""

from __future__ import annotations

import os

import pytest
import torch

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.engine import quantized
from smollm2.engine.eager_step import MATRICES
from smollm2.engine.quantized import Int4Weight, Int8Weight, dequantize, quantized_layers
from smollm2.errors import UsageError
from smollm2.pretrained.load import load_model, save_model

CONFIG = SmolLM2Config.preset("tiny")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "cache"))
    save_model(SmolLM2ForCausalLM(CONFIG, backend="torch"), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def no_more_work(folder, monkeypatch):
    """Quantises both kinds, and then forbids that it is done again."""
    for kind in quantized.KINDS:
        quantized_layers(load_model(folder, "torch", dtype="bf16"), kind)

    def refuse(*args: object) -> None:
        raise AssertionError("quantised again")

    monkeypatch.setattr(quantized, "quantize_all", refuse)


@pytest.mark.parametrize(("kind", "cls"), [("int8", Int8Weight), ("int4", Int4Weight)])
def test_each_matrix_is_quantised_and_the_norms_are_not(kind, cls, folder):
    model = load_model(folder, "torch", dtype="bf16")
    layers, head = quantized_layers(model, kind)
    assert len(layers) == CONFIG.num_hidden_layers and isinstance(head, Int8Weight)
    step = 1 / 127 if kind == "int8" else 2 / 15  # of the largest weight
    for plain, layer in zip(model.pack(), layers, strict=True):
        assert torch.equal(layer.input_norm, plain.input_norm)
        assert torch.equal(layer.post_norm, plain.post_norm)
        for matrix in MATRICES:
            weight, quantised = getattr(plain, matrix), getattr(layer, matrix)
            assert isinstance(quantised, cls)
            error = (dequantize(quantised).float() - weight.float()).abs().max()
            # scale, zero and the result are bfloat16
            assert 0 < error <= (step / 2 + 3 * 2**-9) * weight.float().abs().max()


@pytest.mark.usefixtures("no_more_work")
def test_a_second_start_maps_what_the_first_one_made(folder, tmp_path):
    for kind in quantized.KINDS:
        model = load_model(folder, "torch", dtype="bf16")
        layers, head = quantized_layers(model, kind)
        (entry,) = (tmp_path / "cache").glob(f"{kind}-*")
        tensors = [*head, *layers[0].qkv, *layers[1].down]
        size = (entry / "model.safetensors").stat().st_size
        assert {tensor.untyped_storage().nbytes() for tensor in tensors} == {size}
        assert torch.equal(head[0], quantized.quantize_rows(model.lm_head.weight.detach())[0])


@pytest.mark.usefixtures("no_more_work")
def test_another_dtype_a_changed_model_and_a_changed_file_are_quantised_again(folder):
    with pytest.raises(AssertionError, match="quantised again"):
        quantized_layers(load_model(folder, "torch", dtype="fp32"))
    trained = load_model(folder, "torch", dtype="bf16")
    with torch.no_grad():
        trained.model.layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.raises(AssertionError, match="quantised again"):
        quantized_layers(trained)
    path = folder / "model.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(AssertionError, match="quantised again"):
        quantized_layers(load_model(folder, "torch", dtype="bf16"))


def test_a_changed_source_replaces_its_entry(folder, tmp_path):
    quantized_layers(load_model(folder, "torch"))
    (before,) = (tmp_path / "cache").iterdir()
    save_model(SmolLM2ForCausalLM(CONFIG, backend="torch"), folder)
    model = load_model(folder, "torch")
    _, head = quantized_layers(model)
    (after,) = (tmp_path / "cache").iterdir()
    assert after != before
    assert torch.equal(head[0], quantized.quantize_rows(model.lm_head.weight.detach())[0])


def test_a_model_from_nowhere_is_quantised_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "cache"))
    quantized_layers(SmolLM2ForCausalLM(CONFIG, backend="torch"))
    assert not (tmp_path / "cache").exists()


def test_other_devices_and_unknown_kinds_are_refused():
    model = SmolLM2ForCausalLM(CONFIG, backend="torch")
    with pytest.raises(UsageError, match="quantize: expected one of none, int8, int4, got 'int2'"):
        quantized_layers(model, "int2")
    message = "quantize=int8 runs on the CPU only, the model is on meta; use quantize=none there, or device"
    with pytest.raises(UsageError, match=message):
        quantized_layers(model.to("meta"))
