"""apply_kernels and remove_kernels around what people do with a Llama of transformers: train, adapt, compile,
save, load; and what is refused.
"""

import copy
import dataclasses
import io
import json

import pytest
import torch
from patch_cases import batch, llama, packed, results, transformers
from torch import nn

from kernels import TORCH
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, patch
from smollm2.errors import UsageError
from smollm2.patch import apply_kernels, remove_kernels
from smollm2.patch.layers import REPLACED

Llama = transformers.LlamaForCausalLM
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CLOSE = dict(rtol=1e-4, atol=1e-5)


def patched(**changes):
    return apply_kernels(llama(**changes), backend="torch")


def names(model):
    """The files of the classes of all modules, and their own forwards."""
    return [(type(module).__module__, "forward" in vars(module), "_smollm2" in vars(module))
            for module in model.modules()]  # fmt: skip


def ours(model):
    """The names of the classes that are ours."""
    return {
        type(module).__name__
        for module in model.modules()
        if type(module).__module__ == patch.layers.__name__
    }


def test_every_class_is_replaced_and_restored():
    model, before = llama(), names(llama())
    assert apply_kernels(model, backend="torch") is model
    assert ours(model) == set(REPLACED) and model.config._attn_implementation == "smollm2"
    assert model.state_dict().keys() == llama().state_dict().keys()
    assert remove_kernels(model) is model
    assert names(model) == before and model.config._attn_implementation == "sdpa"
    expected, found = results(llama(), *batch()), results(model, *batch())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    remove_kernels(model)  # nothing is left to remove


@pytest.mark.parametrize(("switch", "left"), [
    ("rms_norm", {"LlamaRMSNorm", "LlamaDecoderLayer"}), ("rope", {"LlamaRotaryEmbedding", "LlamaAttention"}),
    ("swiglu", {"LlamaMLP"}), ("loss", {"LlamaForCausalLM"}), ("attention", set()),
])  # fmt: skip
def test_a_switch_leaves_its_layers(switch, left):
    model = apply_kernels(llama(), backend="torch", **{switch: False})
    assert ours(model) == set(REPLACED) - left
    assert (model.config._attn_implementation == "smollm2") == (switch != "attention")


def test_the_second_call_replaces_the_first():
    model = apply_kernels(patched(), backend="torch", attention=False, rope=False)
    assert ours(model) == set(REPLACED) - {"LlamaRotaryEmbedding", "LlamaAttention"}
    assert model.config._attn_implementation == "sdpa"
    apply_kernels(model, backend="torch")
    assert model.config._attn_implementation == "smollm2"
    assert ours(remove_kernels(model)) == set() and model.config._attn_implementation == "sdpa"


def test_of_a_class_the_models_made_from_then_on():
    old, signature = llama(), Llama.__init__
    try:
        assert apply_kernels(Llama, backend="torch", swiglu=False) is Llama
        apply_kernels(Llama, backend="torch")
        new = llama()
    finally:
        remove_kernels(Llama)
    assert Llama.__init__ is signature
    assert ours(old) == ours(llama()) == set() and ours(new) == set(REPLACED)
    assert results(new, *batch())["loss"] == results(patched(), *batch())["loss"]


