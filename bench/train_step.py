"""`python -m bench.train_step`: one optimizer step of the 135M model at 32 x 512, per backend and beside other libraries, which must agree.

A step is forward, backward, clipping to a global norm of 1 and AdamW, with fp32 parameters and bf16 activations. Every variant starts from
the same weights and sees the same tokens, so the losses of the first steps must agree: nobody wins by computing less. The peers are those
of bench/peer_models.py, under autocast; one that cannot be measured here is named with its version and the reason.
Rates are medians over blocks of steps with one wait per block, as in training. MFU counts 6 operations per weight and token and causal
attention half, against the vendor's dense bf16 peak; no MFU for a device that the table does not have.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import launches, peers, work
from bench.part import Part, one_line, parser
from bench.timing import synchronize
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.model import SmolLM2ForCausalLM

# Ours and the plain reference first: what compiles for a minute must not cost them their turn.
VARIANTS = ("triton", "torch", "triton+graph", "torch+compile", "triton+compile")
COMPARED_STEPS = 3
LOSS_TOLERANCE = 0.02  # nats, between backends, in bf16
PEER_TOLERANCE = 0.1  # the same for peers, which keep the residual stream in fp32; see bench.step_peers


class TrainingStep:
    """One optimizer step as a call: tokens -> loss, which stays on the device."""

    def __init__(self, model: SmolLM2ForCausalLM, forward: Callable[..., Any] | None = None, lr: float = 3e-4) -> None:
        """forward: the model, or torch.compile of it."""
        self.model = model
        self._forward = model if forward is None else forward
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        device = model.lm_head.weight.device
        self.lr = torch.tensor(lr, device=device)  # a tensor, so that a schedule needs no other step and a captured graph sees it
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=True, capturable=device.type == "cuda")

    def __call__(self, ids: Tensor, doc_start: Tensor | None = None) -> Tensor:
        """ids, doc_start [B, T] -> loss in nats."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._forward(ids, ids, doc_start).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


class CapturedStep:
    """A TrainingStep as one CUDA graph: no Python and no launches between its kernels. Runs two steps before it is captured."""

    def __init__(self, step: TrainingStep, ids: Tensor) -> None:
        self._ids = ids.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.first_losses = [step(self._ids) for _ in range(2)]
        torch.cuda.synchronize()
        step.optimizer.zero_grad(set_to_none=True)  # the gradients of the capture live in the graph's own memory
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._loss = step(self._ids)

    def __call__(self, ids: Tensor) -> Tensor:
        self._ids.copy_(ids)
        self._graph.replay()
        return self._loss.clone()


def build(config: SmolLM2Config, backend: str, device: torch.device) -> SmolLM2ForCausalLM:
    """The model with the weights that seed 0 gives on this device, in training mode, bf16 activations (fp32 on a CPU)."""
    torch.manual_seed(0)
    with torch.device(device):
        return SmolLM2ForCausalLM(config, backend, compute_dtype=torch.bfloat16 if device.type == "cuda" else None).train()


def measure(variant: str, config: SmolLM2Config, ids: Tensor, tiny: bool) -> dict[str, Any]:
    """One variant, of VARIANTS or a peer, from its first step to its rate."""
    from bench import peer_models  # which imports this module

    device = ids.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    name, _, extra = variant.partition("+")
    compiler = "aot_eager" if tiny else "inductor"
    began = time.perf_counter()
    first: list[Tensor] = []
    elsewhere: peer_models.LitgptStep | None = None  # a step in another process
    if variant in peer_models.VARIANTS:
        weights = build(config, "torch", device).state_dict()
        peer = peer_models.peer_step(variant, config, weights, ids, device.type == "cuda", compiler)
        del weights
        step: Callable[[Tensor], Tensor]
        if isinstance(peer, peer_models.LitgptStep):
            elsewhere, step = peer, partial(_ask, peer)
        else:
            step = peer
    else:
        model = build(config, name, device)
        step = plain = TrainingStep(model, torch.compile(model, backend=compiler) if extra == "compile" else None)
        if extra == "graph":
            step = captured = CapturedStep(plain, ids)
            first = captured.first_losses
    losses = [float(loss) for loss in [*first, *(step(ids) for _ in range(COMPARED_STEPS - len(first)))]]
    found: dict[str, Any] = {"losses": losses, "first_steps_seconds": round(time.perf_counter() - began, 2)}

    blocks, length = (1, 1) if tiny else (6, 5)
    seconds = []
    for _ in range(blocks):
        synchronize(device)
        began = time.perf_counter()
        if elsewhere is not None:
            peak_elsewhere = elsewhere.steps(length)["peak_memory_bytes"]
        else:
            for _ in range(length):
                step(ids)
        synchronize(device)
        seconds.append((time.perf_counter() - began) / length)
    typical = statistics.median(seconds)
    rate, peak = ids.numel() / typical, work.peak_flops(device)
    found["step_ms"] = round(typical * 1e3, 3)
    found["spread"] = round((max(seconds) - min(seconds)) / typical, 3)
    found["tokens_per_second"] = round(rate, 1)
    found["mfu"] = round(rate * work.flops_per_token(config, ids.shape[1]) / peak, 4) if peak else None
    if device.type == "cuda":
        found["peak_memory_gb"] = round((peak_elsewhere if elsewhere is not None else torch.cuda.max_memory_allocated()) / 1e9, 2)
    if elsewhere is None and (not extra or (extra == "compile" and device.type == "cuda")):
        names = launches.count(lambda: step(ids), device)
        found["launches"] = {"all": sum(names.values()), "ours": launches.triton_part(names), "names": dict(names.most_common(40))}
    return found


