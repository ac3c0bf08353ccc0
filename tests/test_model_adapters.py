"""Layers that are not the model's own, or are hooked: they are called, in training and in every engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from generation_cases import tiny_model
from kernel_cases import DEVICE
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from smollm2 import SmolLM2ForCausalLM, generate
from smollm2.engine.compiled import CompiledEngine
from smollm2.engine.eager import Engine
from smollm2.engine.loops import DecodeLoops
from smollm2.engine.quantized import QuantizedEngine
from smollm2.engine.select import default_engine, select_engine
from smollm2.errors import UsageError
from smollm2.generation.batch import generate_many
from smollm2.perplexity import perplexity as score
from smollm2.projections import is_plain


class Adapter(nn.Module):
    """A low-rank sum beside a layer, as peft's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, generator = base, torch.Generator().manual_seed(0)
        for name, shape in (("down", (4, base.in_features)), ("up", (base.out_features, 4))):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).to(base.weight.device)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def with_bias(layer: nn.Linear) -> nn.Linear:
    changed = nn.Linear(layer.in_features, layer.out_features)
    changed.load_state_dict({"weight": layer.weight, "bias": torch.ones(layer.out_features)})
    return changed.to(layer.weight.device)


def assign_forward(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)  # type: ignore[method-assign]
    return layer


def hooked(layer: nn.Module) -> nn.Module:
    def twice(module: nn.Module, args: object, output: Tensor | tuple[Tensor, Tensor]) -> object:
        return 2 * output if isinstance(output, Tensor) else (2 * output[0], output[1])

    layer.register_forward_hook(twice)
    return layer


def hooked_before(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    return layer


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def normalised(layer: nn.Module) -> nn.Module:
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr, index]
    return layer


CHANGES = [
    ("model.layers.0.self_attn.q_proj", Adapter),
    ("model.layers.1.self_attn.v_proj", normalised),
    ("model.layers.1.self_attn.k_proj", hooked),
    ("model.layers.0.self_attn.o_proj", hooked_before),
    ("model.layers.0.mlp.gate_proj", parametrized),
    ("model.layers.1.mlp.up_proj", with_bias),
    ("model.layers.1.mlp.down_proj", assign_forward),
    ("lm_head", Adapter),
    ("lm_head", hooked),
    ("model.embed_tokens", hooked),
    ("model.norm", hooked),
    ("model.layers.0.post_attention_layernorm", hooked_before),
    ("model.layers.1", hooked),
    ("model.layers.0.mlp", hooked_before),
    ("model", lambda model: hooked(model)),
    ("model.layers", lambda layers: layers[:1]),  # cut off
]


def changed_model(name: str, change: Callable[[nn.Module], nn.Module], backend: str) -> SmolLM2ForCausalLM:
    model = tiny_model(backend, device=str(DEVICE))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, change(model.get_submodule(name)))
    return model


def decoded(engine: Engine, ids: Tensor, lengths: list[int], steps: list[int]) -> list[list[Tensor]]:
    """Per row the logits after its prompt and after each of the next tokens of `ids`, `steps` at a time."""
    cache = engine.allocate(len(ids), ids.shape[1])
    rows, place = torch.arange(len(ids), device=ids.device)[:, None], torch.tensor(lengths, device=ids.device)
    found = [[row] for row in engine.prefill(ids[:, : max(lengths)], place, cache)]
    for step in steps:
        tokens = ids[rows, place[:, None] + torch.arange(step, device=ids.device)]
        for row, logits in zip(found, engine.decode(tokens, cache), strict=True):
            row.extend(logits)
        place = place + step
    return found


