"""Every call of torch and Triton names arguments that exist: in the versions here, and in torch 2.11, which a
GPU machine may have.

What only a GPU reaches (graphs, streams, events, `addmm(out_dtype=)`, sharding) runs in no other test, and a
misspelt argument would be found there first. The calls are read from the source, so that a new one is looked
at without a word here.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from torch.nn.attention.flex_attention import FlexKernelOptions, flex_attention

from bench.ops import FlexAttention

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
# Parameters that torch 2.11 does not have. Of everything else that is called here they are those of 2.13, and
# Triton's those of 3.6.
LATER = {
    "torch.compile": ("name", "recompile_limit", "isolate_recompiles", "shapes_spec"),
    "torch.cuda.graph": ("enable_annotations", "check_input_liveness"),
    "torch.distributed.barrier": ("timeout",),
    "torch.distributed.fsdp.fully_shard": ("dp_mesh_dims",),
    "torch.distributed.new_group": ("sort_ranks",),
    "torch.nn.attention.flex_attention.create_block_mask": (
        "separate_full_blocks",
        "compute_dq_write_order",
        "dq_kv_order",
    ),
    "torch.nn.attention.varlen.varlen_attn": ("enable_gqa", "seqused_k", "block_table", "num_splits"),
    "torch.nn.parallel.DistributedDataParallel": ("batched_grad_copy", "forward_sync_buffers"),
}
# What it does not have at all, of the modules that are used here.
ABSENT = """torch.accelerator.Graph torch.accelerator.empty_host_cache torch.compiler.set_default_backend
torch.cuda.caching_allocator_disabled torch.cuda.CUDAGraph.get_graph_data
torch.nn.attention.varlen.varlen_attn_out torch.nn.functional.linear_cross_entropy
torch.optim.swap_in_optimizer_params_and_state torch._dynamo.override_cudagraphs
torch.distributed.fsdp.DataParallelMeshDims""".split()
# Methods of objects that only a GPU or several processes make. No other object here has a method of that
# name.
METHODS = """torch.cuda.Stream.wait_stream torch.cuda.CUDAGraph.replay torch.cuda.Event.elapsed_time
torch.distributed.tensor.DTensor.to_local torch.distributed.tensor.DTensor.full_tensor
torch.distributed.fsdp.FSDPModule.reshard torch.distributed.fsdp.FSDPModule.set_requires_all_reduce
torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor
torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms""".split()
# Built in, with neither a signature nor a schema. A CPU reaches them, and raises for a wrong argument.
BUILT_IN = """torch.Generator torch.as_tensor torch.device torch.finfo torch.from_numpy torch.frombuffer
torch.get_num_threads torch.is_autocast_enabled torch.is_grad_enabled torch.is_inference_mode_enabled
torch.set_num_threads torch.tensor triton.cdiv triton.next_power_of_2 torch._C._storage_Use_Count
torch._C._are_functorch_transforms_active""".split()
# Operators and Triton's language are looked up by whoever runs or compiles them. There is no active driver
# without a GPU.
ELSEWHERE = (
    "torch.ops.", "torch.__version__", "torch.utils.tensorboard", "triton.language", "triton.__version__",
    "triton.runtime.driver.driver.active",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    place: str
    name: str
    positional: int  # with the object of a method
    keywords: tuple[str, ...]
    more: bool = False  # from `*` or `**`


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """torch.cuda.graph, however it was imported; "" for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    full = ".".join([names[node.id], *parts]) if isinstance(node, ast.Name) and node.id in names else ""
    return "" if full.startswith(ELSEWHERE) else full


@functools.cache
def read() -> tuple[list[Call], dict[str, str]]:
    """All calls of torch and Triton in the four packages, and all their names -> where one of them stands."""
    calls, places = [], {}
    packages = [ROOT / package for package in ("kernels", "smollm2", "train", "bench")]
    for path in sorted(path for package in packages for path in package.rglob("*.py")):
        tree, names = ast.parse(path.read_text(encoding="utf-8")), dict[str, str]()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for one in node.names:
                    first = one.name.split(".")[0]
                    names |= {one.asname: one.name} if one.asname else {first: first}
            elif isinstance(node, ast.ImportFrom):
                names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
        names = {name: full for name, full in names.items() if full.split(".")[0] in ("torch", "triton")}
        for node in ast.walk(tree):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if name := dotted(node, names):
                places[name] = place
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func, names)
            attribute = f".{node.func.attr}" if isinstance(node.func, ast.Attribute) and not name else None
            method = [one for one in METHODS if attribute and one.endswith(attribute)]
            plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
            words = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
            more = len(plain) + len(words) < len(node.args) + len(node.keywords)
            given = len(plain) + len(method), words, more
            calls += [Call(place, one, *given) for one in method or [name] if one]
    return calls, places


