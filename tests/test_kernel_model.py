"""The whole tiny model on the kernels: loss and every gradient against float64, training and generation
against backend torch.
"""

import numerics
import pytest
import torch
from kernel_cases import DEVICE, TORCH, TRITON

from kernels import select_backend
from kernels.types import OPS
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, generate

SMALL = dict(vocab_size=64, num_hidden_layers=1)


def build(backend, state=None, compute_dtype=None, **overrides):
    """A tiny model on the device; `state` gives it the weights of another one."""
    torch.manual_seed(0)
    model = SmolLM2ForCausalLM(
        SmolLM2Config.preset("tiny", **overrides), backend=backend, compute_dtype=compute_dtype
    ).to(DEVICE)
    if state is not None:
        model.load_state_dict(state)
    return model


def batch(rows=2, length=35, vocabulary=512):
    """ids, labels and doc_start: the first row holds three documents, one label is ignored."""
    ids = torch.randint(0, vocabulary, (rows, length)).to(DEVICE)
    labels = ids.clone()
    labels[0, 3] = -100
    doc_start = torch.zeros(rows, length, dtype=torch.int32, device=DEVICE)
    doc_start[0, length // 3 :], doc_start[0, length // 2 :] = length // 3, length // 2
    return ids, labels, doc_start


def loss_and_gradients(model, *inputs):
    loss = model(*inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(None, id="fp32"),
        pytest.param(torch.float16, id="fp16 under fp32 masters"),
        pytest.param(torch.bfloat16, id="bf16 under fp32 masters"),
    ],
)
@pytest.mark.parametrize("documents", [False, True])
def test_loss_and_every_gradient(documents, dtype):
    inputs = batch() if documents else batch()[:2]
    reference = build(TORCH)
    truth = loss_and_gradients(build(TORCH, reference.state_dict()).double(), *inputs)
    base = loss_and_gradients(build(TORCH, reference.state_dict(), dtype), *inputs)
    ours = loss_and_gradients(build(TRITON, reference.state_dict(), dtype), *inputs)
    # loss and embedding, nine a layer, the last norm
    assert ours.keys() == truth.keys() and len(ours) == 2 + 9 * 2 + 1
    op = "model" if dtype is None else f"model, {str(dtype).removeprefix('torch.')} activations"
    numerics.check(op, "loss", ours.pop("loss"), base["loss"], truth["loss"], tested=dtype)
    for name, gradient in ours.items():  # in fp32 whatever the compute dtype, and held to fp32's allowance
        numerics.check(op, name, gradient, base[name], truth[name])


def test_three_steps_of_training():
    """The same losses as with backend torch, step by step, and lower ones."""

    def train(backend):
        model = build(backend, num_hidden_layers=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        torch.manual_seed(1)
        inputs, losses = batch(rows=1), []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(*inputs).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, expected = train(TRITON), train(TORCH)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert ours[0] > ours[1] > ours[2]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_four_generated_tokens(temperature):
    """Of two prompts of different lengths: prefill, ragged cache, decode."""
    prompts = torch.randint(0, 512, (2, 9)).to(DEVICE)
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    options = dict(attention_mask=mask, max_new_tokens=4, temperature=temperature, seed=3, eos_token_id=[])
    ours, expected = (
        generate(build(backend, initializer_range=0.3).eval(), prompts, **options)
        for backend in (TRITON, TORCH)
    )
    assert torch.equal(ours, expected)
    assert ours.shape == (2, 13)


@pytest.mark.parametrize("hooked", [False, True])
def test_tokens_of_more_rows_than_the_fused_layer_takes(hooked):
    """By the composition, or where a layer has a hook by the layers themselves: both call rope_cache."""
    prompts = torch.randint(0, 64, (17, 3)).to(DEVICE)
    mask = torch.ones_like(prompts)
    mask[::2, :2] = 0
    tokens = []
    for backend in (TRITON, TORCH):
        model = build(backend, initializer_range=0.3, **SMALL).eval()
        if hooked:
            model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
        tokens.append(generate(model, prompts, attention_mask=mask, max_new_tokens=3, eos_token_id=[]))
    assert torch.equal(*tokens)


def test_gradient_checkpointing_changes_nothing():
    inputs = batch(length=9, vocabulary=64)
    plain, thrifty = build(TRITON, **SMALL), build(TRITON, **SMALL)
    thrifty.model.gradient_checkpointing = True
    ours, expected = loss_and_gradients(thrifty, *inputs), loss_and_gradients(plain, *inputs)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("op", OPS)
def test_every_single_replacement(op):
    """`triton,OP=torch`: exactly that operation is torch's, and the model trains and generates with it as it
    does without kernels.
    """
    backend = select_backend(f"triton,{op}=torch", DEVICE)
    assert backend.name == f"triton,{op}=torch"
    # of the operations of their backend
    composed = {"swiglu": "mlp", "rope_qkv": "rope_cache", "decode_head": "decode_best"}
    others = [name for name in OPS if name not in (op, composed.get(op))]
    assert getattr(backend, op) is getattr(TORCH, op) and all(
        getattr(backend, name) is getattr(TRITON, name) for name in others
    )
    inputs = batch(length=9, vocabulary=64)
    model, reference = build(backend, **SMALL), build(TORCH, **SMALL)
    ours, expected = loss_and_gradients(model, *inputs), loss_and_gradients(reference, *inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    tokens = [
        generate(m.eval(), inputs[0][:1], max_new_tokens=2, eos_token_id=[]) for m in (model, reference)
    ]
    assert torch.equal(*tokens)


def test_dropout_names_the_remedy():
    model = build(TRITON, attention_dropout=0.1, **SMALL)
    with pytest.raises(ValueError, match="attention=torch"):
        loss_and_gradients(model, *batch(length=9, vocabulary=64))
    assert model.eval()(batch(length=9, vocabulary=64)[0]).logits.isfinite().all()
    with DEVICE:  # where a backend of that name is to run
        model = build("triton,attention=torch", attention_dropout=0.1, **SMALL)
    assert loss_and_gradients(model, *batch(length=9, vocabulary=64))["loss"].isfinite()
