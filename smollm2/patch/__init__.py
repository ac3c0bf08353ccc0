"""The kernels in a Llama of transformers, by one line:

    from smollm2.patch import apply_kernels
    apply_kernels(model)               # a model, also inside a PeftModel
    apply_kernels(LlamaForCausalLM)    # or the class: every model that is made from then on

What they replace, and what they leave: docs/patch.md.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from kernels import TORCH, Backend
from smollm2.errors import UsageError
from smollm2.patch.attention import NAME, Kernels, accelerators, interpreted
from smollm2.patch.attention import register as register
from smollm2.patch.layers import REPLACED, classes

HEAD_DIMS = (32, 64, 128)  # of the attention kernels
Patched = TypeVar("Patched")


def apply_kernels(
    model: Patched, *, attention: bool = True, rms_norm: bool = True, rope: bool = True, swiglu: bool = True,
    loss: bool = True, backend: str | Backend = "auto",
) -> Patched:  # fmt: skip
    """Puts this project's operations into a Llama of transformers, and returns it; parameters, their names
    and config.json stay as they are. A second call replaces the choice of the first.

    model: a model, or anything that contains one (a PeftModel), or a class of one (LlamaForCausalLM).
    backend: as for select_backend; "auto" takes Triton's kernels, on a machine without a GPU only if
    TRITON_INTERPRET=1 asks for the interpreter, and otherwise says so and changes nothing.

    Raises UsageError for another architecture, for a head dim or an activation that an operation does not
    have, and for layers whose forward was replaced already; then nothing has been changed.
    """
    if not isinstance(model, nn.Module | type):
        raise UsageError(f"apply_kernels: expected a Llama of transformers, got {type(model).__name__}")
    if isinstance(model, type):  # what is no Llama is refused where there is no GPU, too
        _check_class(model)
    else:
        _bodies(model)
    switches = dict(attention=attention, rms_norm=rms_norm, rope=rope, swiglu=swiglu, loss=loss)
    if backend == "auto" and not accelerators() and not interpreted():
        print(
            "apply_kernels: there is no GPU here, so nothing was changed; backend='torch' takes the "
            "operations for CPUs, TRITON_INTERPRET=1 in the environment the kernels in Triton's interpreter",
            file=sys.stderr,
        )
        return model
    kernels = Kernels.of(frozenset(name for name, on in switches.items() if on), backend)
    if isinstance(model, type):
        _apply_to_class(model, kernels)
    else:
        _apply(model, kernels)
    return model


def remove_kernels(model: Patched) -> Patched:
    """Undoes `apply_kernels`, completely, and returns the model; of a class, for the models made from then
    on. Without effect where nothing was applied.
    """
    if isinstance(model, type):
        original = getattr(model.__dict__.get("__init__"), "_smollm2", None)
        if original is not None:
            setattr(model, "__init__", original)  # noqa: B010 - mypy refuses an assignment
        return model
    if not isinstance(model, nn.Module):
        raise UsageError(f"remove_kernels: expected a model, got {type(model).__name__}")
    for module in model.modules():
        if module.__dict__.pop("_smollm2", None) is not None and type(module) in classes().values():
            module.__class__ = type(module).__mro__[1]
        before = module.__dict__.pop("_smollm2_before", None)
        body: Any = module
        if before is not None and body.config._attn_implementation == NAME:
            body.set_attn_implementation(before)
    return model


def _llama() -> Any:
    """The module of the architecture. Raises UsageError without transformers."""
    try:
        from transformers.models.llama import modeling_llama
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed"
        raise UsageError(f"apply_kernels: expected a Llama of transformers; {reason}") from None
    return modeling_llama


def _check_class(kind: type) -> None:
    if not issubclass(kind, _llama().LlamaPreTrainedModel) or "__init__" not in kind.__dict__:
        raise UsageError(f"apply_kernels: expected LlamaForCausalLM, LlamaModel ..., got {kind.__name__}")


def _apply_to_class(kind: type, kernels: Kernels) -> None:
    remove_kernels(kind)
    original: Any = kind.__dict__["__init__"]

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _apply(self, kernels)

    __init__._smollm2 = original  # type: ignore[attr-defined]
    setattr(kind, "__init__", __init__)  # noqa: B010 - mypy refuses an assignment


def _bodies(model: nn.Module) -> list[Any]:
    """The Llamas in a model. Raises UsageError without one."""
    if hasattr(model, "_orig_mod"):
        raise UsageError("apply_kernels: expected a model before torch.compile, got a compiled one")
    bodies = [module for module in model.modules() if isinstance(module, _llama().LlamaModel)]
    if not bodies:
        wanted = f"a Llama of transformers or what contains one, got {type(model).__name__}"
        hint = "register() and model.set_attn_implementation('smollm2') give others the attention alone"
        raise UsageError(f"apply_kernels: expected {wanted}; {hint}")
    return bodies


def _apply(model: nn.Module, kernels: Kernels) -> None:
    llama = _llama()
    modules, bodies = list(model.modules()), _bodies(model)
    for body in bodies:
        refused = list(_obstacles(body.config, kernels))
        if refused:
            raise UsageError(
                f"apply_kernels: {'; '.join(refused)}; a switch that is False leaves it as it is"
            )
    ours, theirs = classes(), {name: getattr(llama, name) for name in REPLACED}
    swapped = []
    for module in modules:
        for name, switches in REPLACED.items():
            if switches & kernels.chosen and isinstance(module, theirs[name]):
                if type(module) not in (theirs[name], ours[name]) or "forward" in module.__dict__:
                    got = f"a {type(module).__name__} that something else has changed"
                    hint = "apply the kernels first, or to the class before the model is made"
                    raise UsageError(f"apply_kernels: expected transformers' own {name}, got {got}; {hint}")
                swapped.append((module, ours[name]))
    remove_kernels(model)
    for module, replacement in swapped:
        module.__class__ = replacement
    for module in modules:
        if isinstance(module, tuple(theirs.values())):
            module._smollm2 = kernels  # type: ignore[assignment]
    if "attention" in kernels.chosen:
        register()
        for body in bodies:
            body._smollm2_before = body.config._attn_implementation
            body.set_attn_implementation(NAME)


def _obstacles(config: Any, kernels: Kernels) -> Iterator[str]:
    """What of a model the chosen operations do not serve, as "operation: expected ..., got ..."."""
    found = kernels.backends.values()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if "attention" in kernels.chosen and any(ops.attention is not TORCH.attention for ops in found):
        if head_dim not in HEAD_DIMS:
            yield f"attention: expected a head dim of 32, 64 or 128, got {head_dim}"
    if "rope" in kernels.chosen and any(ops.rope is not TORCH.rope for ops in found):
        if head_dim & (head_dim - 1):
            yield f"rope: expected a head dim that is a power of two, got {head_dim}"
    if "swiglu" in kernels.chosen and config.hidden_act not in ("silu", "swish"):
        yield f"swiglu: expected the activation 'silu', got {config.hidden_act!r}"
