"""The model against transformers' Llama, and the properties that a decoder must have."""

import copy
import dataclasses
import math

import pytest
import torch
from generation_cases import random_ids as ids

from kernels import TORCH
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, generate
from smollm2.errors import UsageError
from smollm2.model import shift_labels


def tiny(seed=0, **overrides):
    torch.manual_seed(seed)
    return SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", **overrides), backend="torch")


def test_logits_and_gradients_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    model = tiny().double()
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_dict())).double()
    other.load_state_dict(model.state_dict())
    tokens = ids(2, 70)
    # both have fp32 rotary tables
    torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-5, atol=1e-5)
    model(tokens, labels=tokens).loss.backward()
    other.double()(tokens, labels=tokens).loss.backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_first_loss_of_a_fresh_model():
    torch.manual_seed(0)
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("135M", num_hidden_layers=2), backend="torch")
    tokens = 96 * ids(1, 128)
    assert abs(model(tokens, labels=tokens).loss.item() - (math.log(49152) + 0.5)) < 0.3


def test_initialisation_scales_residual_projections():
    model = tiny(num_hidden_layers=8, hidden_size=192)
    std, block = model.config.initializer_range, model.model.layers[3]
    for layer in (block.self_attn.q_proj, block.mlp.gate_proj, model.model.embed_tokens):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
    for layer in (block.self_attn.o_proj, block.mlp.down_proj):
        assert layer.weight.std().item() == pytest.approx(std / math.sqrt(2 * 8), rel=0.05)


def test_the_future_changes_nothing_before_it():
    model = tiny().eval()
    tokens = ids(1, 40)
    changed = tokens.clone()
    changed[0, 25] = (changed[0, 25] + 1) % 512
    with torch.no_grad():
        before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


def test_a_packed_document_is_the_document_alone():
    model = tiny().double()
    first, second = ids(1, 13, seed=2), ids(1, 20, seed=3)
    packed = torch.cat((first, second), 1)
    doc_start = torch.tensor([[0] * 13 + [13] * 20], dtype=torch.int32)
    logits = model(packed, doc_start=doc_start).logits
    torch.testing.assert_close(logits[:, :13], model(first).logits)
    torch.testing.assert_close(logits[:, 13:], model(second).logits)
    loss = model(packed, labels=packed, doc_start=doc_start, reduction="sum").loss
    apart = sum(model(x, labels=x, reduction="sum").loss for x in (first, second))
    torch.testing.assert_close(loss, apart)


def test_labels_are_shifted_and_do_not_cross_documents():
    labels = torch.tensor([[1, 2, 3, -100, 5]])
    assert shift_labels(labels).tolist() == [[2, 3, -100, 5, -100]]
    assert shift_labels(labels, torch.tensor([[0, 0, 2, 2, 2]])).tolist() == [[2, -100, -100, 5, -100]]


def test_the_head_stays_tied():
    model = tiny()
    other = tiny(seed=5).state_dict()
    for change in (lambda: model.to(torch.bfloat16), model.pack, lambda: model.load_state_dict(other)):
        change()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len([name for name, _ in model.named_parameters() if "lm_head" in name or "embed" in name]) == 1


def test_rotary_tables_survive_a_cast_in_fp32():
    model = tiny().to(torch.bfloat16)
    cos, _ = model.model.rotary(torch.device("cpu"))
    assert cos.dtype == torch.float32
    assert len(set(cos[:, 0].tolist())) > 500  # bf16 positions would collide above 256


def gradients(model, tokens):
    model(tokens, labels=tokens).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def test_gradient_checkpointing_changes_no_gradient():
    model, tokens = tiny(), ids(2, 33)
    model.model.gradient_checkpointing = True
    assert all(map(torch.equal, gradients(model, tokens), gradients(tiny(), tokens)))


