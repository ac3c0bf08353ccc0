"""What is timed: every operation at the model's shapes, each with what one would use instead.

A Case makes its own inputs from a seed, so that every variant gets the same numbers in tensors of its own: some libraries write their
gradients over their inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import work
from kernels import TORCH, Backend
from smollm2.config import SmolLM2Config
from smollm2.model import rotary_tables

EPS = 1e-5
CHUNK_TOKENS = 4096  # of the three bare products that the loss is compared with


@dataclass(frozen=True)
class Shapes:
    """A model's shapes at one batch size, and where to make tensors of them."""

    config: SmolLM2Config
    batch: int
    length: int
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key heads, head dim."""
        return self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim


@dataclass(frozen=True)
class Case:
    """One operation.

    inputs: seed -> tensors, those with requires_grad get gradients. variants: name -> function of the inputs; "reference" is the
    specification. joint: both gradients are formed in the forward pass, so that only the sum of the two can be timed.
    unchecked: variants that compute something else on purpose.
    """

    op: str
    cost: work.Cost
    inputs: Callable[[int], list[Tensor]]
    variants: dict[str, Callable[..., Any]]
    joint: bool = False
    unchecked: frozenset[str] = field(default_factory=frozenset)


def cases(shapes: Shapes, backend: Backend, compiler: str) -> list[Case]:
    """All operations. compiler: backend of torch.compile, "inductor" where times count."""
    makers = (_add_rms_norm, _swiglu, _attention, _linear_cross_entropy, _rms_norm, _rope_qkv, _decode_attention)
    return [make(shapes, backend, lambda function: torch.compile(function, backend=compiler, dynamic=False)) for make in makers]


Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def _normal(shapes: Shapes, seed: int, *sizes: tuple[int, ...]) -> list[Tensor]:
    """Random tensors that want gradients."""
    generator = torch.Generator(shapes.device).manual_seed(seed)
    drawn = (torch.randn(size, generator=generator, device=shapes.device).to(shapes.dtype) for size in sizes)
    return [tensor.requires_grad_() for tensor in drawn]


def _liger(function: str) -> Callable[..., Any]:
    """A function of Liger-Kernel, looked up when it is called: where it is not installed, the call says so."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module("liger_kernel.transformers.functional"), function)(*args, **kwargs)

    return call


