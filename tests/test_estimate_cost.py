"""What is said before a run about its cost, against what is counted and what the models are known to have."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from train import estimate as estimates
from train.config import RunConfig
from train.estimate import ASSUMED_MFU, MATMUL_EFFICIENCY, Estimate, estimate, lines, matmul_rate

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FULL = SmolLM2Config.preset("135M")
TINY = SmolLM2Config.preset("tiny")
WIDE = SmolLM2Config.preset("135M", num_hidden_layers=3, vocab_size=2048)


@pytest.fixture
def rate_of_a_cpu(monkeypatch):
    """The rate of a matrix product, as if it had been measured."""
    monkeypatch.setattr(estimates, "matmul_rate", lambda *_: 200e9)
    return 200e9


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")


def full_recipe(**changes: object) -> RunConfig:
    config = RunConfig(model="135M", batch_size=32, sequence_length=512, steps=5000, dtype="bf16")
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def saved_bytes(model: SmolLM2Config, config: RunConfig) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one micro-batch, parameters left
    out.
    """
    network = SmolLM2ForCausalLM(
        model, "torch", compute_dtype=torch.bfloat16 if config.dtype == "bf16" else None
    )
    network.model.gradient_checkpointing = config.gradient_checkpointing
    network.train()
    shape = config.batch_size, config.sequence_length
    ids = torch.randint(0, model.vocab_size, shape)
    doc_start = torch.zeros(shape, dtype=torch.int32) if config.document_masking else None
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    found: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no address is used twice

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = network(ids, ids, doc_start, reduction="sum").loss
    assert loss is not None and loss.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("model", "rows", "length"), [(TINY, 4, 128), (WIDE, 2, 256)])
def test_activations_are_what_autograd_keeps(model, rows, length, dtype, checkpointing, masked):
    config = RunConfig(
        batch_size=rows,
        sequence_length=length,
        dtype=dtype,
        gradient_checkpointing=checkpointing,
        document_masking=masked,
        backend="torch",
    )
    memory = estimates.memory_of(config, model, CPU, rows)
    if checkpointing:  # the layer that is recomputed comes in the backward pass
        layer = estimates.layer_bytes_per_token(
            model, 2 if dtype == "bf16" else 4, triton=False, masked=masked, length=length, cuda=False
        )
        kept = memory.activations_checkpointed - rows * length * layer
    else:
        kept = memory.activations + memory.weight_copies
    assert 0.7 < kept / saved_bytes(model, config) < 1.5


@pytest.mark.parametrize(
    ("name", "millions"), [("135M", 134.515008), ("360M", 361.821120), ("1.7B", 1711.376384)]
)
def test_parameters_of_the_released_models(name, millions, rate_of_a_cpu):
    found = estimate(full_recipe(model=name), SmolLM2Config.preset(name), CPU)
    assert found.parameters == round(1e6 * millions)
    assert found.embedding + found.blocks == found.parameters
    assert (
        found.memory.parameters == found.memory.gradients == found.memory.moments // 2 == 4 * found.parameters
    )


def test_a_known_gpu_in_bf16_takes_its_peak_and_an_assumption_that_is_named(h100):
    found = estimate(full_recipe(), FULL, GPU)
    assert found.tokens == 81_920_000 and found.tokens_per_step == 16_384
    assert found.flops_per_token == pytest.approx(860e6, rel=1e-3)
    assert found.tokens_per_second == pytest.approx(989e12 * ASSUMED_MFU / 860e6, rel=1e-3)
    assert found.seconds == pytest.approx(81.92e6 * 860e6 / (989e12 * ASSUMED_MFU), rel=1e-3)
    assert f"NVIDIA H100 80GB HBM3, 989 TFLOP/s, assuming an MFU of {ASSUMED_MFU:.0%}" in found.rate_source
    assert found.backend == "triton"


def test_several_gpus_divide_the_rows_and_multiply_the_rate(h100):
    alone = estimate(full_recipe(batch_size=32), FULL, GPU)
    together = estimate(full_recipe(batch_size=32), FULL, GPU, world=4)
    assert together.tokens_per_second == pytest.approx(4 * alone.tokens_per_second)
    assert together.tokens_per_step == alone.tokens_per_step
    assert alone.micro_batch == (32, 512) and together.micro_batch == (8, 512)
    assert together.memory.activations == alone.memory.activations // 4
    accumulated = estimate(full_recipe(batch_size=8, grad_accumulation=16), FULL, GPU, world=4)
    assert accumulated.micro_batch == (8, 512) and accumulated.tokens_per_step == 65_536


