"""A patched Llama computes what transformers' does: loss, logits and every gradient within the contract, with
the truth from this project's formulas in float64.
"""

import functools

import numerics
import pytest
import torch
from kernel_cases import DEVICE
from patch_cases import RELEASED, TINY, WIDE_HEADS, batch, hold, llama, results, truth_of

from smollm2.patch import apply_kernels

TORCH = functools.partial(apply_kernels, backend="torch")
TRITON = functools.partial(apply_kernels, backend="triton")
SIZES = {"heads of 32": TINY, "heads of 64": WIDE_HEADS, "SmolLM2-135M, two layers": RELEASED}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "bf16 autocast": None}
SWITCHES = ("attention", "rms_norm", "rope", "swiglu", "loss")


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", ["heads of 32", "heads of 64"])
def test_operations_for_cpus(sizes, dtype, documents):
    hold(TORCH, SIZES[sizes], documents, DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16 autocast"])
def test_operations_for_cpus_at_the_released_sizes(dtype):
    hold(TORCH, RELEASED, True, DTYPES[dtype], length=12)


@pytest.mark.parametrize(("sizes", "dtype", "documents"), [
    ("heads of 32", "fp32", False), ("heads of 32", "bf16", True), ("heads of 64", "bf16 autocast", False),
    ("SmolLM2-135M, two layers", "fp32", True),
])  # fmt: skip
def test_kernels(sizes, dtype, documents):
    layers = 2 if sizes == "SmolLM2-135M, two layers" else 1
    hold(TRITON, SIZES[sizes], documents, DTYPES[dtype], length=9, device=DEVICE, num_hidden_layers=layers)


@pytest.mark.parametrize("dtype", ["fp32", "bf16 autocast"])
@pytest.mark.parametrize("alone", SWITCHES)
def test_every_switch_alone(alone, dtype):
    one = functools.partial(TORCH, **{name: name == alone for name in SWITCHES})
    hold(one, TINY, documents=True, dtype=DTYPES[dtype])


def test_norms_in_fp32_inside_a_model_in_bf16():
    """As peft prepares a quantised model: with two dtypes the layers are transformers' own."""

    def mixed(model):
        for name, parameter in model.bfloat16().named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.float()
        return model

    plain, patched = mixed(llama()), TORCH(mixed(llama()))
    ours, expected = (results(model, *batch(), autocast=True) for model in (patched, plain))
    truth = truth_of(plain, *batch())
    for name, value in ours.items():
        numerics.check("patched Llama", name, value, expected[name], truth[name], tested=torch.bfloat16)


def test_the_rotary_tables_stay_in_fp32():
    tables = TORCH(llama().bfloat16()).model.rotary_emb(
        torch.zeros(1, 5, 64).bfloat16(), torch.arange(5)[None]
    )
    assert [(table.dtype, list(table.shape)) for table in tables] == [(torch.float32, [5, 16])] * 2


@pytest.mark.parametrize("changes", [
    {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": False},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
], ids=["biases", "untied", "scaled rotary"])  # fmt: skip
def test_what_only_transformers_has(changes):
    """Nothing of ours has it, so there is no other truth than transformers' model."""
    plain, patched = llama(**changes), TORCH(llama(**changes))
    ours, expected = results(patched, *batch()), results(plain, *batch())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