def _ask(peer: Callable[[], Tensor], ids: Tensor) -> Tensor:
    """A step in another process, which has the tokens already."""
    return peer()


def agreement(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Variant -> largest distance of its first losses from those of the torch backend."""
    base = results.get("torch", {}).get("losses")
    if base is None:
        return {}
    return {
        name: max(abs(a - b) for a, b in zip(found["losses"], base, strict=True)) for name, found in results.items() if "losses" in found
    }


def show(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in found:
        return f"{name:21} {found['failed']}"
    mfu = f"{100 * found['mfu']:.1f} %" if found["mfu"] is not None else "none"
    line = f"{name:21}{found['step_ms']:10.2f} ms{found['tokens_per_second']:12,.0f} tok/s  MFU {mfu}"
    if "peak_memory_gb" in found:
        line += f"  {found['peak_memory_gb']:.1f} GB"
    if "launches" in found:
        line += f"  {found['launches']['all']} launches ({found['launches']['ours']} ours)"
    return line


def main(argv: Sequence[str]) -> int:
    from bench import peer_models  # which imports this module

    arguments = parser("train_step", "Times one optimizer step per backend, beside other libraries.")
    arguments.add_argument("--model", default="135M", help="preset")
    arguments.add_argument("--variant", action="append", choices=(*VARIANTS, *peer_models.VARIANTS), help="only this one; may be repeated")
    options = arguments.parse_args(argv)
    part = Part("step", options)
    config = part.model(options.model)
    batch, length = (1, 8) if part.tiny else (32, 512)
    ids = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(part.device)
    part.save(
        model=options.model, batch=batch, length=length, parameters=config.num_parameters(), peak_flops=work.peak_flops(part.device),
        mfu_convention="6 per weight and token, causal attention counted half, dense bf16 peak of the vendor",
    )  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    for variant in options.variant or (*VARIANTS, *peer_models.VARIANTS):
        if part.left() < 0:
            results[variant] = {"failed": "no time was left"}
        elif variant.endswith("+graph") and part.device.type != "cuda":
            results[variant] = {"failed": "needs a GPU"}
        else:
            try:
                results[variant] = measure(variant, config, ids, part.tiny)
            except peers.Unavailable as reason:
                results[variant] = {"failed": str(reason)}
            except Exception as failure:  # noqa: BLE001 - one variant's failure is a result, and the others still run
                results[variant] = {"failed": one_line(failure)}
            gc.collect()
            torch.compiler.reset()
        print(show(variant, results[variant]), flush=True)
        part.save(variants=results, loss_distance=agreement(results), peers=peer_models.step_standing(results))
    for name, distance in agreement(results).items():
        losses = ", ".join(f"{loss:.4f}" for loss in results[name]["losses"])
        bound = PEER_TOLERANCE if name in peer_models.VARIANTS else LOSS_TOLERANCE
        print(f"{name}: first losses {losses}, within {distance:.1e} of torch's" + ("" if distance <= bound else ": TOO FAR"))
    print(*peers.not_measured(part.data["peers"]), sep="\n")
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
