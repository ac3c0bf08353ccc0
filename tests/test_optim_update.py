"""Schedules, parameter groups, clipping, and steps that are left out because a gradient is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from train.config import RunConfig
from train.keys import CHOICES
from train.optim import (
    SPIKE_WARMUP,
    StepGuard,
    build_optimizer,
    clip_gradients,
    learning_rate,
    parameter_groups,
    update,
)


def rates(**keys: object) -> list[float]:
    config = RunConfig(**keys)  # type: ignore[arg-type]
    return [learning_rate(step, config) for step in range(config.steps)]


def test_constant_schedule_after_a_linear_warmup():
    found = rates(schedule="constant", lr=1.0, steps=8, warmup_steps=4)
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("shape", "end"),
    [("linear", [0.8, 0.6, 0.4]), ("1-sqrt", [1 - 0.8 * math.sqrt(part) for part in (0.25, 0.5, 0.75)])],
)
def test_wsd_is_constant_and_then_falls_to_the_end(shape, end):
    keys = dict(schedule="wsd", lr=1.0, min_lr=0.2, steps=10, warmup_steps=2, decay_fraction=0.4)
    values = rates(**keys, decay_shape=shape)
    assert values[:7] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert values[7:] == pytest.approx(end)
    after_the_end = learning_rate(10, RunConfig(**keys, decay_shape=shape))  # type: ignore[arg-type]
    assert after_the_end == pytest.approx(0.2)


def test_cosine_is_half_way_down_in_the_middle():
    values = rates(schedule="cosine", lr=1.0, min_lr=0.0, steps=12, warmup_steps=2)
    assert values[2] == 1.0
    assert values[7] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


@given(
    schedule=st.sampled_from(CHOICES["schedule"]),
    steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 80),
    decay_fraction=st.floats(0.01, 1.0),
)
def test_no_step_has_a_learning_rate_of_zero_or_above_the_peak(schedule, steps, warmup_steps, decay_fraction):
    values = rates(
        schedule=schedule, lr=0.1, steps=steps, warmup_steps=warmup_steps, decay_fraction=decay_fraction
    )
    assert all(0 < value <= 0.1 for value in values)


def test_norms_are_not_decayed_and_the_tied_matrix_is_updated_once():
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"))
    decayed, plain = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(names[id(parameter)].endswith("norm.weight") for parameter in plain["params"])
    assert sum(parameter is model.lm_head.weight for parameter in decayed["params"]) == 1
    everything = [*decayed["params"], *plain["params"]]
    assert sum(parameter.numel() for parameter in everything) == model.num_parameters()


def test_clipping_returns_the_norm_before_and_bounds_it_after(generator):
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = torch.cat([parameter.grad.flatten() for parameter in parameters])
    assert clip_gradients(parameters, 0.5).item() == pytest.approx(before.norm().item())
    after = torch.cat([parameter.grad.flatten() for parameter in parameters])
    assert after.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert torch.allclose(after / after.norm(), before / before.norm())
    assert clip_gradients(parameters, 0.0).item() == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(torch.cat([parameter.grad.flatten() for parameter in parameters]), after)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad, generator):
    layer = torch.nn.Linear(4, 3)
    optimizer = build_optimizer(layer, RunConfig(lr=0.1))
    guard = StepGuard(torch.device("cpu"))

    def step(broken: bool) -> None:
        optimizer.zero_grad()
        loss = layer(torch.randn(2, 4, generator=generator)).square().sum()
        loss.backward()
        if broken:
            layer.weight.grad[0, 0] = bad
        update(optimizer, guard.judge(loss.detach(), clip_gradients(layer.parameters(), 1.0)))

    step(broken=False)
    weights = [parameter.detach().clone() for parameter in layer.parameters()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    step(broken=True)
    step(broken=True)
    assert all(torch.equal(*pair) for pair in zip(weights, layer.parameters(), strict=True))
    for moment, state in zip(moments, optimizer.state.values(), strict=True):
        assert torch.equal(moment, state["exp_avg"]) and state["step"] == 1
    step(broken=False)
    step(broken=True)
    assert not torch.equal(weights[0], layer.weight)
    assert (int(guard.skipped), guard.longest()) == (3, 2)


def judged(guard: StepGuard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_skipped_whatever_the_gradients(bad):
    guard = StepGuard(torch.device("cpu"))
    assert judged(guard, bad) and judged(guard, 1.0, bad) and not judged(guard, 1.0)


def test_spikes_are_skipped_once_the_mean_is_known_and_do_not_move_it(generator):
    guard, careless = StepGuard(torch.device("cpu"), zscore=6.0), StepGuard(torch.device("cpu"))
    noise = torch.randn(1000, generator=generator).mul_(0.1).tolist()
    # nothing to compare with yet
    assert not any(judged(guard, 11.0 + number % 2) for number in range(SPIKE_WARMUP // 2))
    for value in noise:
        assert not judged(guard, 3.0 + value)
    assert [judged(guard, 3.0 + 2.0) for _ in range(30)] == [True] * 30  # a spike that lasts stays one
    assert not judged(guard, 3.0) and not judged(guard, 1.0)  # below the mean is no spike
    assert not any(judged(careless, 3.0 + value) for value in [*noise, 100.0])
    assert (int(guard.skipped), guard.longest()) == (30, 30)


def test_a_guard_continues_where_it_was(generator):
    losses = (3.0 + torch.randn(120, generator=generator) * 0.1).tolist()
    one, other = StepGuard(torch.device("cpu"), 3.0), StepGuard(torch.device("cpu"), 3.0)
    for value in losses[:70]:
        judged(one, value)
    other.load(one.state())
    assert [judged(one, value) for value in losses[70:]] == [judged(other, value) for value in losses[70:]]
    assert all(torch.equal(value, other.state()[name]) for name, value in one.state().items())


def test_all_parameters_are_decayed_on_request():
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"))
    decayed, plain = parameter_groups(model, 0.1, "all")
    assert plain["params"] == []
    assert sum(parameter.numel() for parameter in decayed["params"]) == model.num_parameters()
    optimizer = build_optimizer(model, RunConfig(weight_decay_on="all"))
    assert [group["weight_decay"] for group in optimizer.param_groups if group["params"]] == [0.01]