def test_processes_on_a_cpu_share_it(rate_of_a_cpu):
    assert estimate(full_recipe(), FULL, CPU, world=2).rate == estimate(full_recipe(), FULL, CPU).rate


@pytest.mark.parametrize(("device", "dtype"), [(CPU, "fp32"), (CPU, "bf16"), (GPU, "fp32")])
def test_everything_else_takes_a_measured_rate(device, dtype, rate_of_a_cpu, h100):
    found = estimate(full_recipe(dtype=dtype), FULL, device)
    assert found.rate == pytest.approx(rate_of_a_cpu * MATMUL_EFFICIENCY)
    assert (
        f"{device.type}, 200 GFLOP/s measured in a matrix product, assuming {MATMUL_EFFICIENCY:.0%} of it"
        in found.rate_source
    )


def test_checkpointing_takes_less_memory_and_more_time(rate_of_a_cpu):
    plain, checkpointed = (
        estimate(full_recipe(gradient_checkpointing=on), FULL, CPU) for on in (False, True)
    )
    assert checkpointed.memory.total < plain.memory.total / 2.5
    assert 1.2 < checkpointed.seconds / plain.seconds < 4 / 3
    assert checkpointed.flops_per_token == plain.flops_per_token
    assert checkpointed.memory.activations == plain.memory.activations


def test_triton_keeps_no_mask_and_no_repeated_keys(h100):
    plain, kernels = (
        estimate(full_recipe(backend=name), FULL, GPU).memory for name in ("torch", "triton,rope=torch")
    )
    per_token = (
        512
        + 2 * FULL.num_attention_heads * FULL.head_dim
        - (FULL.num_attention_heads + 2 * FULL.num_key_value_heads) * FULL.head_dim
    )
    assert plain.activations - kernels.activations == 2 * 16_384 * FULL.num_hidden_layers * per_token
    assert kernels.total < plain.total


def test_a_matrix_product_is_timed():
    rates = [matmul_rate(TINY, CPU, torch.float32, 64, seconds=0.01) for _ in range(3)]
    assert 1e6 < statistics.median(rates) < 1e15


def shown(found: Estimate) -> str:
    text = "\n".join(lines(found))
    assert all(len(line) <= 140 and line == line.rstrip() for line in text.splitlines())
    return text


def test_the_text_names_every_figure(h100):
    text = shown(estimate(full_recipe(), FULL, GPU))
    assert "134,515,008 parameters: embedding (also the head) 28,311,552, blocks 106,203,456" in text
    assert "16,384 a step, 81,920,000 in 5,000 steps" in text
    assert "860 MFLOP a token, 70.4 PFLOP in all (causal attention counted half)" in text
    for part in (
        "0.54 GB parameters",
        "0.54 GB gradients",
        "1.08 GB AdamW",
        "copies of weights, bf16",
        "a chunk of logits",
    ):
        assert part in text
    assert "activations of 32 x 512 tokens, triton, bf16" in text and "with gradient_checkpointing)" in text
    assert "time      about 3:24 at 402" in text


def test_only_memory_that_a_run_does_not_take_is_left_out(rate_of_a_cpu):
    """Rows too small for their unit are shown as 0.0 MB."""
    sizes = dict(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    small = SmolLM2Config(hidden_size=8, intermediate_size=8, vocab_size=16, **sizes)
    text = shown(estimate(RunConfig(sequence_length=8, batch_size=1, device="cpu", dtype="fp32"), small, CPU))
    assert text.count(" 0.0 MB ") == 7 and "copies of weights" not in text


def test_the_text_says_what_checkpointing_saves(rate_of_a_cpu):
    assert "without gradient_checkpointing)" in shown(
        estimate(full_recipe(gradient_checkpointing=True), FULL, CPU)
    )
    assert " days at " in shown(estimate(full_recipe(), FULL, CPU))
