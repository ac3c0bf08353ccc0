"""Every operation of a training step and of a decoded token, measured alone: for `python -m bench.roofline`.

An operation is a Case of bench/ops.py, or one that is only here: a matrix product, the embedding, the casts
of the weights, the optimizer. It is measured on several sets of tensors in turn, so that each finds its
inputs outside the caches, as a floor in bytes supposes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import ops, timing, work
from bench.case import EPS, Case, Shapes, Variant, normal
from bench.record import Part, one_line
from bench.step import TrainingStep
from kernels import Backend
from smollm2.layers import rotary_tables
from smollm2.model import SmolLM2ForCausalLM

COLD_BYTES = 64 << 20  # on a CPU, the sets of tensors that are used in turn are this large together
OURS = "triton"  # how a Case names the variant of the backend that it is given
EVERY = "every backend"  # the variant of an operation that torch computes whatever the backend: measured once


def step_cases(shapes: Shapes, backend: Backend, model: SmolLM2ForCausalLM) -> dict[str, Case]:
    """Name of `work.step_items` -> its operation. model: any model of these shapes, whose parameters the
    optimizer updates.
    """
    config, tokens = shapes.config, shapes.tokens
    items = work.step_items(config, shapes.batch, shapes.length, shapes.dtype.itemsize)
    found = {case.op: case for case in ops.cases(shapes, backend, "eager")}
    found["final norm"], found["loss"] = found["rms_norm"], found["linear_cross_entropy"]

    def add(name: str, inputs: Callable[[int], list[Tensor]], call: Callable[..., Any]) -> None:
        if name in items:
            found[name] = Case(name, items[name].cost, inputs, {EVERY: call})

    for name, (rows, columns) in work.projections(config).items():
        add(name, _normal(shapes, (tokens, rows), (columns, rows)), F.linear)
    ids = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).to(
        shapes.device
    )
    table = model.model.embed_tokens.weight
    add("embedding", lambda seed: [table], lambda weight: F.embedding(ids, weight).to(shapes.dtype))
    matrices: list[Tensor] = [x for name, x in model.named_parameters() if "embed_tokens" not in name]
    add(
        "weights",
        lambda seed: matrices,
        lambda *weights: tuple(weight.to(shapes.dtype) for weight in weights),
    )
    step = TrainingStep(model)

    def with_gradients(seed: int) -> list[Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-4)
        return []

    add("optimizer", with_gradients, step.update)
    return found


def token_cases(shapes: Shapes, keys: int, backend: Backend, eps: float = EPS) -> dict[str, Case]:
    """Name of `work.token_items` -> its operation, for shapes of length 1."""
    config, batch = shapes.config, shapes.batch
    hidden, width, (heads, key_heads, head_dim) = config.hidden_size, config.intermediate_size, shapes.heads
    cos, sin = (table[:1].expand(batch, 1, -1) for table in rotary_tables(config, shapes.device))
    lengths = torch.full((batch,), keys, device=shapes.device)
    row, cache, head = (batch, 1, hidden), (batch, keys, key_heads, head_dim), (config.vocab_size, hidden)
    own: dict[str, tuple[Callable[..., Any], Sequence[tuple[int, ...]]]] = {
        "rms_norm": (lambda x, w: backend.rms_norm(x, w, eps), (row, (hidden,))),
        "add_rms_norm": (lambda x, residual, w: backend.add_rms_norm(x, residual, w, eps),
            (row, row, (hidden,))),
        "rope_qkv": (
            lambda qkv: backend.rope_qkv(qkv, cos, sin, key_heads),
            ((batch, 1, heads + 2 * key_heads, head_dim),)
        ),
        "decode_attention": (
            lambda q, k, v: backend.decode_attention(q, k, v, lengths),
            ((batch, 1, heads, head_dim), cache, cache)
        ),
        "swiglu": (backend.swiglu, ((batch, 1, 2 * width),)),
        "logits": (lambda x, norm, w: backend.decode_head(x, norm, w, eps), (row, (hidden,), head)),
    }  # fmt: skip
    items = work.token_items(config, batch, keys, shapes.dtype.itemsize)
    found = {
        name: Case(name, items[name].cost, _normal(shapes, *sizes, wanted=False), {OURS: call})
        for name, (call, sizes) in own.items()
    }
    for name, (rows, columns) in work.projections(config).items():
        inputs = _normal(shapes, (batch, 1, rows), (columns, rows), wanted=False)
        found[name] = Case(name, items[name].cost, inputs, {EVERY: F.linear})
    return found


def _normal(shapes: Shapes, *sizes: tuple[int, ...], wanted: bool = True) -> Callable[[int], list[Tensor]]:
    """seed -> random tensors of these sizes. wanted: whether they get gradients."""
    return lambda seed: [tensor.requires_grad_(wanted) for tensor in normal(shapes, seed, *sizes)]


def measure(
    case: Case, item: work.Item, device: torch.device, roof: tuple[float, float], tiny: bool
) -> dict[str, float]:
    """Phase -> seconds in the whole: of one call, times how often it happens."""
    sets, cost = 1, item.cost
    # the optimizer has one set of parameters, larger than any cache
    if not tiny and cost.forward != work.Work():
        floor = cost.forward.floor(*roof)
        # a replay starts with a cold L2, and is to last beyond the resolution of events
        if device.type == "cuda":
            sets = max(1, min(8, round(1e-4 / floor)))
        else:
            cold = math.ceil(COLD_BYTES / max(1, cost.forward.bytes))
            sets = max(1, min(128, cold, round(0.1 / floor)))
    variant = Variant(case, OURS if OURS in case.variants else EVERY, sets)
    phases = variant.phases()
    if case.joint:
        del phases["forward"]  # both gradients are formed in it
    rounds = 1 if tiny else 20 if device.type == "cuda" else 3
    found = {}
    for phase, prepare in phases.items():
        replay = timing.replayable(prepare, device)
        sample = timing.alternate({phase: replay}, device, calls=sets, rounds=rounds)[phase]
        found["backward" if cost.forward == work.Work() else phase] = item.times * sample.us / 1e6
        del replay
    return found


def measure_all(
    items: dict[str, work.Item], cases: dict[str, dict[str, Case]], part: Part, roof: tuple[float, float]
) -> tuple[work.Measured, list[str]]:
    """cases: backend -> its operations -> what was measured, and a line for whatever was not."""
    found: work.Measured = {name: {} for name in items}
    missing = []
    for name, item in items.items():
        for backend, of_backend in cases.items():
            case, before = of_backend[name], next(iter(found[name].values()), None)
            try:
                if part.left() < 0:
                    missing.append(f"{name}, {backend}: no time was left")
                elif EVERY in case.variants and before:
                    found[name][backend] = before
                else:
                    found[name][backend] = measure(case, item, part.device, roof, part.tiny)
            except Exception as failure:  # noqa: BLE001 - a result like any other
                missing.append(f"{name}, {backend}: {one_line(failure)}")
    return found, missing