def test_bf16_compute_keeps_gradients_and_parameters_in_fp32():
    model = tiny()
    seen, block = set(), model.model.layers[1]
    block.register_forward_pre_hook(lambda module, args: seen.update(x.dtype for x in args[:2]))
    model.compute_dtype = torch.bfloat16
    tokens = ids(2, 33)
    model(tokens, labels=tokens).loss.backward()
    assert seen == {torch.bfloat16}  # the residual stream included
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_packed_weights_follow_training_and_moves():
    model = tiny()
    tokens, options = ids(1, 9), dict(max_new_tokens=4, eos_token_id=[])
    before = generate(model, tokens, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    after, fresh = generate(model, tokens, **options), tiny()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(after, generate(fresh, tokens, **options)) and not torch.equal(before, after)
    assert torch.equal(generate(model.double(), tokens, **options), after)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_packed_projections_have_the_gradients_of_separate_ones(compute_dtype):
    tokens, grads = ids(2, 33), []
    for packed in (True, False):
        model = tiny()
        model.compute_dtype = compute_dtype
        if not packed:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()  # no longer side by side
        grads.append(gradients(model, tokens))
    assert all(map(torch.equal, *grads))


def test_weights_given_later_are_those_that_are_used():
    """By assignment, by a copy of the model, by loading: a buffer of old values never answers for them."""
    model, other, tokens = tiny(), tiny(seed=5), ids(1, 9)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, new in zip(twin.parameters(), other.parameters(), strict=True):
            parameter.copy_(new)
        expected = other(tokens).logits
        assert torch.equal(twin(tokens).logits, expected)
        assert not torch.equal(model(tokens).logits, expected)
        model.load_state_dict(other.state_dict(), assign=True)
        model.tie_weights()
        assert torch.equal(model(tokens).logits, expected)
        up = model.model.layers[0].mlp.up_proj.weight
        up.data = torch.zeros_like(up)
        assert not torch.equal(model(tokens).logits, expected)


def test_attention_dropout_acts_in_training_only():
    model = tiny(attention_dropout=0.5)
    tokens = ids(1, 30)
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_attention_without_dropout_is_refused_in_training_and_infers():
    """The config of a run that trained with dropout goes with its weights to the backend that generates."""
    other = dataclasses.replace(TORCH, attention=lambda *args, **kwargs: TORCH.attention(*args), name="other")
    model, tokens = SmolLM2ForCausalLM(tiny().config.replace(attention_dropout=0.1), backend=other), ids(1, 9)
    generated = generate(model, tokens, max_new_tokens=2, eos_token_id=[])
    with pytest.raises(UsageError, match="attention_dropout = 0.1 in training .*'other,attention=torch'"):
        model(tokens, labels=tokens)
    model.eval()
    assert model(tokens, labels=tokens).loss.isfinite()
    assert torch.equal(generate(model, tokens, max_new_tokens=2, eos_token_id=[]), generated)
    with pytest.raises(UsageError, match=r"for inference, model.eval\(\)"):
        model.train()


def test_a_generation_never_drops_out():
    model = tiny(attention_dropout=0.9).train()
    first, second = (generate(model, ids(1, 30), max_new_tokens=8, eos_token_id=[]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: model(torch.tensor([[512]])), r"ids in \[0, 512\), got 512"),
        (lambda model: model(torch.tensor([[-1]])), r"ids in \[0, 512\), got -1"),
        (lambda model: model(torch.tensor([1, 2])), r"shape \[B, T\]"),
        (lambda model: model(ids(1, 4), labels=ids(1, 5)), r"labels: expected shape \[1, 4\]"),
        (lambda model: model(ids(1, 513)), "at most 512 positions, got 513"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(UsageError, match=message):
        call(tiny())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_key_value_heads": 2}, "multiple of"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"head_dim": 33}, "head_dim must be even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        SmolLM2Config.preset("tiny", **change)


def test_configuration_round_trip():
    config = SmolLM2Config.preset("360M", eos_token_id=(0, 2), pad_token_id=2)
    assert SmolLM2Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "stored, computed", [("double", "float32"), ("half", "bfloat16"), ("float", "bfloat16")]
)
def test_parameters_of_any_dtype_are_cast_to_that_of_the_activations(stored, computed):
    model = getattr(tiny(), stored)()
    model.compute_dtype = getattr(torch, computed)
    assert {grad.dtype for grad in gradients(model, ids(1, 9))} == {model.lm_head.weight.dtype}
    assert model(ids(1, 9), ids(1, 9)).loss.isfinite()
