"""bfloat16 in Triton, in the interpreter as corrected by interpreter.py: what torch computes, bit by bit. On
a GPU: compiled.
"""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, INTERPRETED
from triton.runtime.errors import InterpreterError

BF16 = torch.bfloat16
BLOCK = 1024
PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)  # every value, in any order
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")


def same(ours, expected):
    """Equal in dtype and bit by bit, where every NaN is the same and the two zeros are not."""
    assert ours.dtype == expected.dtype
    ours, integer = (
        ours.cpu(),
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()],
    )
    differ = (ours.view(integer) != expected.view(integer)) & ~(ours.isnan() & expected.isnan())
    assert int(differ.sum()) == 0, (
        f"{int(differ.sum())} differ, first {ours[differ][0]} instead of {expected[differ][0]}"
    )


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    y = tl.load(y_ptr + index)
    if OP == "cast":
        out = x.to(out_ptr.dtype.element_ty)
    elif OP == "truncated":
        out = x.to(tl.bfloat16, fp_downcast_rounding="rtz")
    elif OP == "add":
        out = x + y
    elif OP == "subtract":
        out = x - y
    elif OP == "multiply":
        out = x * y
    elif OP == "scale":
        out = 0.3 * x
    elif OP == "negate":
        out = -x
    elif OP == "absolute":
        out = tl.abs(x)
    elif OP == "where":
        out = tl.where(x < y, x, y)
    elif OP == "divide":
        out = x / y
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "with fp32":
        out = x + y.to(tl.float32)
    elif OP == "less":
        out = (x < y).to(tl.int8)
    elif OP == "equal":
        out = (x == y).to(tl.int8)
    elif OP == "exp2":
        out = tl.exp2(x)
    elif OP == "fma":
        out = tl.fma(x, y, y)
    elif OP == "atomic":
        out = tl.atomic_add(out_ptr + index, x)
    tl.static_assert(out.dtype == out_ptr.dtype.element_ty)
    tl.store(out_ptr + index, out)


def elementwise(op, x, y=None, dtype=None):
    """The kernel on x and y, both [a multiple of BLOCK]; the result must come in `dtype` (default: x's)
    before it is stored.
    """
    x = x.to(DEVICE)
    y = x if y is None else y.to(DEVICE)
    out = torch.zeros_like(x, dtype=dtype or x.dtype)
    _elementwise_kernel[(len(x) // BLOCK,)](x, y, out, op, BLOCK)
    return out


def test_every_value_to_fp32_and_back():
    wide = elementwise("cast", PATTERNS, dtype=torch.float32)
    same(wide, PATTERNS.float())
    same(elementwise("cast", wide, dtype=BF16), PATTERNS)


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding(low):
    """Every upper half of an fp32 number with that lower half: ties and their neighbours, subnormals,
    overflow, infinities, NaN.
    """
    values = ((PATTERNS.view(torch.int16).int() << 16) | low).view(torch.float32)
    same(elementwise("cast", values, dtype=BF16), values.to(BF16))


def test_rounding_by_hand():
    largest, tiny = 255 * 2.0**120, 2.0**-133  # the largest number and the smallest above zero
    pairs = {
        1 + 2**-8: 1.0, 1 + 3 * 2**-8: 1 + 2**-6, -1 - 2**-8 - 2**-20: -1 - 2**-7, largest: largest,
        -511 * 2.0**119: float("-inf"), tiny / 2: 0.0, 1.5 * tiny: 2 * tiny, 0.75 * tiny: tiny,
    }  # fmt: skip
    values = torch.tensor(list(pairs)).repeat(BLOCK // len(pairs))
    same(
        elementwise("cast", values, dtype=BF16).float(),
        torch.tensor(list(pairs.values())).repeat(BLOCK // len(pairs)),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.bool])
def test_conversions_through_fp32(dtype):
    values = torch.randint(-300, 300, (BLOCK,)).div(4).to(BF16)
    same(elementwise("cast", values, dtype=dtype), values.to(dtype))


EXPECTED = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "scale": lambda x, y: torch.tensor(0.3, dtype=BF16) * x,  # a number does not promote: it is rounded
    "negate": lambda x, y: 0 - x,  # as Triton negates
    "absolute": lambda x, y: x.abs(),
    "where": lambda x, y: torch.where(x < y, x, y),
    "divide": lambda x, y: x.float() / y.float(),  # promoted; compiled, its last bits are free
    "maximum": lambda x, y: torch.fmax(x.float(), y.float()),  # promoted
    "with fp32": lambda x, y: x + y.float(),
    "less": lambda x, y: (x < y).to(torch.int8),
    "equal": lambda x, y: (x == y).to(torch.int8),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's of overflow and inf - inf
@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=only_interpreted) if op == "divide" else op for op in EXPECTED]
)
def test_arithmetic(op):
    """Of numbers of like size and of any size, infinities included: every operation rounds its result, except
    where Triton promotes.
    """
    any_size = PATTERNS[~PATTERNS.isnan()]
    x, y = (
        torch.cat([torch.randn(BLOCK).to(BF16), any_size[torch.randint(len(any_size), (3 * BLOCK,))]])
        for _ in range(2)
    )
    y[::7] = x[::7]
    if op == "maximum":
        x, y = (torch.where(z == 0, 1.0, z) for z in (x, y))  # of two zeros, either is right
    expected = EXPECTED[op](x, y)
    same(elementwise(op, x, y, expected.dtype), expected)


@pytest.mark.parametrize(("op", "message"), [
    ("exp2", "Expected dtype"),
    pytest.param("fma", "create_fma on bfloat16", marks=only_interpreted),
    pytest.param("atomic", "create_atomic_rmw on bfloat16", marks=only_interpreted),
    pytest.param("truncated", "create_fp_to_fp on bfloat16", marks=only_interpreted),
])  # fmt: skip
def test_refused(op, message):
    x = torch.ones(BLOCK, dtype=torch.float32 if op == "truncated" else BF16)
    with pytest.raises(Exception, match=message):
        elementwise(op, x, dtype=BF16)


@only_interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_conversions_that_round_twice_are_refused(dtype):
    with pytest.raises(Exception, match="bf16 in the interpreter: go through float32"):
        elementwise("cast", torch.ones(BLOCK, dtype=dtype), dtype=BF16)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])  # [M, K]
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])  # [N, K]
    acc = tl.dot(a, tl.trans(b))
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b.T, acc))


