"""What one operation is made of for a measurement: its shapes, its inputs, its variants, and how a variant
finds its library.

A Case makes its own inputs from a seed, so that every variant gets the same numbers in tensors of its own:
some libraries write their gradients over their inputs.

A variant of a library that is not installed, or has kernels for a GPU only, raises the reason when it is
called (bench/peers/status.py).
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import work
from bench.peers import status
from kernels import TORCH, Backend
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError

EPS = 1e-5
# Largest ||ours - truth|| / ||truth|| over outputs and gradients.
ERROR_BOUND = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}


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


class Variant:
    """One implementation of a case, on tensors of its own: several sets of them, so that one replay holds
    several calls.
    """

    def __init__(self, case: Case, name: str, sets: int) -> None:
        self._function = case.variants[name]
        self._joint = case.joint
        self._sets = [case.inputs(seed) for seed in range(sets)]
        self._wanted = [index for index, tensor in enumerate(self._sets[0]) if tensor.requires_grad]
        self._upstream: list[Tensor] = []
        if self._wanted:
            outputs = self._outputs(self._sets[0])
            generator = torch.Generator(outputs[0].device).manual_seed(12345)
            draws = (torch.randn(y.shape, generator=generator, device=y.device) for y in outputs)
            self._upstream = [draw.to(y.dtype) for draw, y in zip(draws, outputs, strict=True)]

    def results(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Outputs and gradients of the first set, computed from inputs converted to dtype."""
        inputs = self._sets[0]
        if dtype is not None:
            inputs = [
                x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x
                for x in inputs
            ]
        outputs = self._outputs(inputs)
        gradients = self._gradients(outputs, inputs) if self._wanted else []
        return [*(output.detach() for output in outputs), *gradients]

    def phases(self) -> dict[str, Callable[[], Callable[[], object]]]:
        """Phase -> a function that prepares it and returns the call to be timed."""
        found: dict[str, Callable[[], Callable[[], object]]] = {"forward": lambda: self._forward}
        if self._wanted and self._joint:
            found["forward+backward"] = self._prepare_both
        elif self._wanted:
            found["backward"] = self._prepare_backward
        return found

    def call(self) -> object:
        """A plain forward call."""
        with torch.no_grad():
            return self._function(*self._sets[0])

    def through_autograd(self) -> object:
        """A plain forward call and its gradients."""
        return self._gradients(self._outputs(self._sets[0]), self._sets[0])

    @property
    def differentiable(self) -> bool:
        return bool(self._wanted)

    def _outputs(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        result = self._function(*inputs)
        return result if isinstance(result, tuple) else (result,)

    def _gradients(
        self, outputs: tuple[Tensor, ...], inputs: list[Tensor], keep: bool = False
    ) -> list[Tensor]:
        upstream = [given.to(output.dtype) for given, output in zip(self._upstream, outputs, strict=True)]
        wanted = [inputs[index] for index in self._wanted]
        return list(torch.autograd.grad(outputs, wanted, upstream, retain_graph=keep))

    def _forward(self) -> object:
        with torch.no_grad():
            return [self._function(*inputs) for inputs in self._sets]

    def _prepare_backward(self) -> Callable[[], object]:
        done = [(self._outputs(inputs), inputs) for inputs in self._sets]
        return lambda: [self._gradients(outputs, inputs, keep=True) for outputs, inputs in done]

    def _prepare_both(self) -> Callable[[], object]:
        return lambda: [self._gradients(self._outputs(inputs), inputs) for inputs in self._sets]


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative distance ||found - truth|| / ||truth|| of any tensor; infinite for what is not
    finite.
    """
    worst = 0.0
    for ours, exact in zip(found, truth, strict=True):
        wide = exact.to(torch.promote_types(exact.dtype, torch.float32))
        norms = [torch.linalg.vector_norm(x) for x in (ours.to(wide.dtype) - wide, wide)]
        distance = norms[0] / norms[1].clamp(min=1e-30)
        worst = max(worst, distance.item() if distance.isfinite() else math.inf)
    return worst


def exact_results(case: Case, dtype: torch.dtype) -> list[Tensor] | None:
    """What the reference gives in fp32 (in fp64 for fp32); None where that does not fit into memory, as long
    attention without a fused kernel.
    """
    with contextlib.suppress(torch.OutOfMemoryError):
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        return Variant(case, "reference", 1).results(wide)
    return None


def checked(
    case: Case, name: str, sets: int, truth: list[Tensor] | None, dtype: torch.dtype
) -> tuple[Variant, list[Tensor], float | None]:
    """A variant, its results, and their distance from the truth, where that is known and the variant computes
    it. Raises UsageError for a variant that is wrong, and whatever the variant raises.
    """
    variant = Variant(case, name, sets)
    results = variant.results()
    distance = None if name in case.unchecked or truth is None else error(results, truth)
    if (distance or 0.0) > ERROR_BOUND[dtype]:
        raise UsageError(f"wrong: relative error {distance:.1e}")
    return variant, results, distance


def forms(
    op: str, backend: Backend, compiled: Compile, given: Callable[[Any], Any] = lambda call: call
) -> dict[str, Callable[..., Any]]:
    """The three forms that every operation has. given: adds the arguments that are no tensors of a case."""
    ours, reference = given(getattr(backend, op)), given(getattr(TORCH, op))
    return {"triton": ours, "reference": reference, "compile": compiled(reference)}


def with_eps(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: function(*tensors, EPS)
