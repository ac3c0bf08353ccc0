"""What the tests of smollm2.patch share: small Llamas of transformers, a truth for them in float64 that has
nothing of transformers in it, and the comparison of the three.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numerics
import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from kernel_cases import ORACLE  # noqa: E402

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM  # noqa: E402

VOCABULARY = 97
TINY = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.2, rms_norm_eps=1e-5,
    max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
WIDE_HEADS = dict(TINY, hidden_size=128)  # two heads of 64, which share one key head
# The released 135M model's widths and heads, at two of its 30 layers and with a vocabulary cut from 49,152.
RELEASED = dict(
    TINY, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
    initializer_range=1 / 24, vocab_size=256,
)  # fmt: skip


def llama(**changes: Any) -> Any:
    """A LlamaForCausalLM with the weights of seed 0, in training mode."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TINY, "rope_theta": 1e5, **changes})
    return transformers.LlamaForCausalLM(config).train()


def batch(rows: int = 2, length: int = 19, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """ids and labels [rows, length]; one label is ignored."""
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(7))
    labels = ids.clone()
    labels[0, 3] = -100
    return ids, labels


def packed(ids: Tensor) -> tuple[Tensor, Tensor]:
    """position_ids and doc_start of three documents in the first row and two in the others."""
    length = ids.shape[1]
    start = torch.zeros_like(ids)
    start[:, length // 2 :] = length // 2
    start[0, length // 4 : length // 2] = length // 4
    return torch.arange(length, device=ids.device) - start, start


def results(
    model: Any, ids: Tensor, labels: Tensor, autocast: bool = False, **inputs: Any
) -> dict[str, Tensor]:
    """The loss, every gradient, and the logits in evaluation."""
    model.zero_grad()
    doubtful = torch.autocast(ids.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    with doubtful:
        loss = model.train()(ids, labels=labels, **inputs).loss
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    with doubtful, torch.no_grad():
        found["logits"] = model.eval()(ids, **inputs).logits
    model.train()
    return found


def truth_of(model: Any, ids: Tensor, labels: Tensor, doc_start: Tensor | None = None) -> dict[str, Tensor]:
    """The same from the formulas of this project in float64, with the weights of that model."""
    own = SmolLM2Config.from_dict(model.config.to_dict())
    exact = SmolLM2ForCausalLM(own, backend=ORACLE).double().to(model.device)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    inputs = {} if doc_start is None else {"doc_start": doc_start}
    return results(exact, ids, labels, **inputs)


def hold(
    apply: Callable[[Any], Any], sizes: dict[str, Any], documents: bool = False,
    dtype: torch.dtype | None = None, length: int = 19, device: str | torch.device = "cpu", **changes: Any,
) -> None:  # fmt: skip
    """A Llama of those sizes with `apply` keeps the numerics contract for the loss, the logits and every
    gradient; its base is the same model without. dtype: of the parameters; None is bf16 autocast.
    """
    sizes = {**sizes, **changes}
    ids, labels = (x.to(device) for x in batch(length=length, vocabulary=sizes["vocab_size"]))
    positions, start = packed(ids)
    inputs: dict[str, Any] = {"position_ids": positions, "use_cache": False} if documents else {}
    if documents:  # transformers' loss crosses from one document into the next, unless labels say otherwise
        labels = labels.masked_fill(positions == 0, -100)
    plain, patched = llama(**sizes).to(device), apply(llama(**sizes).to(device))
    if dtype is not None:
        plain, patched = plain.to(dtype), patched.to(dtype)
    base = results(plain, ids, labels, dtype is None, **inputs)
    ours = results(patched, ids, labels, dtype is None, **inputs)
    truth = truth_of(plain, ids, labels, start if documents else None)
    assert ours.keys() == base.keys() == truth.keys()
    for name, value in ours.items():
        numerics.check("patched Llama", name, value, base[name], truth[name], tested=dtype or torch.bfloat16)
