"""`python -m bench.gpu_launches model|tests|bench`: every specialisation that training and generation, the
tests or the benchmarks launch.

Recorded without a GPU (bench/stand_in.py) from the programs themselves: the model's own training step,
prefill and decode step at the presets' sizes; the tests, whose comparisons are switched off; what the parts
of bench.gpu measure. `python -m kernels.certify --fill` compiles what this lists, so that a GPU need not wait
for the compiler.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import generation, kernels, ladder, memcheck, tuning
from bench.case import Shapes, Variant
from bench.correctness import PATTERNS
from bench.record import ROOT
from bench.stand_in import standing_in_for_cuda
from bench.step import TrainingStep
from kernels import select_backend
from kernels.certify.fill import SOURCES, Specialisations
from kernels.certify.targets import target_for
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.engine.captured import SMALLEST_CAPACITY
from smollm2.engine.eager import Engine
from smollm2.errors import UsageError
from smollm2.generation.slots import PREFILL_TOKENS
from smollm2.model import SmolLM2ForCausalLM

CUDA = torch.device("cuda")
LAYERS = 2  # the first, whose norm has no residual, and one that stands for all others
# Every preset, and the model of train/configs/quickstart.yaml, which `python -m train.run` takes by itself.
MODELS: dict[str, dict[str, Any]] = {
    "135M": {}, "360M": {}, "1.7B": {}, "tiny": {},
    "quickstart": dict(
        hidden_size=192, intermediate_size=512, num_attention_heads=3, num_key_value_heads=1,
        max_position_embeddings=1024, vocab_size=4096
    ),
}  # fmt: skip
# one row, a few, the most that the fused layer takes, and more than that, with and without a multiple of 16
BATCHES = (1, 2, 16, 17, 32)
KEYS = (100, 1000)  # of a cache that grows step by step; those of captured loops are powers of two
NEW = (2, 4, 8, 16)  # tokens that speculative decoding looks at together
# Tests of a GPU's sizes: torch's own products, and the truth in fp64, take a CPU many minutes
LARGE = ("test_whole_vocabulary_in_bf16", "test_many_tokens", "test_many_rows")


def built(
    name: str, dtype: torch.dtype | None = None, compute: torch.dtype | None = None, **changes: Any
) -> SmolLM2ForCausalLM:
    """One of MODELS with LAYERS layers. dtype: of the parameters; compute: of the activations, where they
    differ.
    """
    preset = "135M" if name == "quickstart" else name
    config = SmolLM2Config.preset(preset, num_hidden_layers=LAYERS, **{**MODELS[name], **changes})
    with CUDA:
        return SmolLM2ForCausalLM(config, select_backend("triton", CUDA), compute_dtype=compute).to(dtype)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.zeros(batch, length, dtype=torch.int64, device=CUDA)


def training(model: SmolLM2ForCausalLM, length: int) -> None:
    """A step and an evaluation, of plain rows and of packed documents."""
    tokens, step = ids(32, length), TrainingStep(model)
    for starts in (None, tokens.int()):
        model.train()
        step(tokens, starts)
        with torch.no_grad():
            model.eval()(tokens, labels=tokens, doc_start=starts, reduction="sum")


@torch.inference_mode()
def decoding(model: SmolLM2ForCausalLM, batch: int, keys: int, new: int = 1, prompt: int = 77) -> None:
    """A prompt, then a step that sees `keys` keys, the cache being as long."""
    engine = Engine(model)
    cache = engine.allocate(batch, keys)
    engine.prefill(ids(batch, min(prompt, keys - new)), ids(batch, 1)[:, 0], cache)
    cache.longest = keys - new
    engine.decode(ids(batch, new), cache)


def record_model() -> None:
    """Training and generation at the presets' sizes, whatever the batch, in the dtypes that a command line
    offers.
    """
    for name, compute, length in product(MODELS, (torch.bfloat16, None), (512, 500)):
        training(built(name, compute=compute), length)
    for compute in (torch.bfloat16, None):
        # a tokenizer may learn any number of tokens
        training(built("quickstart", compute=compute, vocab_size=301), 512)
    for name, dtype in product(MODELS, (torch.bfloat16, torch.float16, torch.float32)):
        model = built(name, dtype).eval()
        longest = model.config.max_position_embeddings
        capacities = [SMALLEST_CAPACITY << doublings for doublings in range(8)]
        for batch, keys in product(BATCHES, (*KEYS, *capacities)):
            if keys <= longest:
                decoding(model, batch, keys)
        for new in NEW:
            decoding(model, 1, 256, new)
        decoding(model, 1, 128, prompt=16)
        with torch.inference_mode():  # as smollm2.perplexity asks
            hidden = model.lm_head.weight.new_empty(77, model.config.hidden_size)
            targets = ids(77, 1)[:, 0]
            model.backend.linear_cross_entropy(hidden, model.lm_head.weight, targets, reduction="none")


def record_bench() -> None:
    """What the parts of bench.gpu measure at full size."""
    backend, config = select_backend("triton", CUDA), SmolLM2Config.preset("135M")
    shapes = Shapes(config, *kernels.FULL, torch.bfloat16, CUDA)
    found = {case.op: case for case in kernels.every_case(shapes, backend, "eager", False)}

    def call(op: str) -> None:
        for name in found[op].variants:
            if name.startswith("triton"):  # each form of ours
                variant = Variant(found[op], name, 1)
                variant.call()
                if variant.differentiable:
                    variant.through_autograd()

    for op in found:
        call(op)
    for name, (op, _, candidates) in tuning.CANDIDATES.items():
        for launch in candidates:
            with tuning.forced(name.partition(" ")[0], launch):
                call(op)
    for check in memcheck.operations(backend, CUDA).values():
        check()
    small = SmolLM2Config.preset("135M", num_hidden_layers=LAYERS)
    for setup in ladder.setups(backend, True).values():
        if not setup.compiled and setup.backend.name != "plain":
            tokens = ids(*kernels.FULL)
            ladder.build_model(setup, small, torch.bfloat16, CUDA)(tokens, tokens).loss.backward()
    training(built("135M", compute=torch.bfloat16), kernels.FULL[1])
    sizes = generation.Sizes()
    for dtype in (torch.bfloat16, torch.float32):
        model = built("135M", dtype).eval()
        for batch, keys in {*sizes.first, *sizes.others, (sizes.agreement[0], sum(sizes.agreement[1:]))}:
            decoding(model, batch, keys)
            decoding(model, batch, keys + 1)  # the bytes of the last key of a cache that is not yet full
        many = (PREFILL_TOKENS // sizes.many[1], sizes.many[1])
        for batch, length in (*sizes.prefills, sizes.agreement[:2], many):
            decoding(model, batch, length + 1, prompt=length)


class NoComparisons:
    """A plugin of pytest: nothing was computed that could be compared, and a test should not end at its first
    comparison.
    """

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.name.partition("[")[0] not in LARGE]

    def pytest_collection_finish(self) -> None:
        torch.testing.assert_close = torch.equal = lambda *_, **__: True  # type: ignore[assignment]
        sys.modules["numerics"].check = lambda *_, **__: None  # type: ignore[attr-defined]


def record_tests() -> None:
    """The tests that bench.correctness runs. Python's -O has taken out their asserts."""
    import pytest

    files = [str(path) for pattern in PATTERNS for path in sorted((ROOT / "tests").glob(pattern))]
    if not files:
        absent = "there are none beside this package; they are part of the repository, not of an installation"
        raise UsageError(f"tests: {absent}")
    options = "--assert=plain --tb=line -q -p no:cacheprovider -p no:xdist -o addopts=".split()
    # which takes minutes to count what a CPU does
    with mock.patch.object(torch.profiler, "profile", mock.MagicMock()):
        code = pytest.main([*options, *files], plugins=[NoComparisons()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # some fail: they want numbers
        raise UsageError(f"tests: pytest ended with {code!r}")


# What is recorded, and where its tensors lie: the tests compute with theirs.
RECORDED: dict[str, tuple[Callable[[], None], str]] = {
    "model": (record_model, "meta"), "tests": (record_tests, "cpu"), "bench": (record_bench, "meta"),
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_launches", description="Lists the kernels that a GPU would be asked for."
    )
    add, what = parser.add_argument, "training and generation, the kernels' tests, or the benchmarks"
    add("source", choices=SOURCES, help=what)
    add("--arch", default="sm_90", help="of the GPU (default sm_90)")
    rows = "JSON: a module, a kernel and its specialisation a row"
    add("--out", type=Path, required=True, metavar="FILE", help=rows)
    add("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    recorder = Specialisations(target_for(options.arch))
    record, device = RECORDED[options.source]
    with standing_in_for_cuda(recorder, device):
        record()
    options.out.write_text(json.dumps(list(recorder.found)) + "\n", encoding="utf-8")
    print(f"{options.source}: {len(recorder.found)} specialisations", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
