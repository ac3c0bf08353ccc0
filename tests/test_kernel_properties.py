"""What every kernel promises besides the right numbers: it writes only what it owns, all of it, and always the same."""

import pytest
import torch
from kernel_cases import CALLS, DTYPES, TORCH, TRITON, assert_same, small_calls

from kernels.backend import OPS


@pytest.fixture(params=CALLS)
def call(request):
    torch.manual_seed(1234)
    return small_calls()[request.param]


def memory(tensor):
    """A copy of all the memory that a view lies in, as bytes: what is between its elements too, and NaN equal to itself."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).clone()


def test_every_operation_is_here():
    assert {name.split()[0] for name in CALLS} == set(OPS) - {"decode_layer", "decode_head"}  # in test files of their own


def test_the_calls_are_within_the_contract(call):
    """So that the tests below speak about right results."""
    upstream = call.upstream()
    ours, expected = (call.run(backend, upstream) for backend in (TRITON, TORCH))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_inputs_are_not_written(call):
    upstream = call.upstream()
    tensors = [x for x in (*call.tensors, *call.rest, *upstream) if isinstance(x, torch.Tensor)]
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
