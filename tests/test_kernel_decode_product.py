"""The products of a decode step: exact where fp32 is, rounded where the composition rounds, and nothing but
the own row and column goes into a number. No address outside of a tensor is used.
"""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, DTYPES, INTERPRETED, TRITON, assert_same, configured_for
from test_kernel_decode_layer import CACHES, agree, layer, rows_of, run
from triton.runtime import interpreter

from kernels.decode_layer import _norm_gate_up_kernel, _project_kernel

SHAPES = [(1, 1, 1, 1, 1), (33, 9, 1, 1, 1), (31, 17, 2, 1, 1), (200, 24, 1, 2, 2), (300, 33, 4, 4, 2)]


def integers(*shape, dtype):
    """Whole numbers of up to seven bits: their products and sums are exact, whatever the order."""
    return torch.randint(-99, 100, shape).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 9, 16])
@pytest.mark.parametrize("inputs, width, groups, warps, ahead", SHAPES)
def test_exact_in_whole_numbers(inputs, width, groups, warps, ahead, rows, dtype):
    """Tails of rows, columns and k; tiles requested ahead and late. The product is rounded before the sum."""
    h, w, x = (integers(*shape, dtype=dtype) for shape in ((rows, inputs), (width, inputs), (rows, width)))
    h = h.sign()  # else fp16 would overflow
    out = torch.empty_like(x)
    _project_kernel[(-(-width // (8 * groups)),)](
        h, w, x, out, rows, INPUTS=inputs, WIDTH=width, GROUPS=groups, WARPS=warps, AHEAD=ahead,
        DEPENDENT=False, num_warps=warps,
    )  # fmt: skip
    product = (h.double() @ w.double().T).to(dtype).float()
    assert_same([out], [(product + x.float()).to(dtype)])


# The rows that are not there are zeros, and no eps keeps their norm from a division by zero.
NO_EPS = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid:RuntimeWarning")


def scales(width, dtype):
    return torch.tensor([1, 1.25, 0.75])[torch.randint(0, 3, (width,))].to(dtype).to(DEVICE)


@NO_EPS
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_gate_and_up_before_their_product(dtype):
    """Rows of ones, whose norm is one; gates so large that their sigmoid is one."""
    x = torch.ones(3, 200, dtype=dtype, device=DEVICE)
    scale, w = scales(200, dtype), integers(2 * 20, 200, dtype=dtype)
    w[:20], w[20:] = w[:20].abs() % 2, w[20:] % 4
    act = torch.empty(3, 20, dtype=dtype, device=DEVICE)
    _norm_gate_up_kernel[(3,)](
        x, scale, w, act, 3, EPS=0.0, WIDTH=200, FFN=20, GROUPS=2, WARPS=4, AHEAD=1, DEPENDENT=False,
        num_warps=4,
    )  # fmt: skip
    scaled = (w.float() * scale.float()).to(dtype)  # rounded once
    gate, up = (x.double() @ scaled.double().T).to(dtype).float().split(20, 1)
    assert_same([act], [(gate * up).to(dtype)])


@NO_EPS
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_keys_before_and_after_their_rotation(dtype):
    """Streams of 1 and -1, whose norm is one; angles whose products and sums are exact."""
    arguments = layer((9, 4), 2, hidden=300, dtype=dtype)
    scale, w = scales(300, dtype), integers(160, 300, dtype=dtype)
    x = arguments["x"].sign()
    cos, sin = torch.full((2, 16), 0.5, device=DEVICE), torch.full((2, 16), 0.25, device=DEVICE)
    arguments |= dict(x=x, cos=cos, sin=sin)
    arguments["weights"] = arguments["weights"]._replace(input_norm=scale, qkv=w)
    keys, values = (arguments[name].clone() for name in CACHES)
    caches = dict(key_cache=keys, value_cache=values)
    TRITON.decode_layer(**{**arguments, **caches}, eps=0.0, ops=TRITON)
    y = (x.double() @ (w.float() * scale.float()).to(dtype).double().T).to(dtype).float()
    k, v = y[..., 96:128], y[..., 128:]
    a, b = k.chunk(2, -1)
    k = torch.cat((a * 0.5 - b * 0.25, b * 0.5 + a * 0.25), -1)
    for row, length in enumerate((9, 4)):
        new = slice(length - 2, length)
        assert_same([keys[row, new, 0], values[row, new, 0]], [k[row].to(dtype), v[row].to(dtype)])


# Addresses


@pytest.fixture
def outside(monkeypatch):
    """The list of loads and stores outside of the tensors of their launch, as far as there are any."""
    executor, builder, found = interpreter.GridExecutor, interpreter.InterpreterBuilder, []
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    ranges = []

    def run(grid, *args, **options):
        tensors = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor) and x.numel()]
        ends = [sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in tensors]
        ranges[:] = [
            (x.data_ptr(), x.data_ptr() + end * x.element_size())
            for x, end in zip(tensors, ends, strict=True)
        ]
        launch(grid, *args, **options)

    def check(kind, pointers, mask):
        """The mask without what is outside, or the test might end the process."""
        used, there = np.broadcast_arrays(pointers.data.astype(np.int64), mask.data.astype(bool))
        inside = np.zeros(used.shape, dtype=bool)
        for first, last in ranges:
            inside |= (used >= first) & (used <= last)
        if (there & ~inside).any():
            found.append(f"{kind} of {int((there & ~inside).sum())} elements")
        return interpreter.TensorHandle(there & inside, mask.dtype)

    def checked_load(self, pointers, mask, *rest):
        return load(self, pointers, check("load", pointers, mask), *rest)

    def checked_store(self, pointers, value, mask, *rest):
        return store(self, pointers, value, check("store", pointers, mask), *rest)

    monkeypatch.setattr(executor, "__call__", run)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    return found


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter shows addresses")
@pytest.mark.parametrize("rows, new", [(1, 1), (3, 1), (5, 1), (3, 2)])
@pytest.mark.parametrize("target", ["interpreter", "sm_90"])
def test_no_address_is_outside_of_a_tensor(rows, new, target, outside):
    """Odd widths, three or seven heads: every tile has a tail. A row has more tokens than the cache, and
    one fewer than are new.
    """
    lengths = (270, 3, 1, 140, 30)[:rows]
    hidden, ffn, heads = (33, 19, 3) if rows < 5 else (290, 300, 7)  # the larger ones request tiles late
    arguments = layer(lengths, new, 260, hidden, ffn, heads, dtype=torch.float16)
    with configured_for(target):
        run(arguments)
    assert outside == []