def test_dot_is_exact_where_fp32_is():
    """Twice the product of integers of eight bits: sums of up to 24 bits. An accumulator or a result in bf16
    would round them.
    """
    a, b = (torch.randint(-255, 256, (rows, 64)).to(BF16).to(DEVICE) for rows in (16, 32))
    out = torch.empty(16, 32, device=DEVICE)
    _dot_kernel[(1,)](a, b, out, 16, 32, 64)
    same(out, 2 * (a.cpu().float() @ b.cpu().float().T))


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _reduction_kernel(x_ptr, out_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row[:, None] * COLUMNS + column[None, :])
    if OP == "max":
        out = tl.max(x, axis=1)
    elif OP == "own":
        out = tl.reduce(x, 1, _larger)
    elif OP == "sum":
        out = tl.sum(x, axis=1)
    elif OP == "scan":
        out = tl.associative_scan(x, 1, tl.standard._sum_combine)
    tl.static_assert(out.dtype == out_ptr.dtype.element_ty)
    if OP == "scan":
        tl.store(out_ptr + row[:, None] * COLUMNS + column[None, :], out)
    else:
        tl.store(out_ptr + row, out)


def reduction(op, x, dtype):
    out = torch.empty(x.shape if op == "scan" else x.shape[0], dtype=dtype, device=DEVICE)
    _reduction_kernel[(1,)](x.to(DEVICE), out, op, *x.shape)
    return out


def test_maxima():
    """Triton's own promotes; one written as a reduction does not."""
    x = torch.randn(8, 16).to(BF16)
    same(reduction("max", x, torch.float32), x.amax(1).float())
    same(reduction("own", x, BF16), x.amax(1))


@only_interpreted  # compiled, the order is another one
def test_sums_round_after_every_step():
    x = torch.randn(4, 32).to(BF16)
    steps = [x[:, 0]]
    for column in x.T[1:]:
        steps.append(steps[-1] + column)
    same(reduction("sum", x, BF16), steps[-1])
    same(reduction("scan", x, BF16), torch.stack(steps, 1))
    assert not torch.equal(steps[-1], x.float().sum(1).to(BF16))


@triton.jit
def _integers_kernel(x_ptr, out_ptr, OP: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 4))
    if OP == "add":
        x = x + 3
    elif OP == "sub":
        x = 2 - x
    else:
        x = x * 2
    tl.store(out_ptr + tl.arange(0, 4), x)


@only_interpreted
@pytest.mark.parametrize("op, limit", [("add", 2**31 - 4), ("sub", 3 - 2**31), ("mul", 2**30 - 1)])
def test_an_integer_that_overflows_is_noticed(op, limit):
    """In one lane of four; what just fits is computed, and 64 bits are not looked at."""
    x = torch.tensor([0, 1, limit, 2], dtype=torch.int32)
    step = -1 if op == "sub" else 1
    expected = {"add": lambda: x + 3, "sub": lambda: 2 - x, "mul": lambda: x * 2}
    out = torch.empty_like(x)
    _integers_kernel[(1,)](x, out, op)
    assert out.tolist() == expected[op]().tolist()
    x[2] += step
    with pytest.raises(InterpreterError, match=f"int32 overflow detected for {op}"):
        _integers_kernel[(1,)](x, out, op)
    _integers_kernel[(1,)](x.long(), out.long(), op)


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        (
            interpreter.InterpreterBuilder,
            "binary_op",
            "expects of its interpreter InterpreterBuilder.binary_op$",
        ),
        (interpreter.ScanOps, "cumsum", "ScanOps.cumsum"),
        (interpreter.interpreter, "_get_np_dtype", "bfloat16 kept in uint16"),
    ],
)
def test_another_interpreter_is_not_corrected(owner, name, message, monkeypatch):
    cast = interpreter.InterpreterBuilder.cast_impl
    if name == "_get_np_dtype":
        monkeypatch.setattr(owner, name, lambda dtype: "float32")
    else:
        monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError, match=message):
        interpreter.install()
    assert interpreter.InterpreterBuilder.cast_impl is cast
