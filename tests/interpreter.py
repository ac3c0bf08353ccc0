"""Triton's interpreter, corrected for bfloat16.

It keeps bf16 as bit patterns, in uint16. As shipped it truncates fp32 to bf16 and adds, compares and
multiplies (in tl.dot, too) the patterns themselves. Corrected, an operation sees the fp32 values of its bf16
operands, and its result is rounded to the nearest, ties to even. So does compiled code (add.bf16, mul.bf16,
cvt.rn.bf16.f32), which may only make one fma of a product and a sum. Rounding first to fp32 makes no
difference to a normal result: 24 bits are more than two times 8 and 2.
A sum or scan of bf16 rounds after every step, in order. What would take more to be right is refused:
conversions of bf16 other than from and to fp32 (Triton makes most of them through fp32), tl.fma and atomics
on bf16.
A tl.dot adds up alike for every element, on every processor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

REFUSED = ("create_fma", "create_fp_to_fp", "create_atomic_rmw")
# Parts of names. These operations move bit patterns, or convert by cast_impl; every other one is given
# values.
ON_BITS = (
    "load",
    "store",
    "scatter",
    "atomic",
    "cast",
    "_to_",
    "fp_ext",
    "fp_trunc",
    "reshape",
    "trans",
    "splat",
    "expand_dims",
)
WIDE = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def decode(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bf16 bit patterns -> their values, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """fp32 -> bf16 bit patterns: to the nearest, ties to even, overflow to infinity. A NaN becomes the quiet
    one, 0x7FC0.
    """
    bits = values.view(np.uint32)
    kept = bits >> 16
    rounded = kept + ((bits & 0xFFFF) + (kept & 1) > 0x8000)
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def is_bf16(x: Any) -> bool:
    """Of a handle or a type; a pointer to bf16 is none."""
    dtype = x.dtype if isinstance(x, TensorHandle) else x
    return isinstance(dtype, tl.dtype) and dtype.scalar == tl.bfloat16


def _decoded(x: Any) -> Any:
    return TensorHandle(decode(x.data), tl.float32) if isinstance(x, TensorHandle) and is_bf16(x) else x


def _encoded(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_encoded, x))
    # not what a comparison gives
    return TensorHandle(encode(x.data), tl.bfloat16) if x.data.dtype == np.float32 else x


def _on_values(operation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def on_values(self: Any, *args: Any) -> Any:
        handles = [x for x in args if isinstance(x, TensorHandle)]
        floats = [
            is_bf16(x) for x in handles if x.dtype.scalar.is_floating() and x.data.dtype != bool
        ]  # a comparison keeps the operands' type
        if not any(floats):
            return operation(self, *args)
        result = operation(self, *map(_decoded, args))
        return _encoded(result) if all(floats) else result  # tl.dot adds to an fp32 accumulator

    return on_values


def _dot(self: Any, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *options: Any) -> TensorHandle:
    """Takes 16 elements of k at a time, as matrix instructions do, and adds their exact products before it
    rounds. numpy's own product of fp32 adds up in an order that depends on the processor, on the length of k
    and on where in the tile an element stands.
    """
    total = acc.data
    for k in range(0, a.data.shape[-1], 16):
        left, right = a.data[..., k : k + 16], b.data[..., k : k + 16, :]
        total = (total + np.matmul(left, right, dtype=np.float64)).astype(acc.data.dtype)
    return TensorHandle(total, acc.dtype.scalar)


def _refuse(operation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def refuse(self: Any, *args: Any) -> Any:
        if any(map(is_bf16, args)):
            raise NotImplementedError(
                f"{operation.__name__} on bfloat16 in the interpreter: go through float32"
            )
        return operation(self, *args)

    return refuse


def _cast(cast_impl: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        if is_bf16(source) == is_bf16(target):
            return cast_impl(self, source, target)
        if is_bf16(source) and target.scalar == tl.float32:
            return _decoded(source)
        if source.dtype.scalar == tl.float32:
            return TensorHandle(encode(source.data), tl.bfloat16)
        raise NotImplementedError(f"{source.dtype} to {target.scalar} in the interpreter: go through float32")

    return cast


def _stepwise(at_once: Callable[..., Any], by_step: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(self: Any, x: Any) -> Any:
        inputs = x if isinstance(x, tuple) else (x,)
        return by_step(self, inputs) if any(is_bf16(y.dtype) for y in inputs) else at_once(self, x)

    return reduce


def _once(patch_lang: Callable[..., Any]) -> Callable[..., Any]:
    """Without the repetitions: Triton puts the interpreter's functions into its language at every launch and
    takes them out at its end, but also puts them there again at every call of a function in between. That
    took half of a small kernel's time.
    """

    def patch(fn: Any) -> Any:
        if any(tl.core.is_builtin(x.load) for x in fn.__globals__.values() if x is tl or x is tl.core):
            return patch_lang(fn)
        return interpreter._LangPatchScope()  # nothing to take back

    return patch


def _check_overflow(lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
    """What compiled code asserts in debug mode. Triton's interpreter computes it by five operations of its
    language, which takes a third of a kernel's time, and drops the result.
    """
    scalar = lhs.type.scalar
    if scalar.int_bitwidth < 64:
        exact = WIDE[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        low, high = scalar.get_int_min_value(), scalar.get_int_max_value()
        assert low <= exact.min() and exact.max() <= high, (
            f"{scalar} overflow detected for {operation.__name__}"
        )


def _remembered(get_np_dtype: Callable[..., Any]) -> Callable[..., Any]:
    """Triton makes a table of all types whenever it looks up one."""
    known: dict[str, Any] = {}

    def get(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = get_np_dtype(scalar)
        return known[scalar.name]

    return get


def _remembered_types(make: Callable[..., None]) -> Callable[..., None]:
    """Every operation makes a type of its result, and checks its shape; there are few."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if key not in known:
            make(self, element_ty, shape)
            known[key] = dict(vars(self))
        self.__dict__.update(known[key], element_ty=element_ty)

    return init


