"""Every operation of a training step and of a decoded token, measured alone: for `python -m bench.roofline`.

An operation is measured on several sets of tensors in turn, so that each finds its inputs outside the caches,
as a floor in bytes supposes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import ops, timing, work
from bench.part import Part, one_line
from bench.step import TrainingStep
from kernels import Backend
from smollm2.model import SmolLM2ForCausalLM, rotary_tables

COLD_BYTES = 64 << 20  # on a CPU, the sets of tensors that are used in turn are this large together


@dataclass(frozen=True)
class Probe:
    """How one operation is measured.

    inputs: seed -> tensors, those with requires_grad get gradients. joint: the gradients are formed in the
    forward pass, so that only both together can be timed. same: whatever the backend, torch computes it;
    measured once.
    """

    inputs: Callable[[int], list[Tensor]]
    call: Callable[..., Any]
    joint: bool = False
    same: bool = False


def _drawn(
    shapes: ops.Shapes, *sizes: tuple[int, ...], dtype: torch.dtype | None = None, wanted: bool = True
) -> Callable[[int], list[Tensor]]:
    """seed -> random tensors of these sizes. wanted: whether they get gradients."""

    def draw(seed: int) -> list[Tensor]:
        generator = torch.Generator(shapes.device).manual_seed(seed)
        normal = (
            torch.randn(size, generator=generator, device=shapes.device).to(dtype or shapes.dtype)
            for size in sizes
        )
        return [tensor.requires_grad_(wanted) for tensor in normal]

    return draw


def step_probes(shapes: ops.Shapes, backend: Backend, model: SmolLM2ForCausalLM) -> dict[str, Probe]:
    """Name of `work.step_items` -> its measurement. model: any model of these shapes, whose parameters the
    optimizer updates.
    """
    config, tokens = shapes.config, shapes.tokens
    # bench/ops.py calls the variant of the backend that it is given "triton".
    cases = {case.op: case for case in ops.cases(shapes, backend, "eager")}
    found = {case.op: Probe(case.inputs, case.variants["triton"], case.joint) for case in cases.values()}
    found["final norm"], found["loss"] = found["rms_norm"], found["linear_cross_entropy"]
    for name, (inputs, outputs) in work.projections(config).items():
        found[name] = Probe(_drawn(shapes, (tokens, inputs), (outputs, inputs)), F.linear, same=True)
    ids = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).to(
        shapes.device
    )
    table = (config.vocab_size, config.hidden_size)
    drawn = _drawn(shapes, table, dtype=torch.float32)
    found["embedding"] = Probe(drawn, lambda weight: F.embedding(ids, weight).to(shapes.dtype), same=True)
    matrices = [parameter for name, parameter in model.named_parameters() if "embed_tokens" not in name]
    found["weights"] = Probe(
        lambda seed: [*matrices],
        lambda *weights: tuple(weight.to(shapes.dtype) for weight in weights),
        same=True,
    )
    optimizer = TrainingStep(model).optimizer

    def update(*parameters: Tensor) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def with_gradients(seed: int) -> list[Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-4)
        return list(model.parameters())

    found["optimizer"] = Probe(with_gradients, update, same=True)
    return found


def token_probes(shapes: ops.Shapes, keys: int, backend: Backend, eps: float = ops.EPS) -> dict[str, Probe]:
    """Name of `work.token_items` -> its measurement, for shapes of length 1;."""
    config, batch = shapes.config, shapes.batch
    hidden, width, (heads, key_heads, head_dim) = config.hidden_size, config.intermediate_size, shapes.heads
    cos, sin = (table[:1].expand(batch, 1, -1) for table in rotary_tables(config, shapes.device))
    lengths = torch.full((batch,), keys, device=shapes.device)
    row, cache = (batch, 1, hidden), (batch, keys, key_heads, head_dim)

    drawn = partial(_drawn, shapes, wanted=False)
    found = {
        "rms_norm": Probe(drawn(row, (hidden,)), lambda x, weight: backend.rms_norm(x, weight, eps)),
        "add_rms_norm": Probe(drawn(row, row, (hidden,)), lambda x, residual, weight: backend.add_rms_norm(x, residual, weight, eps)),
        "rope_qkv": Probe(
            drawn((batch, 1, heads + 2 * key_heads, head_dim)), lambda qkv: backend.rope_qkv(qkv, cos, sin, key_heads)
        ),
        "decode_attention": Probe(
            drawn((batch, 1, heads, head_dim), cache, cache), lambda q, k, v: backend.decode_attention(q, k, v, lengths)
        ),
        "swiglu": Probe(drawn((batch, 1, 2 * width)), backend.swiglu),
        "logits": Probe(
            drawn(row, (hidden,), (config.vocab_size, hidden)), lambda x, norm, weight: backend.decode_head(x, norm, weight, eps)
        ),
    }  # fmt: skip
    for name, (inputs, outputs) in work.projections(config).items():
        found[name] = Probe(drawn((batch, 1, inputs), (outputs, inputs)), F.linear, same=True)
    return found


def measure(
    probe: Probe, item: work.Item, device: torch.device, roof: tuple[float, float], tiny: bool
) -> dict[str, float]:
    """Phase -> seconds in the whole: of one call, times how often it happens."""
    sets = 1
    # the optimizer has one set of parameters, larger than any cache
    if not tiny and item.cost.forward != work.Work():
        floor = item.cost.forward.floor(*roof)
        # a replay starts with a cold L2, and is to last beyond the resolution of events
        if device.type == "cuda":
            sets = max(1, min(8, round(1e-4 / floor)))
        else:
            sets = max(
                1, min(128, math.ceil(COLD_BYTES / max(1, item.cost.forward.bytes)), round(0.1 / floor))
            )
    tensors = [probe.inputs(seed) for seed in range(sets)]
    trains = item.cost.backward != work.Work() and item.cost.forward != work.Work()
    wanted = [index for index, tensor in enumerate(tensors[0]) if trains and tensor.requires_grad]

    def outputs(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        result = probe.call(*inputs)
        return result if isinstance(result, tuple) else (result,)

    def gradients(
        results: tuple[Tensor, ...], inputs: list[Tensor], upstream: list[Tensor]
    ) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            results, [inputs[index] for index in wanted], upstream, retain_graph=not probe.joint
        )

    def forward() -> object:
        with torch.set_grad_enabled(bool(wanted)):
            return [probe.call(*inputs) for inputs in tensors]

    def prepare_backward() -> Callable[[], object]:
        done = [(outputs(inputs), inputs) for inputs in tensors]
        upstream = [torch.randn_like(result) for result in done[0][0]]
        return lambda: [gradients(results, inputs, upstream) for results, inputs in done]

    def prepare_both() -> Callable[[], object]:
        upstream = [torch.ones_like(result) for result in outputs(tensors[0])]
        return lambda: [gradients(outputs(inputs), inputs, upstream) for inputs in tensors]

    phases: dict[str, Callable[[], Callable[[], object]]] = {"forward": lambda: forward}
    if not trains and item.cost.backward != work.Work():
        phases = {"backward": lambda: forward}
    elif probe.joint:
        phases = {"forward+backward": prepare_both}
    elif trains:
        phases["backward"] = prepare_backward
    found = {}
    for phase, prepare in phases.items():
        replay = timing.replayable(prepare, device)
        sample = timing.alternate(
            {phase: replay}, device, calls=sets, rounds=1 if tiny else 20 if device.type == "cuda" else 3
        )[phase]
        found[phase] = item.times * sample.us / 1e6
        del replay
    return found


def measure_all(
    items: dict[str, work.Item], probes: dict[str, dict[str, Probe]], part: Part, roof: tuple[float, float]
) -> tuple[work.Measured, list[str]]:
    """probes: backend -> its probes -> what was measured, and a line for whatever was not."""
    found: work.Measured = {}
    missing = []
    for name, item in items.items():
        found[name] = {}
        for backend, of_backend in probes.items():
            if part.left() < 0:
                missing.append(f"{name}, {backend}: no time was left")
                continue
            before = next(iter(found[name].values()), None)
            try:
                same = of_backend[name].same and before is not None
                found[name][backend] = (
                    before
                    if same and before
                    else measure(of_backend[name], item, part.device, roof, part.tiny)
                )
            except Exception as failure:  # noqa: BLE001 - one operation's failure is a result, and the others are still measured
                missing.append(f"{name}, {backend}: {one_line(failure)}")
    return found, missing
