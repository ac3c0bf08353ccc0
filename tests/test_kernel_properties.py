"""What every kernel promises besides the right numbers: it writes only what it owns, all of it, and always
the same.
"""

import pytest
import torch
from kernel_cases import (
    CALLS,
    DEVICE,
    DTYPES,
    TORCH,
    TRITON,
    WRITTEN,
    Call,
    agree,
    assert_same,
    draw,
    small_calls,
)

from kernels.types import OPS


@pytest.fixture(params=CALLS)
def call(request):
    torch.manual_seed(1234)
    return small_calls()[request.param]


def memory(tensor):
    """A copy of all the memory that a view lies in, as bytes: what is between its elements too, and NaN equal
    to itself.
    """
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).clone()


def test_every_operation_is_here():
    # in test files of their own
    others = {"decode_inputs", "decode_layer", "decode_layers", "decode_head", "decode_best", "next_token"}
    assert {name.split()[0] for name in CALLS} == set(OPS) - others


def test_the_calls_are_within_the_contract(call):
    """So that the tests below speak about right results."""
    upstream = call.upstream()
    ours, expected = (call.run(backend, upstream) for backend in (TRITON, TORCH))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_inputs_are_not_written(call):
    upstream = call.upstream()
    read = [x for index, x in enumerate(call.tensors) if index not in WRITTEN.get(call.op, ())]
    tensors = [x for x in (*read, *call.rest, *upstream) if isinstance(x, torch.Tensor)]
    before = [memory(x) for x in tensors]
    call.run(TRITON, upstream)
    assert_same([memory(x) for x in tensors], before)


def test_a_second_backward_pass_gives_the_same(call):
    """With retain_graph: nothing that was saved is overwritten, nor is the output."""
    upstream = call.upstream()
    leaves, outputs = call.forward(TRITON)
    if not outputs[0].requires_grad:
        pytest.skip("no gradient")
    before = [y.detach().clone() for y in outputs]
    first = [g.clone() for g in torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)]
    assert_same(torch.autograd.grad(outputs, leaves, upstream), first)
    assert_same([y.detach() for y in outputs], before)


def test_a_second_derivative_is_refused(call):
    """It would leave out what the backward pass itself contributes, without a word."""
    leaves, outputs = call.forward(TRITON)
    if not outputs[0].requires_grad:
        pytest.skip("no gradient")
    # mlp is made of an operation of ours and of torch's products
    with pytest.raises(RuntimeError, match="has first derivatives only; leave create_graph=True out"):
        torch.autograd.grad(outputs, leaves, call.upstream(), create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_two_runs_are_bit_identical(name, dtype):
    """On a GPU the programs finish in another order each time: no sum may depend on it."""
    call = small_calls(dtype)[name]
    upstream = call.upstream()
    outputs, gradients = call.run(TRITON, upstream)
    for _ in range(1 if dtype == torch.float32 else 3):
        again, again_gradients = call.run(TRITON, upstream)
        assert_same([*again, *again_gradients], [*outputs, *gradients])


def test_every_element_is_written(call, request):
    """Fresh memory holds NaN: none is left in an output or a gradient, or came into a sum."""
    upstream = call.upstream()
    outputs, gradients = call.run(TRITON, upstream)
    request.getfixturevalue("poison_empty")
    poisoned, poisoned_gradients = call.run(TRITON, upstream)
    assert_same([*poisoned, *poisoned_gradients], [*outputs, *gradients])
    assert all(x.isfinite().all() for x in (*poisoned, *poisoned_gradients))


def test_nothing_is_kept_without_gradients(call):
    with torch.no_grad():
        assert all(y.grad_fn is None for y in call.forward(TRITON)[1])
    with torch.inference_mode():
        _, inside = call.forward(TRITON)
    assert_same([y.clone() for y in inside], [y.detach() for y in call.forward(TRITON)[1]])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "rope", "rope_qkv", "rope_cache"])
def test_rounds_where_the_reference_does(name, dtype):
    """Nearly all bits are the reference's: a value rounded once more or once less on its way changes a fifth
    of them.
    """
    call = small_calls(dtype)[name]
    for ours, expected in zip(call.forward(TRITON)[1], call.forward(TORCH)[1], strict=True):
        assert (ours == expected).float().mean() > 0.99


# in the interpreter; exp(-x) = inf is right
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
# its products would cancel the sizes
@pytest.mark.parametrize("name", [name for name in CALLS if name != "linear_cross_entropy"])
def test_bf16_range(name):
    """Values that overflow in fp16: none goes through it. The scores of the attention keep their size."""
    call = small_calls(torch.bfloat16)[name]
    scores = 2 if "attention" in name else 0  # q and k
    tensors = [
        x if index < scores or not x.is_floating_point() else x * 1e6 for index, x in enumerate(call.tensors)
    ]
    agree(call.op, tensors, *call.rest, **call.options)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["attention", "decode_attention"])
def test_small_values_after_a_large_one(name, dtype):
    """The mean of 256 and some values of 0.25, by equal scores, is right to half a unit. A sum held in bf16
    would stay at 256.
    """
    queries, lengths = (300, []) if name == "attention" else (1, [torch.tensor([300], device=DEVICE)])
    q, k, v = (
        torch.zeros(1, n, heads, 32, dtype=dtype, device=DEVICE)
        for n, heads in ((queries, 3), (300, 1), (300, 1))
    )
    v[:, 0], v[:, 64::16] = 256, 0.25
    _, (out,) = Call(name, (q, k, v), lengths).forward(TRITON)
    truth = (
        v.double().cumsum(1)[:, -queries:] / torch.arange(301 - queries, 301, device=DEVICE)[:, None, None]
    )
    torch.testing.assert_close(
        out.detach().double(), truth.expand(out.shape), rtol=0.51 * torch.finfo(dtype).eps, atol=0
    )


def test_bf16_positions():
    """bf16 holds whole numbers up to 256 only: as bf16, key 257 would be key 256, which query 256 sees."""
    q, k, v, dy = (draw(1, 300, heads, 32, dtype=torch.bfloat16) for heads in (3, 1, 1, 3))
    dy[:, 257:] = 0
    (out,), (dq, dk, dv) = Call("attention", (q, k, v)).run(TRITON, [dy])
    assert (dk[:, 257:] == 0).all() and (dv[:, 257:] == 0).all()
    k[:, 257:], v[:, 257:] = -k[:, 257:], -v[:, 257:]
    (changed,), (changed_dq, *_) = Call("attention", (q, k, v)).run(TRITON, [dy])
    assert_same([changed[:, :257], changed_dq[:, :257]], [out[:, :257], dq[:, :257]])