def _remembered_shapes(make: Callable[..., None]) -> Callable[..., None]:
    """Every operation describes the shape of its result in constants of the language; there are few."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in known:
            make(self, handle, type)
            known[key] = {"shape": self.shape, "numel": self.numel}
        self.__dict__.update(known[key], handle=handle, type=type, dtype=type.scalar)

    return init


def _unless_alike(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Two operands of one shape need no broadcast, and no comparison of their shapes: see above."""
    return lambda lhs, rhs: (lhs, rhs) if lhs.shape is rhs.shape else broadcast(lhs, rhs)


def install() -> None:
    """Corrects the interpreter of this process; once.

    Raises RuntimeError, naming what was expected, where Triton's interpreter is no longer made as it was in
    3.6 and 3.7.
    """
    expected = {
        InterpreterBuilder: ("cast_impl", "binary_op", "create_dot", *REFUSED),
        ReduceOps: ("apply_impl", "generic_reduce"),
        ScanOps: ("cumsum", "cumprod", "generic_scan"),
        interpreter: ("_patch_lang", "_LangPatchScope"),
        TritonSemantic: ("binary_op_sanitize_overflow_impl", "broadcast_impl_value"),
    }
    missing = [
        f"{owner.__name__}.{name}"
        for owner, names in expected.items()
        for name in names
        if not hasattr(owner, name)
    ]
    if interpreter._get_np_dtype(tl.bfloat16) != np.uint16:
        missing.append("bfloat16 kept in uint16")
    if missing:
        here = f"Triton {triton.__version__}: tests/interpreter.py"
        raise RuntimeError(f"{here} expects of its interpreter {', '.join(missing)}")

    interpreter._patch_lang = _once(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _remembered_types(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = _remembered_shapes(tl.core.tensor.__init__)
    semantic = interpreter.interpreter_semantic
    semantic.broadcast_impl_value = _unless_alike(semantic.broadcast_impl_value)
    semantic.binary_op_sanitize_overflow_impl = _check_overflow
    InterpreterBuilder.create_dot = _dot
    for name in dir(InterpreterBuilder):
        if name in REFUSED:
            setattr(InterpreterBuilder, name, _refuse(getattr(InterpreterBuilder, name)))
        elif name.startswith("create_") and not any(part in name for part in ON_BITS):
            setattr(InterpreterBuilder, name, _on_values(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(
        encode(np.array([value], dtype=np.float32)), tl.bfloat16
    )
    ReduceOps.apply_impl = _stepwise(ReduceOps.apply_impl, ReduceOps.generic_reduce)
    for name in ("cumsum", "cumprod"):
        setattr(ScanOps, name, _stepwise(getattr(ScanOps, name), ScanOps.generic_scan))
