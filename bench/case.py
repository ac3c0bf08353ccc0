"""What one operation is made of for a measurement: its shapes, its inputs, its variants, and how a variant
finds its library.

A Case makes its own inputs from a seed, so that every variant gets the same numbers in tensors of its own:
some libraries write their gradients over their inputs.

A variant of a library that is not installed, or has kernels for a GPU only, raises the reason when it is
called (bench/peers/status.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import work
from bench.peers import status
from smollm2.config import SmolLM2Config


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

    inputs: seed -> tensors, those with requires_grad get gradients. variants: name -> function of the inputs;
    "reference" is the specification, "triton" ours, and "triton ..." another form of ours. joint: both
    gradients are formed in the forward pass, so that only the sum of the two can be timed. unchecked:
    variants that compute something else on purpose.
    """

    op: str
    cost: work.Cost
    inputs: Callable[[int], list[Tensor]]
    variants: dict[str, Callable[..., Any]]
    joint: bool = False
    unchecked: frozenset[str] = field(default_factory=frozenset)
    tokens: int | None = None  # of one call; None: those of the shapes


Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def compile_with(compiler: str) -> Compile:
    return lambda function: torch.compile(function, backend=compiler, dynamic=False)


def normal(shapes: Shapes, seed: int, *sizes: tuple[int, ...]) -> list[Tensor]:
    """Random tensors that want gradients."""
    generator = torch.Generator(shapes.device).manual_seed(seed)
    drawn = (torch.randn(size, generator=generator, device=shapes.device).to(shapes.dtype) for size in sizes)
    return [tensor.requires_grad_() for tensor in drawn]


def library(peer: str, module: str, function: str, device: torch.device) -> Callable[..., Any]:
    """A function of a library with kernels for GPUs, looked up when it is called; the call raises Unavailable
    where it cannot run.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        status.require(peer, device)
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call


def from_liger(shapes: Shapes, function: str) -> Callable[..., Any]:
    return library("liger-kernel", "liger_kernel.transformers.functional", function, shapes.device)


def from_quack(shapes: Shapes, module: str, function: str) -> Callable[..., Any]:
    return library("quack-kernels", module, function, shapes.device)
