"""Offsets past 2^31 elements: each tensor in turn is stretched over a buffer that int32 cannot index.

Triton 3.7's interpreter computes offsets in numpy, in the integer widths of the kernel, and fails here as a
GPU would. An older one may compute in wider integers; there only a GPU proves anything.
"""

import itertools

import pytest
import torch
from kernel_cases import DEVICE, EPS, TRITON, Call, angles, assert_same, draw, far

from kernels.linear_cross_entropy import _softmax_gradient_kernel


def half(*shape):
    return draw(*shape, dtype=torch.float16)


def heads():
    return half(3, 3, 3, 32)


def of(tensors, dims):
    return list(itertools.product(range(tensors), range(dims)))


LENGTHS_OF_ROWS = torch.tensor([3, 2, 3], device=DEVICE)
# operation: (call, (tensor, dimension of size 3) that may be far apart, the same for the upstream gradients)
CALLS = {
    "rms_norm": (lambda: Call("rms_norm", (half(3, 96), half(96)), (EPS,)), of(1, 1), of(1, 1)),
    "add_rms_norm": (
        lambda: Call("add_rms_norm", (half(3, 96), half(3, 96), half(96)), (EPS,)), of(2, 1), of(2, 1),
    ),
    "swiglu": (lambda: Call("swiglu", (half(3, 96), half(3, 96))), of(2, 1), of(1, 1)),
    "swiglu packed": (lambda: Call("swiglu", (half(3, 192),)), of(1, 1), []),
    "rope": (lambda: Call("rope", (heads(), heads()), angles(3, 16)), of(2, 3), of(2, 3)),
    "rope_qkv": (
        lambda: Call("rope_qkv", (half(3, 3, 9, 32),), (*angles(3, 16), 3)), of(1, 2),
        [(2, 0), (2, 1), (2, 2)],
    ),
    "attention": (lambda: Call("attention", (heads(), heads(), heads())), of(3, 3), of(1, 3)),
    "decode_attention": (
        lambda: Call("decode_attention", (heads(), heads(), heads()), (LENGTHS_OF_ROWS,)), of(3, 3), [],
    ),
}  # fmt: skip
INPUTS = [(name, *far_input) for name, (_, inputs, _) in CALLS.items() for far_input in inputs]
UPSTREAM = [(name, *far_gradient) for name, (_, _, gradients) in CALLS.items() for far_gradient in gradients]


@pytest.mark.parametrize("name, index, dim", INPUTS)
def test_inputs_far_apart(name, index, dim):
    call = CALLS[name][0]()
    upstream = call.upstream()
    expected, gradients = call.run(TRITON, upstream)
    tensors = list(call.tensors)
    tensors[index] = far(tensors[index], dim)
    ours, our_gradients = Call(call.op, tensors, call.rest).run(TRITON, upstream)
    assert_same([*ours, *our_gradients], [*expected, *gradients])


@pytest.mark.parametrize("name, index, dim", UPSTREAM)
def test_upstream_gradients_far_apart(name, index, dim):
    call = CALLS[name][0]()
    upstream = call.upstream()
    _, gradients = call.run(TRITON, upstream)
    upstream[index] = far(upstream[index], dim)
    assert_same(call.run(TRITON, upstream)[1], gradients)


def test_a_chunk_of_logits_far_apart():
    """linear_cross_entropy makes its own buffer of logits, so the test calls its kernel directly."""
    logits, targets = half(3, 100), torch.tensor([5, 99, -100], device=DEVICE)
    scale = torch.ones((), device=DEVICE)

    def launch(logits):
        losses = torch.empty(3, device=DEVICE)
        _softmax_gradient_kernel[(3,)](
            logits, targets, scale, losses, 3, 100, logits.stride(0), -100,
            Z_LOSS=0.0, SMOOTHING=0.0, GRADIENT=True, BLOCK=64, VECTOR=8,
        )  # fmt: skip
        return losses, logits

    ours = launch(far(logits, 0))
    assert_same(ours, launch(logits.clone()))
