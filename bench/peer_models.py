"""A training step of each library that trains the same model: what bench/step_peers.py and
bench/train_step.py measure beside ours.

    transformers        LlamaForCausalLM with fp32 parameters; bf16 under torch.autocast, the usual recipe. Its attention is torch's SDPA
    transformers eager  the same with attn_implementation="eager": attention as two products and a softmax, all scores in memory
    liger               transformers with Liger-Kernel's rotary embedding, norm, SwiGLU and fused loss. Triton kernels: needs a GPU
    litgpt              its GPT in a process of its own (bench/litgpt_peer.py), under the same autocast
    ...+compile         under torch.compile

All start from the weights they are given and take the step of bench.train_step.TrainingStep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.litgpt_peer import LitgptStep, litgpt_version
from bench.peers import NotInstalled, require, standing
from bench.train_step import TrainingStep
from smollm2.config import SmolLM2Config

VARIANTS = ("transformers", "liger", "litgpt", "transformers eager", "transformers+compile", "litgpt+compile")
# The library behind a variant, by its name up to the first blank or "+".
LIBRARY = {"transformers": "transformers", "liger": "liger-kernel", "litgpt": "litgpt"}
# What Liger-Kernel replaces in transformers' module for good; the rest it replaces in the model.
LIGER_GLOBALS = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
Forward = Callable[..., Any]  # (ids, labels, doc_start) -> what has a loss


def transformers_llama(
    config: SmolLM2Config,
    weights: Mapping[str, Tensor],
    device: torch.device | None = None,
    attention: str = "sdpa",
) -> Any:
    """LlamaForCausalLM with those weights, fp32, in training mode. attention: "sdpa" or "eager". Raises
    NotInstalled.
    """
    try:
        import transformers
    except ImportError as missing:
        raise NotInstalled("transformers") from missing
    options = {**config.to_dict(), "use_cache": False, "attn_implementation": attention}
    llama: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    llama.load_state_dict(weights)
    return llama.to(device).train()


def with_liger(llama: Any) -> Callable[..., Any]:
    """Puts Liger-Kernel's operations into the model -> its forward.

    The rotary embedding can only be replaced for all of transformers: that is done while the forward runs and
    undone after it, so that the plain model of the same process stays what it is. Raises NotInstalled.
    """
    require("liger-kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    plain = {name: getattr(modeling_llama, name) for name in LIGER_GLOBALS}
    try:
        apply_liger_kernel_to_llama(model=llama)
        rotary = modeling_llama.apply_rotary_pos_emb
    finally:
        for name, value in plain.items():
            setattr(modeling_llama, name, value)

    def forward(*arguments: Any, **options: Any) -> Any:
        with _replaced(modeling_llama, "apply_rotary_pos_emb", rotary):
            return llama(*arguments, **options)

    return forward


@contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def autocast_forward(called: Callable[..., Any], device: torch.device, autocast: bool) -> Forward:
    """A transformers model as TrainingStep calls a model; autocast: bf16 under torch.autocast."""

    def forward(ids: Tensor, labels: Tensor, doc_start: None = None) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return called(ids, labels=labels, use_cache=False)

    return forward


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
    llama = transformers_llama(
        config, weights, ids.device, "eager" if kind == "transformers eager" else "sdpa"
    )
    called = (
        with_liger(llama) if kind == "liger" else torch.compile(llama, backend=compiler) if extra else llama
    )
    return TrainingStep(llama, autocast_forward(called, ids.device, autocast))


def step_standing(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`bench.peers.standing` of rows {variant: {... or "failed": why}}; those of torch.compile are our own
    model under it.
    """
    outcomes: dict[str, list[str]] = {name: [] for name in (*LIBRARY.values(), "torch.compile")}
    for variant, row in rows.items():
        kind = variant.partition("+")[0].partition(" ")[0]
        library = LIBRARY.get(kind, "torch.compile" if "+compile" in variant else "")
        if library:
            outcomes[library].append(row.get("failed", ""))
    return standing(outcomes, {"litgpt": litgpt_version()})