def test_saved_and_loaded(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and "smollm2" not in json.dumps(config)
    try:
        apply_kernels(Llama, backend="torch")
        again = Llama.from_pretrained(tmp_path, attn_implementation="eager")
    finally:
        remove_kernels(Llama)
    assert ours(again) == set(REPLACED) and again.config._attn_implementation == "smollm2"
    plain = Llama.from_pretrained(tmp_path)
    assert ours(plain) == set()
    for other in (again, plain):
        torch.testing.assert_close(results(other, *batch()), results(model, *batch()), **CLOSE)


def test_copied_and_pickled():
    model, file = patched(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = results(model, *batch())["loss"]
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert ours(other) == set(REPLACED) and results(other, *batch())["loss"] == expected
        assert ours(remove_kernels(other)) == set()
    assert ours(model) == set(REPLACED)


def test_the_logits_exist_where_somebody_asks_for_them():
    model, (ids, labels) = patched(), batch()
    assert model(ids, labels=labels).logits is None
    assert model(ids).logits.shape == (2, 19, 97)
    assert model(ids, labels=labels, skip_logits=False).logits is not None
    assert model(ids, labels=labels, logits_to_keep=torch.arange(19)).logits is not None
    assert model(ids, labels=labels, return_dict=False)[0].shape == ()
    assert len(model(ids, labels=labels, output_hidden_states=True).hidden_states) == 3
    model.eval()
    assert model(ids, labels=labels).logits is not None
    assert model(ids, logits_to_keep=2).logits.shape == (2, 2, 97)
    assert model(ids, labels=labels, skip_logits=True).logits is None
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    assert model.train()(ids, labels=labels).logits is not None, "another loss needs them"


@pytest.mark.parametrize("options", [
    {"num_items_in_batch": 11}, {"num_items_in_batch": torch.tensor(11)},
    {"num_items_in_batch": torch.tensor([11])},  # as each GPU of a DataParallel gets it
    {"ignore_index": 3}, {"shift_labels": batch()[0].flip(1)},
], ids=str)  # fmt: skip
def test_what_the_loss_is_told(options):
    ids = batch()[0]
    expected, found = (model(ids, labels=ids, **options).loss for model in (llama(), patched()))
    torch.testing.assert_close(found, expected, **CLOSE)
    for model in (plain := llama(), fused := patched()):
        model(ids, labels=ids, **options).loss.sum().backward()
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)


def test_the_product_of_the_loss_is_in_the_dtype_of_autocast():
    (ids, labels), dtypes = batch(), []
    backend = dataclasses.replace(TORCH, linear_cross_entropy=lambda hidden, weight, *others, **options: (
        dtypes.append((hidden.dtype, weight.dtype, torch.is_autocast_enabled("cpu"))),
        TORCH.linear_cross_entropy(hidden, weight, *others, **options),
    )[1])  # fmt: skip
    model = apply_kernels(llama(), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=labels).loss.backward()
    assert dtypes == [(torch.bfloat16, torch.float32, False)] and model.lm_head.weight.grad.isfinite().all()


def test_a_head_that_is_more_than_its_weight_is_called():
    model, calls = patched(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    ids, labels = batch()
    torch.testing.assert_close(model(ids, labels=labels).loss, llama()(ids, labels=labels).loss, **CLOSE)
    assert calls == [1]


def test_a_norm_that_is_more_than_its_weight_is_called():
    model, calls = patched(), []
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: calls.append(1))
    ids, labels = batch()
    torch.testing.assert_close(model(ids, labels=labels).loss, llama()(ids, labels=labels).loss, **CLOSE)
    assert calls == [1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, monkeypatch):
    model, (ids, labels), calls = patched(), batch(), []
    expected = results(model, ids, labels)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layer = type(model.model.layers[0].mlp)
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x: (calls.append(1), forward(self, x))[1])
    model.train()(ids, labels=labels).loss.backward()
    assert len(calls) == 4, "both layers, forward and once more"
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("first", ["kernels", "adapters"])
def test_adapters_on_every_projection(first):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted(model):
        torch.manual_seed(5)
        config = peft.LoraConfig(
            r=4, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(model, config)

    plain = adapted(llama())
    model = adapted(patched()) if first == "kernels" else apply_kernels(adapted(llama()), backend="torch")
    assert ours(model) == set(REPLACED)
    expected, found = results(plain, *batch()), results(model, *batch())
    assert len(found) == 2 + 2 * 2 * len(PROJECTIONS)
    torch.testing.assert_close(found, expected, **CLOSE)
    merged = remove_kernels(model).merge_and_unload()
    torch.testing.assert_close(merged.eval()(batch()[0]).logits, expected["logits"], **CLOSE)


@pytest.mark.parametrize("case", ["documents", "padding"])
def test_compiled(case):
    """Traced, transformers takes every row for packed documents, and padding for a whole mask."""
    (ids, labels), model = batch(), patched(num_hidden_layers=1)
    if case == "documents":
        inputs = {"position_ids": packed(ids)[0]}
    else:
        inputs = {"attention_mask": (torch.arange(19) > 1).long().expand(2, 19)}
        labels = labels.masked_fill(torch.arange(19) <= 2, -100)
    inputs["use_cache"] = False
    llama_loss = llama(num_hidden_layers=1)(ids, labels=labels, **inputs).loss
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, labels=labels, **inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, llama_loss, **CLOSE)
    compiled = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(ids, labels=labels, **inputs).loss.backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, compiled, **CLOSE)


