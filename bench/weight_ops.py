"""The operations that weights are half of: the loss, the MLP, the tied embedding; and the step of the
optimizer, which no switch has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from bench import work
from bench.case import Case, Compile, Shapes, from_liger, from_quack, normal
from kernels import TORCH, Backend
from kernels.eager.linear import mlp as composed_mlp
from kernels.products import weight_gradient
from smollm2.model import SmolLM2ForCausalLM
from smollm2.working_copies import WorkingCopies

# tokens whose logits exist at one time, beside what the loss takes by itself
CHUNKS = (4096, 5632, 8192, 16384)
QUACK_CHUNK = 4096
MAX_NORM = 1.0
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
LEARNING_RATE = 0.1  # large, so that what is wrong with an update shows beside the weights


def linear_cross_entropy(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """The weight is in fp32, as the model has it, and every variant casts it; "products only" finds it
    cast.
    """
    hidden, vocabulary, tokens = shapes.config.hidden_size, shapes.config.vocab_size, shapes.tokens

    def scaled(weight: Tensor) -> Tensor:
        return weight.detach() * hidden**-0.5

    def inputs(seed: int) -> list[Tensor]:
        states, weight = normal(shapes, seed, (tokens, hidden), (vocabulary, hidden))
        generator = torch.Generator(shapes.device).manual_seed(seed)
        targets = torch.randint(vocabulary, (tokens,), generator=generator, device=shapes.device)
        return [states, scaled(weight.float()).requires_grad_(), targets]

    def plain(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(states, weight.to(states.dtype)).float(), targets)

    def liger(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        function = from_liger(shapes, "liger_fused_linear_cross_entropy")
        loss: Tensor = function(states, weight.to(states.dtype), targets)
        return loss

    def quack(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        function = from_quack(shapes, "quack.linear_cross_entropy", "chunked_linear_cross_entropy")
        loss: Tensor = function(states, weight.to(states.dtype), targets, chunk_size=QUACK_CHUNK)
        return loss

    def chunked(chunk: int) -> Callable[..., Tensor]:
        return functools.partial(backend.linear_cross_entropy, chunk_tokens=chunk)

    # Random numbers, because a product of zeros runs faster.
    head = functools.cache(lambda: scaled(normal(shapes, 1, (vocabulary, hidden))[0]))
    return Case(
        "linear_cross_entropy",
        work.linear_cross_entropy(tokens, vocabulary, hidden, shapes.dtype.itemsize),
        inputs,
        {
            "triton": backend.linear_cross_entropy,
            **{f"triton {chunk}": chunked(chunk) for chunk in CHUNKS},
            "reference": TORCH.linear_cross_entropy,
            "all logits": plain,
            "compile": compiled(plain),
            "liger": liger,
            "quack": quack,
            "products only": lambda states, weight, _: _Products.apply(
                states, weight, head().to(states.dtype), torch.is_grad_enabled()
            ),
        },
        joint=True,
        unchecked=frozenset({"products only"}),
    )


class _Products(torch.autograd.Function):
    """The matrix products of the loss and nothing else, of all tokens at once: three with gradients, one
    without.

    The loss is to take little more.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, head: Tensor, gradients: bool) -> Tensor:
        logits = states @ head.t()
        if gradients:
            ctx.save_for_backward(logits @ head, weight_gradient(logits, states, weight.dtype))
        return states.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dstates, dweight = ctx.saved_tensors
        return dstates, dweight, None, None