def find(name: str) -> Any:
    """What a dotted name stands for: the longest module of that name, and attributes of it. Raises
    AttributeError.
    """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def fits(schema: Any, call: Call) -> bool:
    """Whether an overload of a built-in takes the call. Sizes may come one by one, and requires_grad is no
    part of a schema.
    """
    by_place = [argument for argument in schema.arguments if not argument.kwarg_only]
    several = bool(by_place) and str(by_place[0].type) in ("List[int]", "List[SymInt]")
    rest = schema.arguments[call.positional :]
    needed = {argument.name for argument in rest if not argument.has_default_value()}
    enough = several or call.more or (call.positional <= len(by_place) and needed <= set(call.keywords))
    return enough and set(call.keywords) <= {"requires_grad", *(one.name for one in schema.arguments)}


def refusal(call: Call) -> str | None:
    """Why one of the versions does not take a call, or None."""
    try:
        signature = inspect.signature(find(call.name))
    except (TypeError, ValueError):
        name = call.name.removeprefix("torch.").split("functional.")[-1].replace(".", "_")
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
        taken = call.name in BUILT_IN or any(fits(schema, call) for schema in schemas)
        given = f"{call.positional} arguments and {', '.join(call.keywords)}"
        return None if taken else f"{call.place}: {call.name}: no overload for {given}"
    # What falls into a function's own ** is a misspelling.
    later = LATER.get(call.name, ())
    named = [one for one in signature.parameters.values() if one.kind != one.VAR_KEYWORD]
    bind = signature.replace(parameters=[one for one in named if one.name not in later])
    bound = bind.bind_partial if call.more else bind.bind
    try:
        bound(*[None] * call.positional, **dict.fromkeys(call.keywords))
    except TypeError as failure:
        return f"{call.place}: {call.name}: {failure}"
    return None


def test_every_call_names_arguments_that_exist():
    found = read()[0]
    named = {"torch.addmm", "torch.cuda.graph", "torch.optim.AdamW", "torch.library.custom_op", *METHODS}
    assert named <= {call.name for call in found}
    assert [why for call in found if (why := refusal(call))] == []


@pytest.mark.parametrize("name, positional, keywords", [
    ("torch.cuda.graph", 1, ("streem",)), ("torch.cuda.Stream", 0, ("prioritty",)),
    ("torch.optim.AdamW", 1, ("capturabel",)), ("torch.addmm", 3, ("out_dtyp",)),
    ("torch.addmm", 2, ("out_dtype",)), ("torch.cuda.Stream.wait_stream", 3, ()),
    ("torch.nn.attention.varlen.varlen_attn", 7, ("enable_gqa",)),
    ("torch.cuda.graph", 1, ("check_input_liveness",)),
])  # fmt: skip
def test_a_call_that_one_version_does_not_take_is_refused(name, positional, keywords):
    assert refusal(Call("here", name, positional, keywords))


def test_every_name_exists():
    places = read()[1]
    some = {"triton.knobs.nvidia.dump_ptxas_log", "torch.nn.attention.SDPBackend.CUDNN_ATTENTION"}
    assert some <= places.keys()
    for name, place in places.items():
        try:
            find(name)
        except AttributeError as failure:
            pytest.fail(f"{place}: {failure}")
    assert not places.keys() & {*ABSENT}


@pytest.mark.skipif(VERSION == (2, 12), reason="between the two")
def test_what_is_said_of_the_older_torch_is_true():
    for name, later in LATER.items():
        known = {*later} & inspect.signature(find(name)).parameters.keys()
        assert known == (set() if VERSION < (2, 12) else {*later}), name
    there = [name for name in ABSENT if hasattr(find(name.rpartition(".")[0]), name.rpartition(".")[2])]
    assert there == ([] if VERSION < (2, 12) else ABSENT)


def test_values_that_only_a_gpu_is_given_are_known():
    assert "reduce-overhead" in torch._inductor.list_mode_options()
    assert {"inductor", "aot_eager", "eager"} <= {*torch.compiler.list_backends(())}
    assert "TRITON_DECODE" in typing.get_args(typing.get_type_hints(FlexKernelOptions)["BACKEND"])


def test_flex_attention_is_called_with_arguments_that_exist():
    def check(*arguments: Any, **options: Any) -> torch.Tensor:
        bound = inspect.signature(flex_attention).bind(*arguments, **options)
        assert set(bound.arguments["kernel_options"]) <= FlexKernelOptions.__annotations__.keys()
        return bound.arguments["query"]

    q, k = torch.ones(1, 4, 3, 8), torch.ones(1, 4, 1, 8)
    flex = FlexAttention(lambda function: check, BACKEND="TRITON_DECODE")
    assert flex(q, k, k, causal=True).shape == q.shape
