"""Which peers there are, by the names of their variants, and what becomes of each.

    transformers        LlamaForCausalLM with fp32 parameters; bf16 under torch.autocast, the usual recipe.
                        Its attention is SDPA
    transformers eager  the same with attn_implementation="eager": attention as two products and a softmax,
                        all scores in memory
    liger               transformers with Liger-Kernel's rotary embedding, norm, SwiGLU and fused loss. Triton
                        kernels: needs a GPU
    patched             transformers with all of our operations in it, by smollm2.patch: the kernels on a GPU
                        (or interpreted), else those for CPUs
    torchao             transformers' Llama in bf16, its matrix products with weights in 8 bits: generation
    litgpt              its GPT in a process of its own, under the same autocast
    ...+compile         under torch.compile

All training steps start from the weights they are given and are those of bench.step.TrainingStep.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers.litgpt import LitgptStep, litgpt_variant, litgpt_version
from bench.peers.llama_cpp import gguf_file, llama_cpp_variant
from bench.peers.status import peer_status, require
from bench.peers.transformers import (
    autocast_forward,
    patched,
    transformers_llama,
    transformers_variant,
    with_liger,
)
from bench.step import TrainingStep
from bench.variant import Variant
from smollm2.cli import parse_dtype
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM

VARIANTS = (  # of a step
    "transformers", "liger", "patched", "litgpt", "transformers eager", "transformers+compile",
    "patched+compile", "litgpt+compile",
)  # fmt: skip
# The library behind a variant, by the first word of its name up to a "+".
LIBRARY = {
    "transformers": "transformers", "patched": "transformers", "liger": "liger-kernel", "litgpt": "litgpt",
    "llama.cpp": "llama-cpp-python", "torch.compile": "torch.compile", "torchao": "torchao",
}  # fmt: skip
OF_STEPS = ("transformers", "liger-kernel", "litgpt", "torch.compile")
OF_GENERATION = ("transformers", "torchao", "litgpt", "llama-cpp-python", "torch.compile")


def peer_step(
    variant: str,
    config: SmolLM2Config,
    weights: Mapping[str, Tensor],
    ids: Tensor,
    autocast: bool,
    compiler: str,
) -> TrainingStep | LitgptStep:
    """The step of a variant of VARIANTS on the device of ids [B, T]. weights: fp32. compiler: the backend of
    torch.compile.

    Raises Unavailable, with the version and the reason, for a peer that cannot be measured here.
    """
    kind, _, extra = variant.partition("+")
    if kind == "litgpt":
        return LitgptStep(weights, config, ids, autocast, compiler if extra else None)
    if kind == "liger":
        require("liger-kernel", ids.device)
    attention = "eager" if kind == "transformers eager" else "sdpa"
    called = llama = transformers_llama(config, weights, ids.device, attention)
    if kind == "patched":
        called = llama = patched(llama)
    if kind == "liger":
        called = with_liger(llama)
    elif extra:
        called = torch.compile(llama, backend=compiler)
    return TrainingStep(llama, autocast_forward(called, ids.device, autocast))


def library(variant: str) -> str:
    """The library behind a variant; a model of ours under torch.compile counts as that; "" for our own."""
    known = LIBRARY.get(variant.split()[0].partition("+")[0])
    return known or ("torch.compile" if "+compile" in variant else "")


def variants_status(
    outcomes: Iterable[tuple[str, str]], libraries: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """`peer_status` of those libraries. outcomes: (variant, "" or why it was not measured)."""
    found: dict[str, list[str]] = {name: [] for name in libraries}
    for variant, failed in outcomes:
        if library(variant) in found:
            found[library(variant)].append(failed)
    return peer_status(found, {"litgpt": litgpt_version()})


def step_status(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same of rows {variant: {... or "failed": why}} of training steps."""
    return variants_status(((name, row.get("failed", "")) for name, row in rows.items()), OF_STEPS)


def library_variant(name: str, weights: SmolLM2ForCausalLM, folder: Path, device: torch.device) -> Variant:
    """The variant of that name, of transformers, torchao, litgpt or llama.cpp. folder: the weights, saved.

    Raises UsageError, with the version and the reason, for one that cannot be had here.
    """
    kind, what = name.split()
    if kind == "llama.cpp":
        known = require("llama-cpp-python")
        if device.type != "cpu":
            raise UsageError(f"llama-cpp-python {known}: measured on the CPU; add --device cpu")
        return llama_cpp_variant(gguf_file(weights, what), weights.config, what, torch.get_num_threads())
    kind, _, extra = kind.partition("+")
    dtype = torch.bfloat16 if kind == "torchao" else parse_dtype(what)
    assert dtype is not None
    if kind == "litgpt":
        return litgpt_variant(weights, dtype, device)
    how = {"compiled": extra == "compile", "static": extra == "static", "int8": kind == "torchao"}
    return transformers_variant(folder, dtype, device, **how)
