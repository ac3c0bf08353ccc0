"""Muon for the matrices beside AdamW: which has what, the same updates as torch's own, skipped steps,
schedules and an exact resume.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from train_cases import checkpoint_folder, curve, run_config

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.errors import UsageError
from train import checkpoint
from train.config import RunConfig
from train.optim import MuonWithAdamW, build_optimizer, learning_rate, set_learning_rate, update
from train.run import train

CONFIG = RunConfig(optimizer="muon", lr=0.01, weight_decay=0.1)


def model_with_gradients(seed: int = 0) -> SmolLM2ForCausalLM:
    torch.manual_seed(seed)
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", num_hidden_layers=1))
    give_gradients(model, seed)
    return model


def give_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("decayed", ["matrices", "all"])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(decayed):
    model = model_with_gradients()
    optimizer = build_optimizer(
        model, RunConfig(optimizer="muon", weight_decay_on=decayed, muon_weight_decay=0.2)
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, *adamw = optimizer.param_groups
    assert {names[id(parameter)].rpartition(".")[0].rpartition(".")[2] for parameter in muon["params"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert muon["weight_decay"] == 0.2
    rest = {names[id(parameter)]: group["weight_decay"] for group in adamw for parameter in group["params"]}
    assert rest["model.embed_tokens.weight"] == 0.01 and rest["model.norm.weight"] == (
        0.01 if decayed == "all" else 0.0
    )
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_a_step_is_that_of_torchs_muon_and_of_torchs_adamw():
    model, other = model_with_gradients(), model_with_gradients()
    optimizer = build_optimizer(model, CONFIG)
    matrices = [parameter for name, parameter in other.named_parameters() if "proj" in name]
    norms = [parameter for name, parameter in other.named_parameters() if "norm" in name]
    muon = torch.optim.Muon(
        matrices, lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [{"params": [other.model.embed_tokens.weight], "weight_decay": 0.1},
         {"params": norms, "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip
    for seed in range(3):
        for one in (model, other):
            give_gradients(one, seed)
        update(optimizer, torch.zeros(()))
        muon.step()
        adamw.step()
        assert equal(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("before", [0, 2])
def test_a_step_that_is_left_out_changes_nothing(before):
    model = model_with_gradients()
    optimizer = build_optimizer(model, CONFIG)
    for seed in range(before):
        give_gradients(model, seed)
        update(optimizer, torch.zeros(()))
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    update(optimizer, torch.ones(()))
    assert equal(list(model.parameters()), kept)
    give_gradients(model, 7)
    update(optimizer, torch.zeros(()))
    assert not equal(list(model.parameters()), kept) and all(
        parameter.isfinite().all() for parameter in model.parameters()
    )


def test_the_decision_on_the_device_gives_the_same_bits():
    """Where the host must not wait the step is taken and undone: the path of a GPU, here by hand."""
    model, other = model_with_gradients(), model_with_gradients()
    optimizers = [build_optimizer(one, CONFIG) for one in (model, other)]
    plain, guarded = optimizers
    assert isinstance(plain, MuonWithAdamW) and isinstance(guarded, MuonWithAdamW)
    for seed, bad in enumerate((1.0, 0.0, 0.0, 1.0, 0.0)):
        for one in (model, other):
            give_gradients(one, seed)
            if bad:
                one.model.layers[0].mlp.up_proj.weight.grad.fill_(math.inf)  # type: ignore[union-attr]
        if not bad:
            plain._muon.step()
        with torch.no_grad():
            guarded._step_unless(torch.tensor(bad))
        assert equal(list(model.parameters()), list(other.parameters()))
    averages = [
        [one.state[matrix]["momentum_buffer"] for matrix in one.param_groups[0]["params"]]
        for one in (plain, guarded)
    ]
    assert equal(*averages)


def test_the_schedule_is_that_of_both_each_from_its_own_peak():
    config = RunConfig(optimizer="muon", lr=0.001, muon_lr=0.02, warmup_steps=4, schedule="wsd", steps=20)
    optimizer = build_optimizer(model_with_gradients(), config)
    for step in range(20):
        set_learning_rate(optimizer, learning_rate(step, config))
        muon, *adamw = (group["lr"] for group in optimizer.param_groups)
        rate = learning_rate(step, config)
        assert muon == pytest.approx(20 * rate) and adamw == [rate, rate]


@pytest.mark.parametrize(
    "changes", [dict(), dict(dtype="bf16", grad_accumulation=2, muon_lr=0.01)], ids=["fp32", "bf16"]
)
def test_three_steps_and_three_more_are_six_steps(tmp_path, changes):
    straight, parts = (
        run_config(tmp_path, name, optimizer="muon", **changes) for name in ("straight", "parts")
    )
    train(straight)
    parts.steps = 3
    train(parts)
    parts.steps, parts.resume = 6, "auto"
    train(parts)
    assert curve(parts) == curve(straight)
    for file in ("model.safetensors", checkpoint.MOMENTS):
        one, other = (load_file(checkpoint_folder(config, 6) / file) for config in (straight, parts))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert {key.rpartition("/")[2] for key in one if "proj" in key} == {"momentum_buffer"}
    assert {key.rpartition("/")[2] for key in one if "proj" not in key} == {"exp_avg", "exp_avg_sq", "step"}


def test_a_resume_with_the_other_optimizer_is_refused_with_both(tmp_path):
    train(run_config(tmp_path, steps=1, optimizer="muon"))
    with pytest.raises(UsageError, match=r"checkpoint was made with optimizer=muon \(got adamw\)"):
        train(run_config(tmp_path, steps=2, resume="auto"))
    record = checkpoint_folder(run_config(tmp_path), 1) / checkpoint.RECORD
    assert json.loads(record.read_text(encoding="utf-8"))["config"]["optimizer"] == "muon"


def test_the_loss_falls(tmp_path):
    config = run_config(tmp_path, optimizer="muon", steps=40)
    train(config)
    losses = [loss for _, loss, _ in curve(config)]
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(optimizer="sgd"), "optimizer: expected one of adamw, adamw,torch, muon, got 'sgd'"),
        (dict(optimizer="muon", muon_lr=0.0), "muon_lr: expected a number above 0, got 0.0"),
        (dict(optimizer="muon", muon_momentum=1.0), r"muon_momentum: expected a number in \[0, 1\), got 1.0"),
        (
            dict(optimizer="muon", muon_weight_decay=-1.0),
            "muon_weight_decay: expected a number of at least 0, got -1.0",
        ),
        (dict(optimizer="muon", cuda_graph=True), "cuda_graph: torch's Muon cannot be captured"),
        (dict(muon_lr=0.1), "muon_lr: only read with optimizer=muon, got optimizer=adamw"),
    ],
)
def test_wrong_keys_are_refused(keys, message):
    with pytest.raises(UsageError, match=message):
        RunConfig(**keys).validate()  # type: ignore[arg-type]
