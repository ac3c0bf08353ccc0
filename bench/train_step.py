"""`python -m bench.train_step`: one optimizer step of the 135M model at 32 x 512, per backend and beside
other libraries, which must agree.

A step is forward, backward, clipping to a global norm of 1 and AdamW, with fp32 parameters and bf16
activations. Every variant starts from the same weights and sees the same tokens, so the losses of the first
steps must agree: nobody wins by computing less. The peers are those of bench/peers/choice.py, under autocast;
one that cannot be measured here is named with its version and the reason.
Rates are medians over blocks of steps with one wait per block, as in training, and a GPU's clock and power
meanwhile stand beside them. MFU counts 6 operations per
weight and token and causal attention half, against the vendor's dense bf16 peak; a device that the table does
not have has no MFU.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import clocks, launches, timing, work
from bench.peers import choice, status
from bench.peers.litgpt import LitgptStep
from bench.record import Part, one_line, parser, write_json
from bench.step import (
    COMPARED_STEPS,
    CapturedStep,
    TrainingStep,
    all_logits,
    loss_distances,
    rates,
    training_model,
)
from kernels import TORCH, Backend, select_backend, with_ops
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.model import SmolLM2ForCausalLM

# Our own ways. "torch,all-logits" is backend torch with a loss that holds all logits, which torch.compile
# handles best; "torch-adamw" has torch's AdamW and casts the weights on use; "fused-mlp" has SwiGLU inside
# its products, whatever the launch table says.
VARIANTS = (
    "triton", "triton+graph", "triton+torch-adamw+graph", "triton+fused-mlp+graph", "torch", "torch+graph",
    "torch,all-logits+compile", "torch+compile", "triton+compile",
)  # fmt: skip
LOSS_TOLERANCE = 0.02  # nats, between backends, in bf16
PEER_TOLERANCE = 0.1  # the same for peers, which keep the residual stream in fp32; see bench.step_peers
BLOCKS = 8
SECONDS = 4.0  # of all blocks, unless 40 steps take longer: within a second a GPU may not slow down yet
NAMED = 40  # kernels whose launches and time are listed by name


def build(config: SmolLM2Config, name: str, device: torch.device) -> SmolLM2ForCausalLM:
    """The model in training mode, with bf16 activations on a GPU and fp32 on a CPU.

    name: of a backend, or of one of VARIANTS without what follows a "+".
    """
    backend: Backend | str = name
    if name == "torch,all-logits":
        plain = dataclasses.replace(TORCH, name="all-logits", linear_cross_entropy=all_logits)
        backend = with_ops(TORCH, linear_cross_entropy=plain)
    elif name == "triton+fused-mlp":
        from kernels.mlp import mlp

        ours = select_backend("triton", device)
        backend = with_ops(ours, mlp=dataclasses.replace(ours, name="fused", mlp=mlp))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return training_model(config, backend, device, dtype)


def build_step(
    variant: str, config: SmolLM2Config, ids: Tensor, compiler: str
) -> TrainingStep | CapturedStep | LitgptStep:
    """The step of one of VARIANTS or of a peer. compiler: the backend of torch.compile.

    Raises Unavailable, with the version and the reason, for a peer that cannot be measured here.
    """
    if variant in choice.VARIANTS:
        weights = build(config, "torch", ids.device).state_dict()
        return choice.peer_step(variant, config, weights, ids, ids.device.type == "cuda", compiler)
    name, *extras = variant.split("+")
    model = build(config, f"{name}+fused-mlp" if "fused-mlp" in extras else name, ids.device)
    forward = torch.compile(model, backend=compiler) if "compile" in extras else None
    step = TrainingStep(model, forward, own=False if "torch-adamw" in extras else None)
    return CapturedStep(step, ids) if "graph" in extras else step


@dataclass(frozen=True)
class Bench:
    """What all variants have in common. lock: see `bench.timing.alone`. traces: folder for the kernels of a
    step, one by one.
    """

    config: SmolLM2Config
    ids: Tensor
    part: Part
    lock: Path | None = None
    traces: Path | None = None

    def attempt(self, variant: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows of `measure`, or one that says why there is none."""
        if self.part.left() < 0:
            yield variant, {"failed": "no time was left"}
        elif variant.endswith("+graph") and self.part.device.type != "cuda":
            yield variant, {"failed": "needs a GPU"}
        else:
            name = variant
            try:
                for name, found in self.measure(variant):
                    yield name, found
                    name = f"{name}+graph"  # what fails next
            except Exception as failure:  # noqa: BLE001 - a result like any other
                yield name, {"failed": one_line(failure)}

    def measure(self, variant: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """One variant, of VARIANTS or a peer, from its first step to its rate: yields (name, row) as soon as
        it is there.

        On a GPU what is compiled gets a second row: the same step, from the same weights, as a CUDA graph.
        """
        cuda, compiled = self.ids.device.type == "cuda", "+compile" in variant
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step = build_step(variant, self.config, self.ids, "aot_eager" if self.part.tiny else "inductor")
        if not isinstance(step, TrainingStep):
            yield variant, self.timed(step, began)
            return
        again = compiled and cuda
        first = {key: value.clone() for key, value in step.model.state_dict().items()} if again else {}
        found = self.timed(step, began)
        if cuda or not compiled:  # on a CPU counting switches the compiler off
            try:
                found["launches"] = self.launches(step, variant)
            except Exception as failure:  # noqa: BLE001 - what was timed stays
                found["launches_failed"] = one_line(failure)
        yield variant, found
        if again:
            step.model.load_state_dict(first)
            began = time.perf_counter()
            captured = CapturedStep(TrainingStep(step.model, step._forward), self.ids)
            yield f"{variant}+graph", self.timed(captured, began)

    def timed(self, step: TrainingStep | CapturedStep | LitgptStep, began: float) -> dict[str, Any]:
        """The row of a step: its first losses, then blocks of steps. began: when its making began."""
        ids, device, queued = self.ids, self.ids.device, list[float]()
        first = step.first_losses if isinstance(step, CapturedStep) else []
        losses = [float(one) for one in [*first, *(step(ids) for _ in range(COMPARED_STEPS - len(first)))]]
        first_seconds = time.perf_counter() - began
        blocks, length = (1, 1) if self.part.tiny else (BLOCKS, 1)
        peaks: list[int] = []

        def block() -> None:
            since = time.perf_counter()
            if isinstance(step, LitgptStep):  # in another process, which has the tokens already
                peaks.append(step.steps(length)["peak_memory_bytes"])
            else:
                for _ in range(length):
                    step(ids)
            queued.append((time.perf_counter() - since) / length)

        with timing.alone(self.lock), clocks.watched(device) as state:
            if not self.part.tiny:
                length = max(5, math.ceil(SECONDS / BLOCKS / timing.seconds(block, device)))
                queued.clear()
            seconds = [timing.seconds(block, device) / length for _ in range(blocks)]
        found: dict[str, Any] = {"losses": losses, "first_steps_seconds": round(first_seconds, 2)}
        found |= rates(seconds, ids.numel())
        flops, peak = work.flops_per_token(self.config, ids.shape[1]), work.peak_flops(device)
        found["mfu"] = round(found["tokens_per_second"] * flops / peak, 4) if peak else None
        if device.type == "cuda":
            # as long as step_ms: the device waits for the host
            found["host_ms"] = round(statistics.median(queued) * 1e3, 3)
            found["gpu"] = state
            found["peak_memory_gb"] = round((peaks or [torch.cuda.max_memory_allocated()])[-1] / 1e9, 2)
        return found

    def launches(self, step: TrainingStep, variant: str) -> dict[str, Any]:
        """Launches of a step by name and, on a GPU, the milliseconds that they take; a trace has all of them
        in order.
        """
        if self.ids.device.type != "cuda":
            return _named(launches.count(lambda: step(self.ids), self.ids.device))
        kernels = launches.trace(lambda: step(self.ids))
        names, spent = Counter(name for name, _, _ in kernels), defaultdict[str, float](float)
        for name, _, us in kernels:
            spent[name] += us
        if self.traces is not None:
            places = {name: place for place, name in enumerate(names)}
            rows = [[places[name], round(begin, 1), round(us, 2)] for name, begin, us in kernels]
            write_json(self.traces / f"trace-{variant}.json", {"names": list(names), "kernels": rows})
        longest = sorted(spent.items(), key=lambda item: -item[1])[:NAMED]
        return {**_named(names), "device_ms": {name: round(us / 1e3, 4) for name, us in longest}}


def _named(names: Counter[str]) -> dict[str, Any]:
    ours = launches.triton_part(names)
    return {"all": names.total(), "ours": ours, "names": dict(names.most_common(NAMED))}


def show(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in found:
        return f"{name:21} {found['failed']}"
    mfu = f"{100 * found['mfu']:.1f} %" if found["mfu"] is not None else "none"
    line = f"{name:21}{found['step_ms']:10.2f} ms{found['tokens_per_second']:12,.0f} tok/s  MFU {mfu}"
    if "peak_memory_gb" in found:
        line += f"  {found['peak_memory_gb']:.1f} GB  host {found['host_ms']:.1f} ms"
    if "launches" in found:
        line += f"  {found['launches']['all']} launches ({found['launches']['ours']} ours)"
    return line


def main(argv: Sequence[str]) -> int:
    arguments = parser("train_step", "Times one optimizer step per backend, beside other libraries.")
    add, names = arguments.add_argument, (*VARIANTS, *choice.VARIANTS)
    add("--model", default="135M", help="preset")
    add("--variant", action="append", choices=names, help="only this one; may be repeated")
    turns = "hold this file's lock while timing: processes that share a GPU take turns"
    add("--lock", type=Path, metavar="FILE", help=turns)
    one_by_one = "on a GPU: write the kernels of a step there, one by one"
    add("--traces", type=Path, metavar="DIR", help=one_by_one)
    options = arguments.parse_args(argv)
    part = Part("step", options)
    config = part.model(options.model)
    batch, length = (1, 8) if part.tiny else (32, 512)
    ids = part.ids(config, batch, length)
    part.save(
        model=options.model, batch=batch, length=length, parameters=config.num_parameters(),
        peak_flops=work.peak_flops(part.device),
        mfu_convention="6 per weight and token, causal attention counted half, dense bf16 peak of the vendor",
    )  # fmt: skip
    bench = Bench(config, ids, part, options.lock, options.traces)
    results: dict[str, dict[str, Any]] = {}
    distances: dict[str, float] = {}
    # What compiles for a minute must not cost the others their turn.
    for variant in options.variant or sorted(names, key=lambda name: "+compile" in name):
        for name, found in bench.attempt(variant):
            results[name] = found
            print(show(name, found), flush=True)
            distances = loss_distances(results, "torch")
            part.save(variants=results, loss_distance=distances, peers=choice.step_status(results))
        gc.collect()
        torch.compiler.reset()
    for name, distance in distances.items():
        losses = ", ".join(f"{loss:.4f}" for loss in results[name]["losses"])
        far = distance > (PEER_TOLERANCE if name in choice.VARIANTS else LOSS_TOLERANCE)
        end = ": TOO FAR" if far else ""
        print(f"{name}: first losses {losses}, within {distance:.1e} of torch's{end}")
    print(*status.not_measured(part.data["peers"]), sep="\n")
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