def _rms_norm(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    hidden = shapes.config.hidden_size
    reference = _with_eps(TORCH.rms_norm)
    return Case(
        "rms_norm",
        work.rms_norm(shapes.tokens, hidden, shapes.dtype.itemsize),
        lambda seed: _normal(shapes, seed, (shapes.batch, shapes.length, hidden), (hidden,)),
        {
            "triton": _with_eps(backend.rms_norm),
            "reference": reference,
            "compile": compiled(reference),
            "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
            "liger": lambda x, weight: _liger("liger_rms_norm")(x, weight, EPS, in_place=False),
        },
    )


def _add_rms_norm(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    hidden = shapes.config.hidden_size
    stream = (shapes.batch, shapes.length, hidden)
    reference = _with_eps(TORCH.add_rms_norm)

    def aten(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, EPS), total

    return Case(
        "add_rms_norm",
        work.add_rms_norm(shapes.tokens, hidden, shapes.dtype.itemsize),
        lambda seed: _normal(shapes, seed, stream, stream, (hidden,)),
        {
            "triton": _with_eps(backend.add_rms_norm),
            "reference": reference,
            "compile": compiled(reference),
            "F.rms_norm": aten,
            "liger": lambda x, residual, weight: _liger("liger_fused_add_rms_norm")(x, residual, weight, EPS, in_place=False),
        },
    )


def _with_eps(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: function(*tensors, EPS)


def _rope_qkv(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    heads, key_heads, head_dim = shapes.heads
    cos, sin = (table[: shapes.length] for table in rotary_tables(shapes.config, shapes.device))

    def with_tables(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda qkv: function(qkv, cos, sin, key_heads)

    def liger(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.split((heads, key_heads, key_heads), dim=2)
        full = [torch.cat((table, table), -1)[None].to(qkv.dtype) for table in (cos, sin)]
        q, k = _liger("liger_rope")(q.transpose(1, 2), k.transpose(1, 2), *full)
        return q.transpose(1, 2), k.transpose(1, 2), v

    return Case(
        "rope_qkv",
        work.rope_qkv(shapes.tokens, shapes.length, heads, key_heads, head_dim, shapes.dtype.itemsize),
        lambda seed: _normal(shapes, seed, (shapes.batch, shapes.length, heads + 2 * key_heads, head_dim)),
        {
            "triton": with_tables(backend.rope_qkv),
            "reference": with_tables(TORCH.rope_qkv),
            "compile": compiled(with_tables(TORCH.rope_qkv)),
            "liger": liger,
        },
    )


def _attention(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    heads, key_heads, head_dim = shapes.heads

    def sdpa(kind: SDPBackend) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                out = F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=heads != key_heads
                )
            return out.transpose(1, 2)

        return call

    sizes = [(shapes.batch, shapes.length, count, head_dim) for count in (heads, key_heads, key_heads)]
    return Case(
        "attention",
        work.attention(shapes.batch, shapes.length, heads, key_heads, head_dim, shapes.dtype.itemsize),
        lambda seed: _normal(shapes, seed, *sizes),
        {
            "triton": backend.attention,
            "reference": TORCH.attention,
            "flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        },
    )


def _decode_attention(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """One new token for each of 2 B rows, over full caches of 2 T keys: 64 rows of 1,024 keys at the full size."""
    heads, key_heads, head_dim = shapes.heads
    batch, keys = 2 * shapes.batch, 2 * shapes.length

    def inputs(seed: int) -> list[Tensor]:
        tensors = _normal(shapes, seed, (batch, 1, heads, head_dim), *[(batch, keys, key_heads, head_dim)] * 2)
        return [*(tensor.requires_grad_(False) for tensor in tensors), torch.full((batch,), keys, device=shapes.device)]

    return Case(
        "decode_attention",
        work.decode_attention(batch, keys, heads, key_heads, head_dim, shapes.dtype.itemsize),
        inputs,
        {"triton": backend.decode_attention, "reference": TORCH.decode_attention, "compile": compiled(TORCH.decode_attention)},
    )


def _swiglu(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    width = shapes.config.intermediate_size
    return Case(
        "swiglu",
        work.swiglu(shapes.tokens, width, shapes.dtype.itemsize),
        lambda seed: _normal(shapes, seed, (shapes.batch, shapes.length, 2 * width)),
        {
            "triton": backend.swiglu,
            "reference": TORCH.swiglu,
            "compile": compiled(TORCH.swiglu),
            "liger": lambda packed: _liger("liger_swiglu")(*packed.chunk(2, dim=-1)),
        },
    )


def _linear_cross_entropy(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    hidden, vocabulary, tokens = shapes.config.hidden_size, shapes.config.vocab_size, shapes.tokens

    def inputs(seed: int) -> list[Tensor]:
        states, weight = _normal(shapes, seed, (tokens, hidden), (vocabulary, hidden))
        weight = (weight.detach().float() * hidden**-0.5).requires_grad_()  # fp32, as the model passes it
        generator = torch.Generator(shapes.device).manual_seed(seed)
        return [states, weight, torch.randint(vocabulary, (tokens,), generator=generator, device=shapes.device)]

    def plain(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(states, weight.to(states.dtype)).float(), targets)

    return Case(
        "linear_cross_entropy",
        work.linear_cross_entropy(tokens, vocabulary, hidden, shapes.dtype.itemsize),
        inputs,
        {
            "triton": backend.linear_cross_entropy,
            "reference": TORCH.linear_cross_entropy,
            "all logits": plain,
            "compile": compiled(plain),
            "liger": lambda states, weight, targets: _liger("liger_fused_linear_cross_entropy")(states, weight.to(states.dtype), targets),
            "products only": lambda states, weight, _: _Products.apply(states, weight, torch.is_grad_enabled()),
        },
        joint=True,
        unchecked=frozenset({"products only"}),
    )


class _Products(torch.autograd.Function):
    """The matrix products of the loss and nothing else, chunk by chunk: three with gradients, one without. The loss takes no less."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, gradients: bool) -> Tensor:
        head = weight.to(states.dtype)
        dstates, dweight = torch.empty_like(states), torch.zeros_like(head)
        for start in range(0, states.shape[0], CHUNK_TOKENS):
            rows = states[start : start + CHUNK_TOKENS]
            logits = rows @ head.t()
            if gradients:
                torch.mm(logits, head, out=dstates[start : start + CHUNK_TOKENS])
                dweight.addmm_(logits.t(), rows)
        ctx.save_for_backward(dstates, dweight)
        return states.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dstates, dweight = ctx.saved_tensors
        return dstates, dweight.float(), None
