"""transformers' Llama: its step, with Liger-Kernel's operations and with ours too, and its generation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers.status import NotInstalled, require
from bench.variant import Variant
from smollm2.config import SmolLM2Config
from smollm2.engine.cache import cache_bytes

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


def patched(llama: Any) -> Any:
    """The model with all of our operations in it: the kernels where they run, else those for CPUs."""
    from smollm2.patch import apply_kernels

    runs = llama.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return apply_kernels(llama, backend="triton" if runs else "torch")


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


def transformers_variant(
    folder: Path, dtype: torch.dtype, device: torch.device, *,
    compiled: bool, static: bool = False, int8: bool = False,
) -> Variant:  # fmt: skip
    """LlamaForCausalLM with the weights in `folder`. static: with StaticCache, which a compiled step has
    anyway. int8: torchao's weights in 8 bits, the head's too. Raises NotInstalled.
    """
    require("transformers")
    if int8:
        require("torchao")
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    llama: Any = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    llama = llama.to(device).eval()
    if int8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(llama, Int8WeightOnlyConfig())
    step = torch.compile(llama.forward, dynamic=False) if compiled else llama
    weights = {id(weight): weight for name, weight in llama.named_parameters() if "embed_tokens" not in name}
    weights[id(llama.lm_head.weight)] = llama.lm_head.weight  # the embedding, or its copy in 8 bits
    size, config = sum(map(_nbytes, weights.values())), SmolLM2Config.from_file(folder / "config.json")
    return Variant(
        "int8" if int8 else str(dtype).removeprefix("torch."), size, cache_bytes(config, 1, 1, dtype),
        partial(TransformersTurns, llama, step, static or compiled),
    )  # fmt: skip


def _nbytes(weight: Any) -> int:
    """Bytes of a weight, quantised or not."""
    parts = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else ()
    return sum(_nbytes(getattr(weight, part)) for part in parts) or int(weight.nbytes)


class TransformersTurns:
    """Forward calls with a growing cache, or a static one. step: the model as it decodes."""

    def __init__(
        self, llama: Any, step: Callable[..., Any], static: bool, prompts: Tensor, new_tokens: int
    ) -> None:
        from transformers import StaticCache

        self._llama, self._step, self._prompts = llama, step, prompts
        capacity = prompts.shape[1] + new_tokens
        self._static = StaticCache(llama.config, max_cache_len=capacity) if static else None
        self._cache: Any = self._static
        # of the next token, in every row
        self._position = torch.zeros(1, 1, dtype=torch.int64, device=prompts.device)

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        from transformers import DynamicCache

        if self._static is not None:
            self._static.reset()
        else:
            self._cache = DynamicCache()
        self._position.fill_(self._prompts.shape[1])
        return _most_likely(
            self._llama(self._prompts, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        )

    @torch.inference_mode()
    def decode(self, tokens: Tensor, steps: int) -> Tensor:
        found = [tokens]
        for _ in range(steps):
            place = {} if self._static is None else {"position_ids": self._position}
            result = self._step(found[-1], past_key_values=self._cache, use_cache=True, **place)
            found.append(_most_likely(result))
            self._position += 1
        return torch.cat(found[1:], 1)


def _most_likely(result: Any) -> Tensor:
    tokens: Tensor = result.logits[:, -1].argmax(-1, keepdim=True)
    return tokens
