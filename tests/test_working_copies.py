"""Working copies: what they are, and that every kind of write from outside outdates them until a refresh."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.working_copies import WorkingCopies

pytestmark = pytest.mark.usefixtures("poison_empty")


def small_model(pack: bool = False) -> SmolLM2ForCausalLM:
    config = SmolLM2Config.preset("tiny", vocab_size=64, num_hidden_layers=1)
    model = SmolLM2ForCausalLM(config, backend="torch")
    if pack:
        for layer in model.model.layers:
            layer.pack()
    return model


def refreshed(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> WorkingCopies:
    copies = WorkingCopies(model, dtype)
    copies.refresh()
    return copies


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 2}


def outdated(model: nn.Module, copies: WorkingCopies) -> set[str]:
    return {name for name, parameter in matrices(model).items() if copies.of(parameter) is None}


def assert_right(model: nn.Module, copies: WorkingCopies) -> None:
    for name, parameter in matrices(model).items():
        found = copies.of(parameter)
        assert found is not None and torch.equal(found, parameter.detach().to(copies.dtype)), name
        assert not found.requires_grad


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_are_the_rounded_weights_side_by_side(dtype, pack):
    model = small_model(pack)
    copies = WorkingCopies(model, dtype)
    assert outdated(model, copies) == set(matrices(model))  # nothing is copied yet
    copies.refresh()
    assert_right(model, copies)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for module in (attention, mlp):
        weights = [projection.weight for projection in module.projections()]
        assert torch.equal(copies.of_group(weights), torch.cat(weights).detach().to(dtype))
        assert copies.of(weights[1]).data_ptr() == copies.of_group(weights)[len(weights[0]) :].data_ptr()
        assert copies.of_group(weights[:1]) is None and copies.of_group(weights[::-1]) is None
    assert copies.of(model.lm_head.weight) is copies.of(model.model.embed_tokens.weight)
    assert copies.of(model.model.norm.weight) is None


def test_only_what_was_written_is_copied_again(monkeypatch):
    model = small_model()
    copies = refreshed(model)
    sizes, original = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (sizes.append(len(to)), original(to, of)))
    copies.refresh()
    assert sizes == []
    weight = model.model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        weight.mul_(2)
    assert outdated(model, copies) == {"model.layers.0.self_attn.k_proj.weight"}
    group = [projection.weight for projection in model.model.layers[0].self_attn.projections()]
    assert copies.of_group(group) is None
    copies.refresh()
    assert sizes == [1] and copies.of_group(group) is not None
    assert_right(model, copies)


def step_of(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[nn.Module], None]:
    def step(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        make(list(model.parameters())).step()

    return step


def under(context: Callable[[], Any], write: Callable[[nn.Parameter], object]) -> Callable[..., None]:
    def write_all(model: nn.Module) -> None:
        with context():
            for parameter in model.parameters():
                write(parameter)

    return write_all


def load_doubled(model: nn.Module, assign: bool) -> None:
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=assign)


def replace_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = 2 * parameter.data


WRITES = {
    "load_state_dict": lambda model: load_doubled(model, assign=False),
    "load_state_dict, assigned": lambda model: load_doubled(model, assign=True),
    "AdamW, foreach": step_of(lambda parameters: torch.optim.AdamW(parameters, 0.1, foreach=True)),
    "AdamW, fused": step_of(lambda parameters: torch.optim.AdamW(parameters, 0.1, fused=True)),
    "AdamW, one by one": step_of(lambda parameters: torch.optim.AdamW(parameters, 0.1, foreach=False)),
    "SGD": step_of(lambda parameters: torch.optim.SGD(parameters, 0.1)),
    "mul_ under no_grad": under(torch.no_grad, lambda parameter: parameter.mul_(2)),
    "copy_ under no_grad": under(torch.no_grad, lambda parameter: parameter.copy_(parameter + 1)),
    "a row under no_grad": under(torch.no_grad, lambda parameter: parameter[0].zero_()),
    "mul_ under inference_mode": under(torch.inference_mode, lambda parameter: parameter.mul_(2)),
    "data replaced": replace_data,
    "to float64 and back": lambda model: load_doubled(model.double().float(), assign=False),
}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_from_outside_outdates_the_copies(write, pack):
    model = small_model(pack)
    copies = refreshed(model)
    before = model.lm_head.weight.detach().clone()
    write(model)
    assert not torch.equal(before, model.lm_head.weight)
    assert outdated(model, copies) == set(matrices(model))
    with torch.inference_mode():  # a refresh while sampling serves the next training step too
        copies.refresh()
    assert_right(model, copies)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    copies.refresh()
    assert_right(model, copies)
    write(model)
    copies.refresh()
    assert_right(model, copies)


def test_another_dtype_has_no_copies_until_it_is_fp32_again():
    model = small_model()
    copies = refreshed(model)
    model.to(torch.bfloat16)
    copies.refresh()
    assert outdated(model, copies) == set(matrices(model))
    model.to(torch.float32)
    copies.refresh()
    assert_right(model, copies)


def test_another_device_gets_other_buffers():
    model = small_model()
    copies = refreshed(model)
    model.to("meta")
    assert outdated(model, copies) == set(matrices(model)) and copies.target(model.lm_head.weight) is None
    copies.refresh()
    assert copies.of(model.lm_head.weight).is_meta


def test_memory_of_a_replaced_parameter_is_given_to_nothing_else():
    """It could come back under the parameter, with other values at the address that was copied."""
    layer = nn.Linear(33, 65, bias=False)
    copies = refreshed(layer)
    for _ in range(16):
        address = layer.weight.data_ptr()
        layer.weight.data = torch.randn(65, 33)
        assert address not in [other.data_ptr() for other in [torch.empty(65, 33) for _ in range(64)]]
        assert copies.of(layer.weight) is None
        copies.refresh()


def test_an_untied_head_gets_a_copy_of_its_own():
    model = small_model()
    copies = refreshed(model)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    assert copies.of(model.lm_head.weight) is None and copies.of(model.model.embed_tokens.weight) is not None
    copies.refresh()
    assert_right(model, copies)
    assert copies.of(model.lm_head.weight) is not copies.of(model.model.embed_tokens.weight)


@pytest.mark.parametrize("view", [lambda data: data.t(), lambda data: data[:2]])
def test_another_view_of_the_same_memory_is_another_parameter(view):
    layer = nn.Linear(16, 16, bias=False)
    copies = refreshed(layer)
    layer.weight.data = view(layer.weight.data)
    assert copies.of(layer.weight) is None
    copies.refresh()
    assert torch.equal(copies.of(layer.weight), layer.weight.detach().bfloat16())


def test_a_copy_of_the_model_has_none():
    model = small_model()
    model.copies = refreshed(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.copies is None
        assert all(map(torch.equal, model.parameters(), other.parameters()))
        assert outdated(other, model.copies) == set(matrices(other))
    assert_right(model, model.copies)


def test_a_write_through_data_goes_unnoticed_and_invalidate_helps():
    """The limit that the docstring names: torch does not count writes through .data."""
    model = small_model()
    copies = refreshed(model)
    buffer = copies.target(model.lm_head.weight)
    model.lm_head.weight.data.mul_(2)
    assert copies.of(model.lm_head.weight) is not None
    copies.invalidate()
    assert outdated(model, copies) == set(matrices(model))
    copies.refresh()
    assert_right(model, copies)
    assert copies.target(model.lm_head.weight) is buffer  # a captured graph may read it


def test_what_the_optimizer_has_written_is_current():
    model = small_model()
    copies = refreshed(model)
    head, other = model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        head.add_(1)
        other.add_(1)
        copies.target(head).copy_(head)
    version = copies.target(head)._version
    copies.written([head])
    assert outdated(model, copies) == {"model.layers.0.mlp.up_proj.weight"}
    assert copies.target(head)._version > version  # a saved copy is not the one of the forward pass any more
    copies.refresh()
    assert_right(model, copies)


def test_only_16_bit_copies():
    with pytest.raises(ValueError, match=r"expected torch\.bfloat16 or torch\.float16, got torch\.float32"):
        WorkingCopies(small_model(), torch.float32)


def test_copies_that_are_gone_leave_no_hook():
    gc.collect()  # those of other tests
    layer, before = nn.Linear(3, 5), len(_global_optimizer_post_hooks)
    copies = WorkingCopies(layer, torch.bfloat16)
    assert len(_global_optimizer_post_hooks) == before + 1
    del copies
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before


def test_a_projection_that_was_replaced_alone_is_not_read_from_the_old_buffer():
    model = small_model()
    copies = refreshed(model)
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = nn.Parameter(attention.k_proj.weight.detach() * 2)
    projections = [projection.weight for projection in attention.projections()]
    assert copies.of_group(projections) is None
    copies.refresh()
    buffer = copies.of_group(projections)
    assert buffer is not None and torch.equal(buffer, torch.cat(projections).bfloat16())
