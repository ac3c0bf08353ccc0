"""What the kernel tests share: device and dtypes, layouts of tensors in memory, and the comparison of one
call on three implementations.

The same tests run compiled on a GPU, or in Triton's interpreter on a CPU (set by conftest.py without a GPU).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numerics
import pytest
import torch
from torch import Tensor

from kernels import TORCH, Backend, launch_config, reference, select_backend
from kernels.eager import linear
from kernels.eager.attention import library_attention
from kernels.types import OPS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
PLACE = torch.empty(0, device=DEVICE).device  # as a tensor names it: "cuda:0" where DEVICE is "cuda"
TRITON = select_backend("triton", DEVICE)
ORACLE = Backend(name="reference", **{op: getattr(reference, op) for op in OPS})
# The base has the library's products in the MLP, as the tested code has. In 16 bits the formula of attention
# rounds once, but any attention that does not keep its scores rounds three times: the base is torch's own.
BASE = dataclasses.replace(ORACLE, attention=library_attention, mlp=linear.mlp)

LENGTHS = [1, 7, 63, 64, 65, 127, 200, 257]
EPS = 1e-5

Layout = Callable[[Tensor], Tensor]

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
# Where a case takes ten seconds: smaller cases test fp16, which has the same code as bf16.
WITHOUT_FP16 = [DTYPES[0], DTYPES[2]]


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal noise from the global CPU generator (seeded for each test), the same on every device."""
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    """fp32 cos and sin of random angles."""
    angle = torch.rand(shape) * 6.3
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