def mlp(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """The weights are in the dtype of the activations, as the model's working copies are. Both forms of ours
    are timed.
    """
    hidden, width = shapes.config.hidden_size, shapes.config.intermediate_size

    def inputs(seed: int) -> list[Tensor]:
        sizes = ((shapes.batch, shapes.length, hidden), (2 * width, hidden), (hidden, width))
        x, *weights = normal(shapes, seed, *sizes)
        return [x, *((weight.detach() * weight.shape[1] ** -0.5).requires_grad_() for weight in weights)]

    def fused(*tensors: Tensor) -> Tensor:
        from kernels import mlp  # Triton may be absent, and nothing else here needs it

        return mlp.mlp(*tensors)

    def liger(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(from_liger(shapes, "liger_swiglu")(gate, up), down)

    return Case(
        "mlp",
        work.mlp(shapes.tokens, hidden, width, shapes.dtype.itemsize),
        inputs,
        {
            "triton": backend.mlp,
            "triton fused": fused,
            "triton composed": functools.partial(composed_mlp, swiglu=backend.swiglu),
            "reference": TORCH.mlp,
            "compile": compiled(TORCH.mlp),
            "liger": liger,
        },
    )


class _Head(torch.autograd.Function):
    """Something that the head is used for: its gradient is dense, new, and nobody else's, as that of the
    loss.
    """

    @staticmethod
    def forward(ctx: Any, head: Tensor) -> Tensor:
        ctx.shape = head.shape
        return head.new_zeros(())

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return dout.expand(ctx.shape).clone(memory_format=torch.contiguous_format)


def tied_embedding(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """A look-up, and a gradient of the head (every variant writes it, in a pass of its own) that the rows are
    added to.

    How often an id occurs falls as 1 / id, about as the words of a text.
    """
    hidden, vocabulary = shapes.config.hidden_size, shapes.config.vocab_size
    uniform = torch.rand(shapes.batch, shapes.length, generator=torch.Generator().manual_seed(0))
    ids = (float(vocabulary) ** uniform).long() - 1
    distinct = ids.unique().numel()
    ids = ids.to(shapes.device)

    def of(ops: Backend) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def call(weight: Tensor) -> tuple[Tensor, Tensor]:
            x, head = ops.tied_embedding(ids, weight, shapes.dtype)
            return x, _Head.apply(head)

        return call

    return Case(
        "tied_embedding",
        work.tied_embedding(shapes.tokens, distinct, vocabulary, hidden, shapes.dtype.itemsize),
        lambda seed: normal(replace(shapes, dtype=torch.float32), seed, (vocabulary, hidden)),
        {"triton": of(backend), "reference": of(TORCH), "compile": compiled(of(TORCH))},
    )


class _Step(NamedTuple):
    """One step of the optimizer of some parameters, and where it puts their copies."""

    optimizer: torch.optim.Optimizer
    call: Callable[[], object]
    copies: Sequence[Tensor]


class _Updates:
    """parameters, then as many gradients -> parameters, both their averages, and copies, after one more step.
    All are written in place.

    make: parameters -> their step. What it makes lives as long as the tensors that it was made for.
    """

    def __init__(self, make: Callable[[list[nn.Parameter]], _Step]) -> None:
        self._make, self._made = make, WeakTensorKeyDictionary()

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        first, count = tensors[0], len(tensors) // 2
        if first not in self._made:
            parameters = [nn.Parameter(tensor) for tensor in tensors[:count]]
            for parameter, gradient in zip(parameters, tensors[count:], strict=True):
                parameter.grad = gradient
            step = self._make(parameters)
            step.call()
            states = [step.optimizer.state[parameter] for parameter in parameters]
            averages = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
            updated = [parameter.detach() for parameter in parameters]
            self._made[first] = (step, (*updated, *averages, *step.copies))
        else:
            self._made[first][0].call()
        written: tuple[Tensor, ...] = self._made[first][1]
        return written


def optimizer_step(shapes: Shapes) -> Case:
    """Clipping, AdamW and, with 16-bit activations, the copies of the matrices in their dtype; a step is
    called its forward pass.

    The parameters are those of the model, in fp32. "reference" is torch's fused form of each, "triton" all in
    one.
    """
    with torch.device("meta"):
        model = SmolLM2ForCausalLM(shapes.config, TORCH)
    sizes = [parameter.shape for parameter in model.parameters()]
    dtype = None if shapes.dtype == torch.float32 else shapes.dtype
    copied = sum(size.numel() for size in sizes if len(size) > 1) if dtype else 0

    def of_torch(parameters: list[nn.Parameter]) -> _Step:
        device = parameters[0].device
        rate, on_gpu = torch.tensor(LEARNING_RATE, device=device), device.type == "cuda"
        optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True, capturable=on_gpu, **SETTINGS)
        matrices: list[Tensor] = [parameter for parameter in parameters if dtype and parameter.dim() > 1]
        copies = [torch.empty_like(matrix, dtype=dtype, requires_grad=False) for matrix in matrices]

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            if copies:
                torch._foreach_copy_(copies, matrices)

        return _Step(optimizer, step, copies)

    def of_triton(parameters: list[nn.Parameter]) -> _Step:
        from kernels.fused_adamw import FusedAdamW

        copies = WorkingCopies(nn.ParameterList(parameters), dtype) if dtype else None
        optimizer = FusedAdamW(parameters, lr=LEARNING_RATE, copies=copies, **SETTINGS)

        def step() -> None:
            optimizer.clip(MAX_NORM)
            optimizer.step()

        targets = [copies.target(parameter) for parameter in parameters] if copies else []
        return _Step(optimizer, step, [target for target in targets if target is not None])

    def inputs(seed: int) -> list[Tensor]:
        drawn = normal(replace(shapes, dtype=torch.float32), seed, *sizes, *sizes)
        return [tensor.detach() for tensor in drawn]

    parameters = sum(size.numel() for size in sizes)
    return Case(
        "adamw",
        work.Cost(work.adamw(parameters) + work.Work(shapes.dtype.itemsize * copied)),
        inputs,
        {"triton": _Updates(of_triton), "reference": _Updates(of_torch)},
    )