# Rows that are not finite, and the largest


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # that is the point
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [4, 6])  # whose splits are added in the launch of o, and in one of their own
def test_a_row_that_is_not_finite_stays_alone(rows, value):
    """One row's stream, keys and values: the bits of the others do not change."""
    arguments = layer((140, 20, 9, 131, 64, 30)[:rows], 1, 140, hidden=40, ffn=24, dtype=torch.float16)
    out, *_ = run(arguments)
    others = [row for row in range(rows) if row != 1]
    for name in ("x", *CACHES):
        arguments[name][1] = value
    broken, *_ = run(arguments)
    assert_same([broken[others]], [out[others]])
    assert broken[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_largest_numbers_of_fp16(dtype):
    """Their squares and sums of products are beyond fp16."""
    arguments = layer((30, 12), ffn=48, dtype=dtype)
    arguments["x"] = 65504 * torch.sign(arguments["x"])
    agree(arguments)


# Batch invariance


def wide(lengths, new, capacity, dtype):
    """Five heads: two tiles of the attention's output in each warp, and three heads of padding."""
    return layer(lengths, new, capacity, hidden=40, ffn=24, heads=5, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows_gives_the_same_bits(dtype):
    lengths = (129, 3, 64, 130, 1, 2, 3, 128, 127, 140, 150, 33, 65, 5, 31, 96)
    arguments = wide(lengths, 1, 150, dtype)
    out, *_ = run(arguments)
    for rows in ([3], [2, 9], [9, 3, 0], [6, 7, 8, 9], [*range(5)]):
        assert_same(run(rows_of(arguments, rows, 150))[:1], [out[rows]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tokens_of_a_row_in_a_batch(dtype):
    arguments = wide((129, 2, 140), 2, 140, dtype)
    out, *_ = run(arguments)
    for rows in ([0], [2, 0]):
        assert_same(run(rows_of(arguments, rows, 140))[:1], [out[rows]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_splits_than_are_added_at_a_time(dtype):
    """A long neighbour and a larger cache add a second eight and a third."""
    arguments = wide((1, 1100, 3), 1, 2100, dtype)
    out, *_ = run(arguments)
    for row, capacity in ((0, 1), (1, 1100), (2, 3)):
        assert_same(run(rows_of(arguments, [row], capacity))[:1], [out[[row]]])