def test_trainer(tmp_path):
    """The same losses as without the kernels, with accumulation, bf16 and checkpointing; then it saves."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    ids, labels = batch(rows=8)
    rows = [
        {"input_ids": i, "labels": j, "attention_mask": torch.ones_like(i)}
        for i, j in zip(ids, labels, strict=True)
    ]

    def losses(model):
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=2, logging_steps=1, report_to=[], bf16=True, gradient_checkpointing=True, use_cpu=True,
            disable_tqdm=True, save_strategy="no", learning_rate=1e-3,
        )  # fmt: skip
        trainer = transformers.Trainer(model, options, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return [*found, trainer.evaluate()["eval_loss"]]

    model = patched()
    assert losses(model) == pytest.approx(losses(llama()), rel=2e-3)
    ids = batch()[0]
    before = model(ids).logits
    assert ours(remove_kernels(model)) == set()
    assert model(ids, labels=ids).logits is not None, "accelerate's wrapper of our forward passes on"
    after = model(ids).logits  # under autocast as before: single logits differ by more than the whole
    assert (after - before).norm() < 0.02 * before.norm()


def test_without_a_gpu_it_says_so_and_does_nothing(monkeypatch, capsys):
    monkeypatch.setattr(patch, "accelerators", list)
    monkeypatch.setattr(patch, "interpreted", lambda: False)
    model = llama()
    assert apply_kernels(model) is model and ours(model) == set()
    assert apply_kernels(Llama) is Llama and ours(llama()) == set()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "no GPU here, so nothing was changed; backend='torch'" in said[0]
    with pytest.raises(UsageError, match="expected a Llama of transformers, got NoneType"):
        apply_kernels(None)


@pytest.mark.parametrize(("changes", "said"), [
    ({"head_dim": 80}, "attention: expected a head dim of 32, 64 or 128, got 80; rope: expected a head dim "
                       "that is a power of two, got 80; a switch that is False"),
    ({"hidden_act": "gelu"}, "swiglu: expected the activation 'silu', got 'gelu'"),
])  # fmt: skip
def test_what_the_kernels_do_not_serve_is_refused(changes, said):
    model = llama(**changes)
    with pytest.raises(UsageError, match=said):
        apply_kernels(model, backend="triton")
    assert ours(model) == set() and model.config._attn_implementation == "sdpa"
    switches = {"head_dim": ("attention", "rope"), "hidden_act": ("swiglu",)}[next(iter(changes))]
    apply_kernels(model, backend="triton", **dict.fromkeys(switches, False))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_other_models_are_refused_also_without_a_gpu(monkeypatch, backend):
    monkeypatch.setattr(patch, "accelerators", list)
    monkeypatch.setattr(patch, "interpreted", lambda: False)
    qwen = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    ))  # fmt: skip
    for model in (qwen, nn.Linear(2, 2), SmolLM2ForCausalLM(SmolLM2Config.preset("tiny")), "a model"):
        with pytest.raises(UsageError, match=f"expected a Llama .*, got {type(model).__name__}"):
            apply_kernels(model, backend=backend)
    for kind in (type(qwen), nn.Linear, transformers.LlamaPreTrainedModel):
        with pytest.raises(UsageError, match=f"expected LlamaForCausalLM, .*, got {kind.__name__}"):
            apply_kernels(kind, backend=backend)
    with pytest.raises(UsageError, match="before torch.compile"):
        apply_kernels(torch.compile(llama()), backend=backend)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        apply_kernels(llama(), backend="fast")


def test_layers_that_something_else_has_changed_are_refused():
    model = llama()
    model.model.norm.forward = model.model.norm.forward
    with pytest.raises(UsageError, match="expected transformers' own LlamaRMSNorm, got a LlamaRMSNorm that"):
        apply_kernels(model, backend="torch")
    assert ours(model) == set()

    class Mine(Llama):
        pass

    with pytest.raises(UsageError, match="own LlamaForCausalLM, got a Mine"):
        apply_kernels(Mine(llama().config), backend="torch")
    assert ours(apply_kernels(Mine(llama().config), backend="torch", loss=False)) == set(REPLACED) - {
        "LlamaForCausalLM"
    }
