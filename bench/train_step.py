"""`python -m bench.train_step`: one optimizer step of the 135M model at 32 x 512, per backend and beside
other libraries, which must agree.

A step is forward, backward, clipping to a global norm of 1 and AdamW, with fp32 parameters and bf16
activations. Every variant starts from the same weights and sees the same tokens, so the losses of the first
steps must agree: nobody wins by computing less. The peers are those of bench/peers/choice.py, under autocast;
one that cannot be measured here is named with its version and the reason.
Rates are medians over blocks of steps with one wait per block, as in training. MFU counts 6 operations per
weight and token and causal attention half, against the vendor's dense bf16 peak; no MFU for a device that the
table does not have.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import launches, work
from bench.peers import choice, status
from bench.peers.litgpt import LitgptStep
from bench.record import Part, one_line, parser, write_json
from bench.step import CapturedStep, TrainingStep, all_logits
from bench.timing import alone, synchronize
from kernels import TORCH, Backend, select_backend, with_ops
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.model import SmolLM2ForCausalLM

# Our own ways. "torch,all-logits" is backend torch with a loss that holds all logits, as torch.compile likes
# it best; "torch-adamw" has torch's AdamW and casts the weights on use, "fused-mlp" the SwiGLU inside its
# products, whatever the launch table says.
VARIANTS = (
    "triton", "triton+graph", "triton+torch-adamw+graph", "triton+fused-mlp+graph", "torch", "torch+graph",
    "torch,all-logits+compile", "torch+compile", "triton+compile",
)  # fmt: skip
COMPARED_STEPS = 3
LOSS_TOLERANCE = 0.02  # nats, between backends, in bf16
PEER_TOLERANCE = 0.1  # the same for peers, which keep the residual stream in fp32; see bench.step_peers


def build(config: SmolLM2Config, name: str, device: torch.device) -> SmolLM2ForCausalLM:
    """The model with the weights that seed 0 gives on this device, in training mode, bf16 activations (fp32
    on a CPU).

    name: of a backend, or of one of VARIANTS without what follows a "+".
    """
    backend: Backend | str = name
    if name == "torch,all-logits":
        backend = with_ops(
            TORCH,
            linear_cross_entropy=dataclasses.replace(
                TORCH, name="all-logits", linear_cross_entropy=all_logits
            ),
        )
    elif name == "triton+fused-mlp":
        from kernels.mlp import mlp

        ours = select_backend("triton", device)
        backend = with_ops(ours, mlp=dataclasses.replace(ours, name="fused", mlp=mlp))
    torch.manual_seed(0)
    with torch.device(device):
        return SmolLM2ForCausalLM(
            config, backend, compute_dtype=torch.bfloat16 if device.type == "cuda" else None
        ).train()


def measure(
    variant: str,
    config: SmolLM2Config,
    ids: Tensor,
    tiny: bool,
    lock: Path | None = None,
    traces: Path | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One variant, of VARIANTS or a peer, from its first step to its rate: yields (name, row) as soon as it
    is there.

    On a GPU what is compiled gets a second row: the same step, from the same weights, as a CUDA graph. lock:
    see `bench.timing.alone`. traces: folder for the kernels of a step, one by one.
    """
    device = ids.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    name, *extras = variant.split("+")
    compiler = "aot_eager" if tiny else "inductor"
    began = time.perf_counter()
    if variant in choice.VARIANTS:
        weights = build(config, "torch", device).state_dict()
        peer = choice.peer_step(variant, config, weights, ids, device.type == "cuda", compiler)
        del weights
        # a step in another process, which has the tokens already
        if isinstance(peer, LitgptStep):
            yield variant, _timed(lambda _: peer(), [], began, config, ids, tiny, lock, peer)
            return
        step = peer
    else:
        model = build(config, f"{name}+fused-mlp" if "fused-mlp" in extras else name, device)
        forward = torch.compile(model, backend=compiler) if "compile" in extras else None
        step = TrainingStep(model, forward, own=False if "torch-adamw" in extras else None)
    if "graph" in extras:
        yield variant, _graphed(step, config, ids, tiny, lock)
        return
    again = "compile" in extras and device.type == "cuda"
    first = {key: value.clone() for key, value in step.model.state_dict().items()} if again else {}
    found = _timed(step, [], began, config, ids, tiny, lock)
    if "compile" not in extras or device.type == "cuda":  # on a CPU counting switches the compiler off
        found |= _launches(step, ids, None if traces is None else traces / f"trace-{variant}.json")
    yield variant, found
    if again:
        step.model.load_state_dict(first)
        yield f"{variant}+graph", _graphed(TrainingStep(step.model, step._forward), config, ids, tiny, lock)


def _graphed(
    step: TrainingStep, config: SmolLM2Config, ids: Tensor, tiny: bool, lock: Path | None
) -> dict[str, Any]:
    began = time.perf_counter()
    captured = CapturedStep(step, ids)
    return _timed(captured, captured.first_losses, began, config, ids, tiny, lock)