@contextmanager
def configured_for(target: str) -> Iterator[None]:
    """In this context the launch table is read for another target."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_config, "architecture", lambda device: target)
        patch.setattr(launch_config, "DEPENDENT_LAUNCH", ())  # the interpreter has nothing to wait for
        launch_config.launch_config.cache_clear()
        yield
    launch_config.launch_config.cache_clear()


# Layouts: the same values at other addresses, with NaN (or a huge number) in between to show a wrong address.


def _poison(shape: Sequence[int], like: Tensor) -> Tensor:
    value = float("nan") if like.is_floating_point() else 10**9
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


def dense(x: Tensor) -> Tensor:
    return x.contiguous()


def gap(x: Tensor, dim: int = 0, step: int = 2) -> Tensor:
    """Every second row of a larger buffer (or every second column, ...)."""
    shape = list(x.shape)
    shape[dim] *= step
    buffer = _poison(shape, x)
    view = buffer[(slice(None),) * (dim % x.dim()) + (slice(None, None, step),)]
    return view.copy_(x)


def inner(x: Tensor, before: int = 3, after: int = 2) -> Tensor:
    """Columns out of the middle of a wider buffer: an odd offset, an odd row stride."""
    buffer = _poison((*x.shape[:-1], before + x.shape[-1] + after), x)
    return buffer[..., before : before + x.shape[-1]].copy_(x)


def swapped(x: Tensor, a: int = 0, b: int = 1) -> Tensor:
    """Stored with two dimensions swapped."""
    return x.transpose(a, b).contiguous().transpose(a, b)


def expanded(x: Tensor, dim: int = 0) -> Tensor:
    """The first row everywhere, stored once (other values than x)."""
    return x.narrow(dim, 0, 1).expand(x.shape)


def far(x: Tensor, dim: int) -> Tensor:
    """fp16 x with its three slices along `dim` more than 2^30 elements apart, so that int32 cannot index it.

    The view starts in the middle of its buffer (8 GiB, of which few pages are touched): an offset that wraps
    around to -2^31 reads the same buffer and gives a wrong result, not a crash.
    """
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    stride, middle = 2**30 + 64, 2**31 + 2**12
    assert x.shape[dim] == 3
    strides = list(torch.empty([n for d, n in enumerate(x.shape) if d != dim]).stride())
    strides.insert(dim, stride)
    try:  # not by torch.empty: where that is poisoned, all of it would be touched
        buffer = torch.zeros(0, dtype=torch.float16, device=DEVICE).resize_(2 * middle + stride)
    except RuntimeError as error:
        pytest.skip(f"no 10 GiB of address space: {error}")
    return buffer.as_strided(x.shape, strides, middle).copy_(x)


# Layouts of [rows, columns], and of [B, T, H, D].
ROW_LAYOUTS = {
    "dense": dense,
    "columns of a wider buffer": inner,
    "every second row": gap,
    "every second column": lambda x: gap(x, dim=-1),
    "transposed": swapped,
    "expanded": expanded,
    "one value": lambda x: expanded(expanded(x, 1), 0),
}
HEAD_LAYOUTS = {
    "dense": dense,
    "columns of a wider buffer": inner,
    "every second token": lambda x: gap(x, dim=1),
    "every second head": lambda x: gap(x, dim=2),
    "every second column": lambda x: gap(x, dim=3),
    "heads first": lambda x: swapped(x, 1, 2),
    "tokens first": swapped,
    "last first": lambda x: swapped(x, 2, 3),
    "expanded batch": expanded,
    "expanded tokens": lambda x: expanded(x, 1),
    "expanded heads": lambda x: expanded(x, 2),
    "one value": lambda x: expanded(expanded(expanded(expanded(x, 3), 2), 1), 0),
}


def over(layouts: dict[str, Layout], name: str = "layout") -> Any:
    """Parametrises a test over layouts."""
    return pytest.mark.parametrize(name, layouts.values(), ids=layouts.keys())


NAMES = {
    "rms_norm": (("y",), ("dx", "dw")),
    "add_rms_norm": (("y", "sum"), ("dx", "dresidual", "dw")),
    "rope": (("q", "k"), ("dq", "dk")),
    "rope_qkv": (("q", "k", "v"), ("dqkv",)),
    "rope_cache": (("q", "keys", "values"), ()),
    "attention": (("out",), ("dq", "dk", "dv")),
    "decode_attention": (("out",), ()),
    "swiglu": (("y",), ("dgate", "dup")),
    "mlp": (("y",), ("dx", "dgate_up", "ddown")),
    "tied_embedding": (("x", "head"), ("dweight",)),
    "linear_cross_entropy": (("loss",), ("dhidden", "dweight")),
}
# What an operation writes: the index of a tensor in a Call, whose copy is an output after those returned.
WRITTEN = {"rope_cache": (3, 4)}


@dataclass
class Call:
    """One call of an operation: op(*tensors, *rest, **options); gradients are those of `tensors`."""

    op: str
    tensors: Sequence[Tensor]
    rest: Sequence[Any] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def double(self) -> Call:
        """The same call on float64 copies, with a float64 result: the truth."""
        call = self._converted(lambda x: x.double() if x.is_floating_point() else x)
        call.rest = [torch.float64 if isinstance(x, torch.dtype) else x for x in call.rest]
        return call

    def plain(self) -> Call:
        """The same call on dense copies."""
        return self._converted(lambda x: x.clone(memory_format=torch.contiguous_format))

    def _converted(self, convert: Layout) -> Call:
        rest = [convert(x) if isinstance(x, Tensor) else x for x in self.rest]
        return Call(self.op, [convert(x) for x in self.tensors], rest, self.options)

    def forward(self, backend: Any) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """(leaves, outputs) on that backend."""
        differentiable = self.op not in ("decode_attention", "rope_cache")  # the cache has no gradient
        tensors = [x.detach().requires_grad_(differentiable and x.is_floating_point()) for x in self.tensors]
        out = getattr(backend, self.op)(*tensors, *self.rest, **self.options)
        written = [tensors[index].clone() for index in WRITTEN.get(self.op, ())]
        outputs = (*(out if isinstance(out, tuple) else (out,)), *written)
        return [x for x in tensors if x.is_floating_point()], outputs

    def run(self, backend: Any, upstream: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(outputs, gradients of `tensors`) for those upstream gradients."""
        leaves, outputs = self.forward(backend)
        gradients = torch.autograd.grad(outputs, leaves, upstream) if leaves[0].requires_grad else ()
        if self.options.get("reduction") == "sum":
            outputs = (self._summed(backend, outputs[0]),)
        return tuple(y.detach() for y in outputs), gradients

    def _summed(self, backend: Any, total: Tensor) -> Tensor:
        """The losses [N] that make up this total. The last place of a total above 16 is worth more than the
        contract allows, so each loss is held to it, and the total to the bits of their sum.
        """
        scale = self.options.get("scale")
        losses, scaled = (
            getattr(backend, self.op)(
                *self.tensors, *self.rest, **self.options | {"reduction": "none", "scale": x}
            )
            for x in (None, scale)
        )
        assert_same([total.detach()], [losses.sum() if scale is None else losses.sum() * scale])
        return scaled

    def upstream(self, layout: Layout = dense) -> list[Tensor]:
        """Random gradients of the outputs, in their shapes and dtypes."""
        _, outputs = self.plain().forward(ORACLE)
        return [layout(draw(*y.shape, dtype=y.dtype)) for y in outputs]


