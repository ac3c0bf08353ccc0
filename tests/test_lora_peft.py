"""Adapters of low rank: peft's numbers, peft's files, and what becomes of them when a model is loaded."""

import json

import pytest
import torch

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.errors import LoadError, UsageError
from smollm2.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TARGETS,
    LoraConfig,
    adapter_parameters,
    adapter_tensors,
    adapters,
    add_adapters,
    load_adapters,
    merge_adapters,
)
from smollm2.pretrained.files import read_safetensors
from smollm2.pretrained.load import load_model, write_adapter

CONFIG = LoraConfig(rank=4, alpha=12.0)
IDS = torch.arange(40).view(2, 20) * 11 % 512


def fresh(backend="torch"):
    torch.manual_seed(3)
    return SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend)


def adapted(config=CONFIG, *, moved=True):
    """A model with adapters; `moved`: whose B are not zero any more."""
    model = fresh()
    add_adapters(model, config)
    if moved:
        with torch.no_grad():
            for layer in adapters(model).values():
                layer.lora_B.normal_(0.0, 0.1)
    return model


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    fresh().save_pretrained(folder)
    return folder


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def written(model, base, folder):
    config = next(iter(adapters(model).values())).config
    write_adapter(folder, config.to_peft(str(base)), adapter_tensors(model))
    return folder


def test_new_adapters_change_nothing_and_are_all_that_is_trained():
    model = adapted(moved=False)
    assert torch.equal(model(IDS).logits, fresh()(IDS).logits)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if name in trained)
    assert count == adapter_parameters(model.config, CONFIG)
    model(IDS, labels=IDS).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def theirs_of(peft, model, targets=TARGETS):
    """peft's wrapper of a fresh model, with the adapters of `model`."""
    config = peft.LoraConfig(r=CONFIG.rank, lora_alpha=CONFIG.alpha, target_modules=list(targets))
    theirs = peft.inject_adapter_in_model(config, fresh())
    for parameter in theirs.parameters():
        parameter.requires_grad_(False)
    for name, layer in adapters(model).items():
        for kind in "AB":
            weight = getattr(theirs.get_submodule(name), f"lora_{kind}")["default"].weight
            weight.data.copy_(getattr(layer, f"lora_{kind}").data)
            weight.requires_grad_(True)
    return theirs


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "down_proj")], ids=["all", "two"])
def test_trains_as_peft_does(peft, targets):
    ours = adapted(LoraConfig(CONFIG.rank, CONFIG.alpha, targets=targets), moved=False)
    losses = []
    for model in (ours, theirs_of(peft, ours, targets)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(5):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.05


def test_peft_reads_our_files(peft, base, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = adapted()
    folder = written(model, base, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_we_read_the_files_of_peft(peft, base, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(TARGETS), init_lora_weights=False)
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    merged = load_model(tmp_path / "adapter", "torch")
    assert adapters(merged) == {} and merged.is_plain()
    expected = theirs.merge_and_unload().state_dict()
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)
    assert (merged(IDS).logits - fresh()(IDS).logits).abs().max() > 1e-2


def test_merging_keeps_the_logits_the_packing_and_the_order_of_roundings(base, tmp_path):
    model = adapted()
    expected = model(IDS).logits
    folder = written(model, base, tmp_path / "adapter")
    merge_adapters(model)
    assert model.is_plain() and all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    attention = model.model.layers[0].self_attn
    assert attention._current(attention.packed)
    loaded = load_model(folder, "torch", dtype="bf16")
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16)), name  # rounded once, after the sum


def test_dropout_is_of_training_alone():
    model = adapted(LoraConfig(4, 12.0, dropout=0.5))
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_kernels_leave_the_frozen_weights_alone():
    """The Triton backend under weights without a gradient: the gradients of the torch backend."""
    pytest.importorskip("triton", reason="Triton is not installed")
    first, second = fresh(), fresh("triton")
    for model in (first, second):
        torch.manual_seed(5)
        add_adapters(model, LoraConfig(2, targets=("q_proj", "o_proj", "up_proj")))
        with torch.no_grad():
            for layer in adapters(model).values():
                layer.lora_B.normal_(0.0, 0.1)
        model(IDS, labels=IDS).loss.backward()
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        if "lora_" in name:
            torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-4)
        else:
            assert one.grad is two.grad is None, name


def test_activations_in_bf16_over_adapters_in_fp32():
    model = adapted()
    model.compute_dtype = torch.bfloat16
    model(IDS, labels=IDS).loss.backward()
    for layer in adapters(model).values():
        assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    with torch.no_grad():
        assert model.model(IDS, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "use_dora is not implemented"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern is not implemented"),
        ("modules_to_save", ["lm_head"], "modules_to_save is not implemented"),
        ("bias", "all", "bias: expected none"),
        ("peft_type", "IA3", "peft_type: expected LORA"),
        ("target_modules", ["q_proj", "embed_tokens"], "target_modules: expected some of"),
        ("r", "many", "not a LoRA configuration"),
        ("r", 8, "expected shape"),
        ("target_modules", ["q_proj"], "found in one of them"),
        ("base_model_name_or_path", None, "expected the name of a model"),
        ("base_model_name_or_path", "/no/such", "no such file"),
    ],
)
def test_what_we_cannot_use_is_refused_by_name(base, tmp_path, key, value, message):
    folder = written(adapted(), base, tmp_path / "adapter")
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, key: value}))
    with pytest.raises(LoadError, match=message):
        load_model(folder, "torch")


def test_an_adapter_of_itself_is_refused(base, tmp_path):
    folder = written(adapted(), tmp_path / "adapter", tmp_path / "adapter")
    with pytest.raises(LoadError, match="it is an adapter itself"):
        load_model(folder, "torch")


def test_a_target_that_no_layer_has():
    with pytest.raises(UsageError, match="lora_targets"):
        add_adapters(fresh(), LoraConfig(4, targets=("w1",)))


def test_files_hold_the_adapters_alone(base, tmp_path):
    model = adapted()
    folder = written(model, base, tmp_path / "adapter")
    found = read_safetensors(folder / ADAPTER_WEIGHTS, torch.device("cpu"))
    assert sum(tensor.numel() for tensor in found.values()) == adapter_parameters(model.config, CONFIG)
    again = adapted(moved=False)
    load_adapters(again, found, folder)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
