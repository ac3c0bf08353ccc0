"""A training step that reads working copies of the weights takes the numbers of one that casts them, and
never reads an outdated one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from kernel_cases import DEVICE, INTERPRETED
from train_cases import checkpoint_folder, curve, run_config

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, generate
from smollm2.pretrained.load import load_model
from smollm2.working_copies import WorkingCopies
from train.config import RunConfig
from train.optim import FusedAdamW, working_copies
from train.run import train

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs on the CPU; on a GPU test_train_cuda_graph.py trains with copies"
)


def build(backend: str = "torch") -> SmolLM2ForCausalLM:
    torch.manual_seed(0)
    with DEVICE:
        return SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend, compute_dtype=torch.bfloat16).train()


def gradients(model: SmolLM2ForCausalLM) -> list[torch.Tensor]:
    ids = torch.arange(2 * 9).view(2, 9)
    loss = model(ids, ids).loss
    assert loss is not None
    loss.backward()
    found = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return found  # type: ignore[return-value]


def with_copies() -> tuple[SmolLM2ForCausalLM, WorkingCopies]:
    model = build()
    copies = WorkingCopies(model, torch.bfloat16)
    model.use_working_copies(copies)
    copies.refresh()
    return model, copies


@interpreted
def test_the_same_bits_as_casting():
    model, _ = with_copies()
    assert all(
        torch.equal(ours, expected)
        for ours, expected in zip(gradients(model), gradients(build()), strict=True)
    )


@interpreted
def test_every_copy_is_read_while_it_is_current():
    model, copies = with_copies()
    block: Any = model.model.layers[0]
    reference = gradients(model)
    attention, mlp = block.self_attn, block.mlp
    for module in (attention.k_proj, attention.o_proj, mlp.up_proj, mlp.down_proj, model.lm_head):
        parameter = module.weight
        copy = copies.of(parameter)
        assert copy is not None
        with torch.no_grad():
            copy.mul_(2)  # behind their back
        assert not torch.equal(gradients(model)[0], reference[0])
        with torch.no_grad():
            parameter.mul_(1)  # a write, which changes nothing but that the copy is outdated
        assert torch.equal(gradients(model)[0], reference[0])
        copies.refresh()
        assert torch.equal(gradients(model)[0], reference[0])


@interpreted
@pytest.mark.parametrize(
    "changes", [dict(dtype="fp32"), dict(compile=True), dict(sharding="full"), dict(backend="torch")]
)
def test_none_where_they_would_not_be_read(changes):
    changes = {"dtype": "bf16", "backend": "triton", **changes}
    assert working_copies(build(changes["backend"]), RunConfig(**changes), torch.device("cpu")) is None


@interpreted
def test_a_run_trains_with_them_and_resumes_exactly(tmp_path, capsys):
    """Of the kernels' AdamW, in the interpreter: one run, and one that is interrupted; and torch's goes on
    where it stopped.
    """
    changes: dict[str, Any] = dict(
        dtype="bf16", backend="triton", device="cpu", checkpoint_every=1, sequence_length=16, batch_size=1
    )
    whole = run_config(tmp_path, "whole", steps=2, **changes)
    train(whole)
    assert "AdamW of the Triton backend" in capsys.readouterr().out
    train(run_config(tmp_path, "halves", steps=1, **changes))
    halves = run_config(tmp_path, "halves", steps=2, resume="auto", **changes)
    train(halves)
    assert curve(halves) == curve(whole)
    one, other = (load_model(checkpoint_folder(config, 2)).state_dict() for config in (whole, halves))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    theirs = run_config(tmp_path, "halves", steps=3, resume="auto", optimizer="adamw,torch", **changes)
    train(theirs)
    assert "optimizer: adamw -> adamw,torch" in capsys.readouterr().out


def test_the_optimizer_writes_them():
    model = build("triton")
    copies = working_copies(model, RunConfig(dtype="bf16", backend="triton"), next(model.parameters()).device)
    assert copies is not None
    model.use_working_copies(copies)
    copies.refresh()
    optimizer = FusedAdamW(model.parameters(), copies=copies)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.clip(1.0)
    optimizer.step()
    for parameter in model.parameters():
        copy = copies.of(parameter)
        assert parameter.dim() == 1 or (copy is not None and torch.equal(copy, parameter.bfloat16()))


@interpreted
def test_a_model_in_another_dtype_than_its_copies_casts():
    """Sampling in the middle of a training run: the engine's prefill is in the dtype of the parameters."""
    model, _ = with_copies()
    ids = torch.arange(9)[None]
    assert torch.equal(
        generate(model.eval(), ids, max_new_tokens=3), generate(build().eval(), ids, max_new_tokens=3)
    )
    model.compute_dtype = torch.float16
    gradients(model.train())


@interpreted
def test_a_run_samples_while_it_trains(tmp_path):
    run = run_config(
        tmp_path, steps=1, dtype="bf16", backend="triton", sequence_length=16, batch_size=1, sample_every=1,
        sample_tokens=2, eval_every=1, eval_batches=1, validation_fraction=0.3,
    )  # fmt: skip
    train(run)
    assert curve(run)


@interpreted
def test_projections_whose_weight_is_computed_have_no_copy():
    model = build()
    torch.nn.utils.prune.identity(model.model.layers[0].self_attn.q_proj, "weight")
    copies = WorkingCopies(model, torch.bfloat16)
    model.use_working_copies(copies)
    copies.refresh()
    gradients_of = model(torch.arange(9)[None], torch.arange(9)[None]).loss
    assert gradients_of is not None and gradients_of.isfinite()


@interpreted
@pytest.mark.parametrize("change", ["untied", "hooked"])
def test_an_embedding_that_is_not_just_the_heads_rows_is_called(change):
    model = build()
    ids = torch.arange(9)[None]
    table = model.model.embed_tokens
    if change == "untied":
        table.weight = torch.nn.Parameter(table.weight.detach() * 2)
    else:
        table.register_forward_hook(lambda module, inputs, rows: rows * 2)
    out = model(ids)
    assert out.logits is not None
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:])
    loss = model(ids, ids).loss
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=2e-3)
    loss.backward()
    assert table.weight.grad is not None
