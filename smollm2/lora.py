"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen model, and adapters of low rank beside its projections.

    y = x W^T + alpha / r * dropout(x) A^T B^T        W [out, in] frozen, A [r, in] random, B [out, r] zero

The files are peft's, adapter_config.json and adapter_model.safetensors, so that either reads the other's. The
layer is not: peft imports transformers and accelerate, seconds before the first step, and its layers do not
know the 16-bit working copies of fp32 weights, which a training step in bf16 multiplies by.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.eager.linear import linear
from smollm2.config import SmolLM2Config
from smollm2.errors import LoadError, UsageError
from smollm2.json_file import read_json

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's, before the names of the model


@dataclass(frozen=True)
class LoraConfig:
    """rank: columns of B. alpha: what is added is scaled by alpha / rank. dropout: of the adapter's input,
    while training. targets: the projections that have an adapter, in every block.
    """

    rank: int
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def to_peft(self, base: str) -> dict[str, Any]:
        """The content of adapter_config.json. base: the model that is adapted, by a name that loads it."""
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": self.rank,
            "lora_alpha": self.alpha, "lora_dropout": self.dropout, "target_modules": list(self.targets),
            "bias": "none", "inference_mode": True,
        }  # fmt: skip

    @classmethod
    def from_peft(cls, found: Mapping[str, Any], where: Path) -> Self:
        """From the content of adapter_config.json. Raises LoadError for what this project does not have, by
        name.
        """
        known = {"peft_type": "LORA", "bias": "none", "r": None, "target_modules": None}
        for key, wanted in known.items():
            if key not in found or (wanted and found[key] != wanted):
                raise LoadError(f"{where}: {key}: expected {wanted or 'a value'}, got {found.get(key)!r:.80}")
        for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias",
                    "fan_in_fan_out", "layers_to_transform", "exclude_modules", "target_parameters",
                    "trainable_token_indices", "layer_replication", "alora_invocation_tokens"):  # fmt: skip
            if found.get(key):
                raise LoadError(f"{where}: {key} is not implemented here; merge the adapter with peft first")
        targets, alpha, dropout = (found.get(key) for key in ("target_modules", "lora_alpha", "lora_dropout"))
        named = targets if isinstance(targets, list) else TARGETS if targets == "all-linear" else [targets]
        if unknown := sorted(set(map(str, named)) - set(TARGETS)):
            raise LoadError(f"{where}: target_modules: expected some of {', '.join(TARGETS)}, got {unknown}")
        try:
            # peft writes a set in any order
            ordered = tuple(name for name in TARGETS if name in named)
            return cls(int(found["r"]), float(alpha), float(dropout or 0.0), ordered)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise LoadError(f"{where}: not a LoRA configuration ({error})") from None


class LoraLinear(nn.Linear):
    """A projection with an adapter. The weight is the parameter of the projection, not a copy of it."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.config = config
        self.weight = base.weight
        self.register_parameter("bias", None)
        drawn = torch.empty(config.rank, base.in_features)  # on the CPU: the same numbers for every device
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        self.lora_A = nn.Parameter(drawn.to(base.weight))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))

    def forward(self, x: Tensor, copy: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x. copy: the weight in that dtype, if there is one."""
        low = linear(F.dropout(x, self.config.dropout, self.training), self.lora_A)
        return linear(x, self.weight, copy) + linear(low, self.lora_B) * self.config.scale

    def merged_weight(self) -> Tensor:
        """W + scale B A [out, in], computed in fp32, in the dtype of W."""
        product = self.lora_B.detach().float() @ self.lora_A.detach().float()
        return (self.weight.detach().float() + self.config.scale * product).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Freezes the parameters of a model, and gives its projections adapters, which can be trained.

    A is drawn from torch's global generator as peft draws it. Raises UsageError for a target that no module
    of the model has.
    """
    model.requires_grad_(False)
    parents = list(model.modules())
    for target in config.targets:
        owners = [module for module in parents if isinstance(getattr(module, target, None), nn.Linear)]
        if not owners:
            raise UsageError(f"lora_targets: expected projections of the model, got {target!r}")
        for module in owners:
            setattr(module, target, LoraLinear(getattr(module, target), config))


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers of the model that have an adapter, by their names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapter, by peft's names."""
    layers = adapters(model).items()
    parts = ((name, kind, getattr(layer, f"lora_{kind}")) for name, layer in layers for kind in "AB")
    return {f"{PREFIX}{name}.lora_{kind}.weight": part.detach() for name, kind, part in parts}


@torch.no_grad()
def load_adapters(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Puts the tensors of adapter_model.safetensors into the adapters of the model. Raises LoadError unless
    they are all that it has, in their shapes.
    """
    own = adapter_tensors(model)
    # peft compiles models too, and names what it wraps
    given = {re.sub(r"\._orig_mod|_orig_mod\.", "", name): tensor for name, tensor in tensors.items()}
    if different := sorted(own.keys() ^ given.keys()):
        raise LoadError(
            f"{where}: {different[0]}: expected in the file and in the model, found in one of them"
        )
    for name, part in own.items():
        if part.shape != given[name].shape:
            shapes = f"expected shape {list(part.shape)}, got {list(given[name].shape)}"
            raise LoadError(f"{where}: {name}: {shapes}")
        part.copy_(given[name])


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter to the weight of its projection, which becomes a plain one again."""
    for name, layer in adapters(model).items():
        layer.weight.copy_(layer.merged_weight())
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = layer.weight
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    model.requires_grad_(True)


def adapter_parameters(model_config: SmolLM2Config, config: LoraConfig) -> int:
    """How many numbers the adapters of a model of that shape have."""
    shapes = model_config.parameter_shapes()
    own = [shape for name, shape in shapes.items() if name.split(".")[-2] in config.targets]
    return sum(config.rank * sum(shape) for shape in own)


def read_adapter_config(folder: Path) -> tuple[LoraConfig, str]:
    """The configuration of the adapter in a folder, and the name of the model that it adapts. Raises
    LoadError.
    """
    path = folder / ADAPTER_CONFIG
    found = read_json(path)
    base = found.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise LoadError(f"{path}: base_model_name_or_path: expected the name of a model, got {base!r:.80}")
    return LoraConfig.from_peft(found, path), base