def agree(
    op: str, tensors: Sequence[Tensor], *rest: Any, upstream: Layout = dense, **options: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Holds both backends to the numerics contract: outputs, and gradients of `tensors` for random upstream
    gradients of that layout. Returns the kernel's outputs and gradients.
    """
    call = Call(op, tensors, rest, options)
    gradients = call.upstream(upstream)
    ours = call.run(TRITON, gradients)
    base = call.plain().run(BASE, [dense(dy) for dy in gradients])
    truth = call.double().run(ORACLE, [dy.double() for dy in gradients])
    for checked, found in ((op, ours), (f"{op}, torch", call.run(TORCH, gradients))):
        for names, *three in zip(NAMES[op], found, base, truth, strict=True):  # outputs, then gradients
            assert len(three[0]) == len(three[2])
            # a packed buffer has one gradient where two tensors have two
            for name, *tensors in zip(names, *three, strict=False):
                numerics.check(checked, name, *tensors)
    return ours


def assert_same(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bitwise equality of tensors, one by one."""
    assert len(ours) == len(expected)
    for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(a, b), f"tensor {index}: {int((a != b).sum())} of {a.numel()} values differ"


def small_calls(dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """A small call of every operation, with tails in tiled dimensions, on strided views where possible."""
    tables = angles(2, 19, 16)
    qkv = draw(2, 70, 5, 32, dtype=dtype)
    doc_start = torch.tensor([[0] * 33 + [33] * 37, [0] * 70], dtype=torch.int32, device=DEVICE)
    targets = torch.randint(0, 101, (9,))
    targets[::4] = -100
    d = functools.partial(draw, dtype=dtype)
    keys, lengths = gap(d(2, 140, 1, 32), dim=1), torch.tensor([140, 33], device=DEVICE)
    return {
        "rms_norm": Call("rms_norm", (gap(d(7, 96)), d(96)), (EPS,)),
        "add_rms_norm": Call("add_rms_norm", (d(7, 96), gap(d(7, 96)), d(96)), (EPS,)),
        "rope": Call("rope", (inner(d(2, 19, 3, 32)), d(2, 19, 1, 32)), tables),
        "rope_qkv": Call("rope_qkv", (inner(d(2, 19, 5, 32)),), (*tables, 1)),
        "rope_cache": Call(
            "rope_cache",
            (inner(d(2, 3, 5, 32)), *angles(2, 3, 16), keys, d(2, 140, 1, 32)),
            (lengths,),
        ),
        "attention": Call("attention", qkv.split((3, 1, 1), dim=2), (doc_start,)),
        "decode_attention": Call("decode_attention", (d(2, 2, 3, 32), keys, d(2, 140, 1, 32)), (lengths,)),
        "swiglu": Call("swiglu", (gap(d(5, 513)), inner(d(5, 513)))),
        "swiglu packed": Call("swiglu", (inner(d(5, 2 * 513)),)),
        "mlp": Call("mlp", (gap(d(37, 72)), inner(d(80, 72)), d(72, 40, scale=0.1))),
        "linear_cross_entropy": Call(
            "linear_cross_entropy",
            (gap(d(9, 48)), d(101, 48, scale=0.3)),
            (targets.to(DEVICE),),
            dict(z_loss=0.01, label_smoothing=0.1),
        ),
        "tied_embedding": Call(
            "tied_embedding", (gap(torch.randint(0, 7, (2, 19)).to(DEVICE)), gap(d(11, 48))), (dtype,)
        ),
    }


CALLS = [
    "rms_norm", "add_rms_norm", "rope", "rope_qkv", "rope_cache", "attention", "decode_attention", "swiglu",
    "swiglu packed", "linear_cross_entropy", "tied_embedding", "mlp",
]  # fmt: skip