def _timed(
    step: Callable[[Tensor], Tensor],
    first: list[Tensor],
    began: float,
    config: SmolLM2Config,
    ids: Tensor,
    tiny: bool,
    lock: Path | None,
    elsewhere: LitgptStep | None = None,
) -> dict[str, Any]:
    """The row of a step: its first losses (`first` and what is missing of them), then blocks of steps.

    began: when its making began. elsewhere: the process in which it takes place.
    """
    device = ids.device
    losses = [float(loss) for loss in [*first, *(step(ids) for _ in range(COMPARED_STEPS - len(first)))]]
    found: dict[str, Any] = {"losses": losses, "first_steps_seconds": round(time.perf_counter() - began, 2)}
    blocks, length = (1, 1) if tiny else (8, 5)
    seconds, queued = [], []
    with alone(lock):
        for _ in range(blocks):
            synchronize(device)
            began = time.perf_counter()
            if elsewhere is not None:
                peak_elsewhere = elsewhere.steps(length)["peak_memory_bytes"]
            else:
                for _ in range(length):
                    step(ids)
            queued.append((time.perf_counter() - began) / length)
            synchronize(device)
            seconds.append((time.perf_counter() - began) / length)
    typical = statistics.median(seconds)
    rate, peak = ids.numel() / typical, work.peak_flops(device)
    found["step_ms"] = round(typical * 1e3, 3)
    found["spread"] = round((max(seconds) - min(seconds)) / typical, 3)
    found["tokens_per_second"] = round(rate, 1)
    found["mfu"] = round(rate * work.flops_per_token(config, ids.shape[1]) / peak, 4) if peak else None
    if device.type == "cuda":
        # as long as step_ms: the device waits for the host
        found["host_ms"] = round(statistics.median(queued) * 1e3, 3)
        found["peak_memory_gb"] = round(
            (peak_elsewhere if elsewhere is not None else torch.cuda.max_memory_allocated()) / 1e9, 2
        )
    return found


def _launches(step: TrainingStep, ids: Tensor, path: Path | None) -> dict[str, Any]:
    """Launches of a step by name and, on a GPU, the milliseconds that they take. path: where all of them are
    written, in order.
    """
    found: dict[str, Any] = {}
    try:
        if ids.device.type == "cuda":
            kernels = launches.trace(lambda: step(ids))
            names = Counter(name for name, _, _ in kernels)
            spent = {name: sum(duration for other, _, duration in kernels if other == name) for name in names}
            found = {
                "device_ms": {
                    name: round(us / 1e3, 4)
                    for name, us in sorted(spent.items(), key=lambda item: -item[1])[:40]
                }
            }
            if path is not None:
                places = {name: place for place, name in enumerate(names)}
                rows = [
                    [places[name], round(begin, 1), round(duration, 2)] for name, begin, duration in kernels
                ]
                write_json(path, {"names": list(names), "kernels": rows})
        else:
            names = launches.count(lambda: step(ids), ids.device)
    except Exception as failure:  # noqa: BLE001 - what was timed stays
        return {"launches_failed": one_line(failure)}
    return {
        "launches": {
            "all": sum(names.values()),
            "ours": launches.triton_part(names),
            "names": dict(names.most_common(40)),
            **found,
        }
    }


def attempt(
    variant: str, config: SmolLM2Config, ids: Tensor, part: Part, lock: Path | None, traces: Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of `measure`, or one that says why there is none."""
    if part.left() < 0:
        yield variant, {"failed": "no time was left"}
    elif variant.endswith("+graph") and part.device.type != "cuda":
        yield variant, {"failed": "needs a GPU"}
    else:
        name = variant
        try:
            for name, found in measure(variant, config, ids, part.tiny, lock, traces):
                yield name, found
                name = f"{name}+graph"  # what fails next
        except Exception as failure:  # noqa: BLE001 - a result like any other
            yield name, {"failed": one_line(failure)}


def agreement(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Variant -> largest distance of its first losses from those of the torch backend."""
    base = results.get("torch", {}).get("losses")
    if base is None:
        return {}
    return {
        name: max(abs(a - b) for a, b in zip(found["losses"], base, strict=True))
        for name, found in results.items()
        if "losses" in found
    }


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
    arguments.add_argument("--model", default="135M", help="preset")
    arguments.add_argument(
        "--variant",
        action="append",
        choices=(*VARIANTS, *choice.VARIANTS),
        help="only this one; may be repeated",
    )
    arguments.add_argument(
        "--lock",
        type=Path,
        metavar="FILE",
        help="hold this file's lock while timing: processes that share a GPU take turns",
    )
    arguments.add_argument(
        "--traces", type=Path, metavar="DIR", help="on a GPU: write the kernels of a step there, one by one"
    )
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
    results: dict[str, dict[str, Any]] = {}
    # What compiles for a minute must not cost the others their turn.
    for variant in options.variant or sorted(
        (*VARIANTS, *choice.VARIANTS), key=lambda name: "+compile" in name
    ):
        for name, found in attempt(variant, config, ids, part, options.lock, options.traces):
            results[name] = found
            print(show(name, found), flush=True)
            part.save(variants=results, loss_distance=agreement(results), peers=choice.step_status(results))
        gc.collect()
        torch.compiler.reset()
    for name, distance in agreement(results).items():
        losses = ", ".join(f"{loss:.4f}" for loss in results[name]["losses"])
        bound = PEER_TOLERANCE if name in choice.VARIANTS else LOSS_TOLERANCE
        print(
            f"{name}: first losses {losses}, within {distance:.1e} of torch's"
            + ("" if distance <= bound else ": TOO FAR")
        )
    print(*status.not_measured(part.data["peers"]), sep="\n")
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