@pytest.mark.parametrize(
    ("backend", "name", "change"),
    [*(("torch", *case) for case in CHANGES), *(("triton", *CHANGES[index]) for index in (0, 8, 10))],
)
def test_decoding_agrees_with_the_forward_pass(backend, name, change):
    ids = torch.randint(0, 512, (2, 8), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    model = changed_model(name, change, backend)
    assert not model.is_plain()
    full, plain = model(ids).logits, tiny_model(backend, device=str(DEVICE))(ids).logits
    assert (full - plain).norm() > 1e-3 * plain.norm()
    for row, (length, logits) in enumerate(
        zip((3, 5), decoded(Engine(model), ids, [3, 5], [1, 2]), strict=True)
    ):
        torch.testing.assert_close(
            torch.stack(logits), full[row, length - 1 : length + 3], rtol=1e-3, atol=1e-3
        )


def test_a_hook_for_all_modules_is_called_too():
    model, ids, seen = tiny_model(), torch.arange(6)[None], []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        generate(model, ids, max_new_tokens=3, eos_token_id=[])
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3 * (7 * model.config.num_hidden_layers + 1)
    assert model.is_plain()


@pytest.mark.parametrize(("name", "change"), [CHANGES[0], CHANGES[5], CHANGES[7], CHANGES[8], CHANGES[9]])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_they_train(name, change, compute_dtype):
    """The loss is that of the logits, and gradients reach what was added."""
    model, ids = changed_model(name, change, "torch"), torch.arange(24, device=DEVICE).view(2, 12)
    model.compute_dtype = compute_dtype
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    logits = model(ids).logits[:, :-1].flatten(0, 1).float()
    expected = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-2 if compute_dtype else 1e-5, atol=1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters())
    half = model(ids, labels=ids, scale=torch.tensor(0.5, device=DEVICE), reduction="sum").loss
    torch.testing.assert_close(half, loss * 0.5 * 22, rtol=1e-2 if compute_dtype else 1e-5, atol=1e-4)


def test_engines_that_read_weights_refuse_or_call(installed_step):
    model, ids = tiny_model(), torch.arange(6)[None]
    quantised, compiled = QuantizedEngine(model, "int8"), select_engine(model, compiled="auto")
    assert isinstance(compiled, CompiledEngine)
    model.model.layers[0].self_attn.q_proj = Adapter(model.model.layers[0].self_attn.q_proj)
    expected = generate(model, ids, max_new_tokens=9, eos_token_id=[])
    message = "quantize=int8 reads the weights of the model's own layers, and some were replaced or hooked"
    for call in (
        lambda: generate(model, ids, max_new_tokens=3, eos_token_id=[], engine=quantised),
        lambda: QuantizedEngine(model, "int8"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    with pytest.raises(UsageError, match="compile: the compiled step is for the model's own layers"):
        select_engine(model, compiled=True)
    for engine in (compiled, select_engine(model, compiled="auto"), default_engine(model)):
        assert torch.equal(generate(model, ids, max_new_tokens=9, eos_token_id=[], engine=engine), expected)
    row = dict(generate_many(model, ids.tolist(), max_new_tokens=9))[0]
    assert row == expected[0, 6:].tolist()


@pytest.mark.parametrize(("name", "change"), [CHANGES[0], CHANGES[7], CHANGES[8]])
def test_a_text_is_scored_by_what_the_model_answers(name, change):
    model, ids = changed_model(name, change, "torch"), torch.arange(30, device=DEVICE)
    logits = model(ids[None]).logits[0, :-1].float()
    expected = nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    assert score(model, ids, 30, 15).nats == pytest.approx(expected, rel=1e-5)
    assert score(model, ids, 30, 15, engine=Engine(model)).nats == pytest.approx(expected, rel=1e-4)


def test_a_decode_loop_calls_them_where_nothing_is_captured():
    model = changed_model(*CHANGES[0], "torch")
    with DecodeLoops(Engine(model)).borrow(1, 16) as loop:
        if loop.captures:
            with pytest.raises(UsageError, match="a graph would not call the adapters and hooks"):
                loop._addresses()
        else:
            assert loop._addresses() == ()


def test_what_is_plain():
    model = tiny_model()
    assert model.is_plain() and is_plain(model.lm_head)
    model.model.embed_tokens.max_norm = 1.0
    assert not model.is_plain()
