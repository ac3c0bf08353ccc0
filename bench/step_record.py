"""One optimizer step, launch by launch, with the bytes and FLOPs of each, recorded without a GPU.

The step runs on tensors without memory, as the only program of a GPU that is not there (bench/stand_in.py):
what it would launch is what it calls. A launch moves the bytes of the tensors that it is given, each once,
and computes what its shapes say.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import kernels
from bench.launches import kernel_of
from bench.stand_in import standing_in_for_cuda
from bench.step import TrainingStep, training_model
from kernels import backend
from kernels.certify.recorder import StandIn, standing_in
from kernels.certify.targets import target_for
from smollm2.config import SmolLM2Config

PROCESSORS = 132  # multiprocessors of an H100


class Launch(NamedTuple):
    """What a kernel is called, the bytes that it reads and writes, the floating-point operations of its
    products, and the bytes of each storage that it was given.
    """

    name: str
    bytes: float
    flops: float
    storages: dict[int, int]


def _attention(times: float) -> Callable[[dict[str, Any]], float]:
    """FLOPs of `times` causal products of queries and keys, half of the square."""

    def flops(arguments: dict[str, Any]) -> float:
        batch, queries, heads, width = arguments["q_ptr"].shape
        return times * batch * heads * queries * arguments["k_ptr"].shape[1] * width

    return flops


FLOPS = {
    "_attention_fwd_kernel": _attention(2),
    "_attention_bwd_dq_kernel": _attention(3),
    "_attention_bwd_dkv_kernel": _attention(4),
}


def _elements(arguments: dict[str, Any]) -> int:
    """Of the tensors that a table of addresses leads to: a chunk for each program."""
    return int(arguments["owner_ptr"].numel() * arguments["CHUNK"])


# What the tensors that are given do not tell. AdamW reads gradient, parameter and two averages, and writes
# the last three and a copy; of a table of embeddings only rows are read, and at most as many are written as
# there are tokens; nothing is rescaled by an upstream of 1.
BYTES: dict[str, Callable[[dict[str, Any]], int]] = {
    "_embedding_fwd_kernel": lambda arguments: 2 * arguments["x_ptr"].nbytes,
    "_embedding_bwd_kernel": lambda arguments: arguments["dx_ptr"].nbytes + 8 * arguments["dx_ptr"].numel(),
    "_embedding_bwd_piece_kernel": lambda arguments: arguments["piece_ptr"].nbytes,
    "_rescale_kernel": lambda arguments: 0,
    "_sum_of_squares_kernel": lambda arguments: 4 * _elements(arguments),
    "_adamw_kernel": lambda arguments: (30 if arguments["COPY"] else 28) * _elements(arguments),
}
# How often a launch moves its tensors, where that is not once: the logits of the loss are read, and their
# gradients take their place.
MOVES = {"_softmax_gradient_kernel": 2}


def by_storage(values: list[Any]) -> dict[int, int]:
    """The bytes of the tensors among them, by storage: what is given twice counts once, and views of one
    storage at most as much as that.
    """
    tensors = [x for x in values if isinstance(x, Tensor)]
    views = {(x.untyped_storage()._cdata, x.storage_offset(), x.numel()): x for x in tensors}
    viewed, stored = Counter[int](), dict[int, int]()
    for (storage, _, _), x in views.items():
        viewed[storage] += x.nbytes
        stored[storage] = x.untyped_storage().nbytes()
    return {storage: min(viewed[storage], stored[storage]) for storage in viewed}


def _bytes(values: list[Any]) -> float:
    """`by_storage`, all together."""
    return float(sum(by_storage(values).values()))


def _read_too(name: str, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """What an operation of torch reads before it writes it: it moves twice."""
    if name == "addmm":
        return [args[0]] if kwargs.get("beta", 1) else []
    if name in ROWS_WRITTEN:
        return list(args[-1:])
    if name == "_fused_adamw_":
        return [args[0], args[2:4]]  # parameters and averages; the gradients are read alone
    written_only = not name.endswith("_") or name in ("copy_", "fill_", "zero_", "_foreach_copy_")
    return [] if written_only else list(args[:1])


# Operations of torch that read rows of a table, and that write some.
LOOKUPS, ROWS_WRITTEN = ("embedding", "index", "gather"), ("index_put_", "index_copy_")


class _Operations(TorchDispatchMode):
    """Notes torch's operations that compute."""

    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # a learning rate that is looked at once
        # what returns nothing would only write
        result: Any = func(*args, **(kwargs or {})) if func._schema.returns else None
        if name := kernel_of(func):
            factor = {"mm": 0, "linear": 0, "addmm": 1}.get(name)  # which argument is the first factor
            flops = 0.0 if factor is None else 2.0 * result.numel() * args[factor].shape[-1]
            # of the table only as many rows as come out, or go in
            given = tree_leaves(
                result if name in LOOKUPS else args[1:] if name in ROWS_WRITTEN else (args, kwargs, result)
            )
            moved = _bytes(given) + _bytes(tree_leaves(_read_too(name, args, kwargs or {})))
            self._found.append(Launch(name, moved, flops, by_storage(given)))
        return result


@contextmanager
def recording(device: StandIn | None = None) -> Iterator[list[Launch]]:
    """While this is open, everything that would be launched on such a GPU (default: an H100) is added to the
    list, and nothing computes.
    """
    device = device or StandIn(target_for("sm_90"))
    found: list[Launch] = []

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        name = kernel.fn.__name__
        times = MOVES.get(name, 1)
        storages = by_storage(list(arguments.values()))
        moved = BYTES[name](arguments) if name in BYTES else times * sum(storages.values())
        found.append(Launch(name, moved, FLOPS.get(name, lambda _: 0.0)(arguments), storages))

    with ExitStack() as stack:
        stack.enter_context(standing_in_for_cuda(device, "meta"))
        prefix = f"{kernels.__name__}."
        for module in [value for name, value in sys.modules.items() if name.startswith(prefix)]:
            for name, many in (("multiprocessors", PROCESSORS), ("programs", 8 * PROCESSORS)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, lambda _, many=many: many))
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", run))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
        # it knows no tensors without memory
        stack.enter_context(mock.patch("torch.optim.adam._device_dtype_check_for_fused"))
        stack.enter_context(mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True))
        stack.enter_context(_Operations(found))
        yield found


def host_times(rounds: int = 20) -> dict[str, float]:
    """Milliseconds of CPU time that Python and torch's dispatcher spend on a step launched one by one, by
    phase: medians.

    Of a model with the 135M model's layers and next to no width, on the CPU, with Triton's launches left out:
    what is left is the host's work, but for some 7 us a launch.
    """
    spent = defaultdict[str, list[float]](list)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # threads that wait for one another would count
        stack.enter_context(standing_in(StandIn(target_for("sm_90"))))
        stack.enter_context(mock.patch.object(backend, "_triton_obstacle", lambda *_: None))
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", lambda *_, **__: None))
        small = dict(hidden_size=64, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1)
        config = SmolLM2Config.preset("135M", vocab_size=64, **small)
        step = TrainingStep(training_model(config, "triton", torch.device("cpu"), torch.bfloat16))
        ids = torch.zeros(1, 2, dtype=torch.int64)
        for _ in range(rounds):
            for name, phase in step.phases(ids).items():
                began = time.process_time()
                phase()
                spent[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(times) for name, times in spent.items()}
