"""Offsets past 2^31 elements: each tensor in turn is stretched over a buffer that int32 cannot index.

The buffer (8 GiB, 4 Gi elements of 16 bits) is one allocation of which a few pages are ever touched. The view
starts in its middle, so that an offset that wraps around to -2^31 reads other memory of ours and gives a
wrong result, not a crash. Triton 3.7's interpreter computes offsets in numpy in the widths that the kernel
asks for, and fails here as a GPU would; an older one may compute in wider integers, and there only a GPU
proves anything.
"""

import pytest
import torch
from kernel_cases import DEVICE, EPS, TRITON, Call, angles, assert_same, draw

from kernels.linear_cross_entropy import _softmax_gradient_kernel

STRIDE = 2**30 + 64  # two steps are past int32
MIDDLE = 2**31 + 2**12


@pytest.fixture(scope="module")
def buffer():
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    try:
        return torch.empty(2 * MIDDLE + STRIDE, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no 10 GiB of address space: {error}")


def far(x, dim, buffer):
    """x in the buffer with STRIDE between its three slices along `dim`."""
    assert x.shape[dim] == 3
    strides = list(torch.empty([n for d, n in enumerate(x.shape) if d != dim]).stride())
    strides.insert(dim, STRIDE)
    return buffer.as_strided(x.shape, strides, MIDDLE).copy_(x)


def half(*shape):
    return draw(*shape, dtype=torch.float16)


# (operation, dimensions of 3 of each tensor that may be far apart, the same for the upstream gradients)
CALLS = {
    "rms_norm": (lambda: Call("rms_norm", (half(3, 96), half(96)), (EPS,)), [(0, 0)], [(0, 0)]),
    "add_rms_norm": (
        lambda: Call("add_rms_norm", (half(3, 96), half(3, 96), half(96)), (EPS,)),
        [(0, 0), (1, 0)],
        [(0, 0), (1, 0)],
    ),
    "swiglu": (lambda: Call("swiglu", (half(3, 96), half(3, 96))), [(0, 0), (1, 0)], [(0, 0)]),
    "swiglu packed": (lambda: Call("swiglu", (half(3, 192),)), [(0, 0)], []),
    "rope": (
        lambda: Call("rope", (half(3, 3, 3, 32), half(3, 3, 3, 32)), angles(3, 16)),
        [(tensor, dim) for tensor in (0, 1) for dim in (0, 1, 2)],
        [(tensor, dim) for tensor in (0, 1) for dim in (0, 1, 2)],
    ),
    "rope_qkv": (
        lambda: Call("rope_qkv", (half(3, 3, 9, 32),), (*angles(3, 16), 3)),
        [(0, 0), (0, 1)],
        [(2, 0), (2, 1), (2, 2)],
    ),
    "attention": (
        lambda: Call("attention", (half(3, 3, 3, 32), half(3, 3, 3, 32), half(3, 3, 3, 32))),
        [(tensor, dim) for tensor in (0, 1, 2) for dim in (0, 1, 2)],
        [(0, 0), (0, 1), (0, 2)],
    ),
    "decode_attention": (
        lambda: Call(
            "decode_attention",
            (half(3, 3, 3, 32), half(3, 3, 3, 32), half(3, 3, 3, 32)),
            (torch.tensor([3, 2, 3], device=DEVICE),),
        ),
        [(tensor, dim) for tensor in (0, 1, 2) for dim in (0, 1, 2)],
        [],
    ),
}
INPUTS = [(name, *far_input) for name, (_, inputs, _) in CALLS.items() for far_input in inputs]
UPSTREAM = [(name, *far_gradient) for name, (_, _, gradients) in CALLS.items() for far_gradient in gradients]


@pytest.mark.parametrize("name, index, dim", INPUTS)
def test_inputs_far_apart(name, index, dim, buffer):
    call = CALLS[name][0]()
    upstream = call.upstream()
    expected, gradients = call.run(TRITON, upstream)
    tensors = list(call.tensors)
    tensors[index] = far(tensors[index], dim, buffer)
    ours, our_gradients = Call(call.op, tensors, call.rest).run(TRITON, upstream)
    assert_same([*ours, *our_gradients], [*expected, *gradients])


@pytest.mark.parametrize("name, index, dim", UPSTREAM)
def test_upstream_gradients_far_apart(name, index, dim, buffer):
    call = CALLS[name][0]()
    upstream = call.upstream()
    _, gradients = call.run(TRITON, upstream)
    upstream[index] = far(upstream[index], dim, buffer)
    assert_same(call.run(TRITON, upstream)[1], gradients)


def test_a_chunk_of_logits_far_apart(buffer):
    """The buffer of logits is linear_cross_entropy's own, so its kernel is called itself."""
    logits, targets = half(3, 100), torch.tensor([5, 99, -100], device=DEVICE)
    scale = torch.ones((), device=DEVICE)

    def launch(logits):
        losses = torch.empty(3, device=DEVICE)
        _softmax_gradient_kernel[(3,)](
            logits,
            targets,
            scale,
            losses,
            3,
            100,
            logits.stride(0),
            -100,
            Z_LOSS=0.0,
            SMOOTHING=0.0,
            GRADIENT=True,
            BLOCK=64,
            VECTOR=8,
        )
        return losses, logits

    ours = launch(far(logits, 0, buffer))
    assert_same(ours, launch(logits.clone()))
