"""Sharded training (FSDP2, `fully_shard`): each rank keeps only a part of the parameters, gradients and
moments.

    torchrun --nproc-per-node 8 -m train.run smollm2_1.7b_sharded.yaml sharding=full

A decoder layer is gathered in the compute dtype for its forward pass and again for its backward pass, and
freed after each. The embedding, which is also the head, and the last norm are gathered in fp32 and stay until
the end of the step. Gradients are summed over the ranks in fp32. The parameters themselves are fp32, as in
every run; they are cast before they are gathered instead of afterwards, which gives the same numbers.

full: one copy of the model over all ranks. hybrid: one copy per group of consecutive ranks (a node), with
gradients summed over the groups. Only sharded runs import the parts of torch.distributed used here, which
takes a second.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smollm2.errors import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM
from train.config import RunConfig
from train.distributed import World

# ---- configuration -----------------------------------------------------------------------------------------


def group_size(config: RunConfig, world_size: int) -> int:
    """Ranks that hold one copy of the model together; 1 without sharding."""
    if not config.sharded:
        return 1
    if config.sharding == "full":
        return world_size
    return config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))


def check(config: RunConfig, world: World) -> None:
    """Raises UsageError when this number of processes cannot share the model as asked."""
    if not config.sharded:
        return
    if world.size == 1:
        raise UsageError(
            f"sharding: {config.sharding} needs several processes (torchrun --nproc-per-node N -m train.run "
            "...), got one; use sharding=none, which continues a sharded run as well"
        )
    group = group_size(config, world.size)
    if config.sharding == "hybrid" and (group < 2 or group >= world.size or world.size % group):
        source = "shard_size" if config.shard_size else "shard_size=0: the processes of a node"
        raise UsageError(
            f"shard_size: expected a divisor of the {world.size} processes, at least 2 and below "
            f"{world.size}, got {group} ({source}); give another, or use sharding=full"
        )


def describe(config: RunConfig, world: World) -> str:
    """How the run is sharded, for its first lines; empty if it is not."""
    group = group_size(config, world.size)
    copies = f", {world.size // group} copies" if group < world.size else ""
    return f", sharded over {group}{copies}" if group > 1 else ""


# ---- model and gradients -----------------------------------------------------------------------------------


def shard(model: SmolLM2ForCausalLM, config: RunConfig, world: World) -> SmolLM2ForCausalLM:
    """Cuts the parameters into shards, in place, layer by layer: the device holds one whole layer at a time.

    model: whole, the same on every rank, on the CPU or the device. The optimizer is built on the shards,
    afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    group, device = group_size(config, world.size), world.device.type
    if group == world.size:
        mesh = init_device_mesh(device, (group,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device, (world.size // group, group), mesh_dim_names=("replicate", "shard"))
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    # cosines and sines stay fp32: inputs are not cast
    in_compute_dtype = dataclasses.replace(whole, param_dtype=model.compute_dtype)
    for layer in model.model.layers:
        # FSDP decides where gathered parameters lie: none are packed side by side. A packed buffer would also
        # keep the whole model alive.
        layer.self_attn.packed = layer.mlp.packed = None  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh, mp_policy=in_compute_dtype)
    model.pack = lambda: []  # type: ignore[method-assign]
    fully_shard(model, mesh=mesh, mp_policy=whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # a sum: the loss is divided by the targets of all ranks already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model


def sum_over_copies(model: nn.Module, last: bool) -> None:
    """To call before a micro-batch. last: it is the last of the step, after which the gradients of the copies
    (hybrid) are summed.

    Within a copy they are summed after every micro-batch. Keeping whole gradients until the last one would
    take the memory that sharding saves.
    """
    cast(Any, model).set_requires_all_reduce(last)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """train.optim.clip_gradients for shards: the norm over those of all ranks takes one sum of a scalar."""
    gradients = [cast(Any, parameter.grad) for parameter in parameters if parameter.grad is not None]
    local = [gradient.to_local() for gradient in gradients]
    squares = torch.stack(torch._foreach_norm(local)).square().sum()
    # the copies have the same gradients
    dist.all_reduce(squares, group=gradients[0].device_mesh.get_group("shard"))
    norm = squares.sqrt()
    if max_norm > 0:
        torch._foreach_mul_(local, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def whole_weights(model: SmolLM2ForCausalLM, *, keep: bool) -> dict[str, Tensor]:
    """The whole fp32 weights on the CPU of the ranks that `keep` them, an empty dictionary on the others.
    Every rank must call it.

    Takes 4 bytes of host memory a parameter (1.7B: 6.8 GB), and the largest parameter on every device.
    """
    cast(Any, model).reshard()  # after an evaluation the embedding is still whole
    weights = {}
    for name, parameter in model.named_parameters():
        gathered = cast(Any, parameter.detach()).full_tensor()
        if keep:
            weights[name] = torch.empty(gathered.shape, dtype=gathered.dtype).copy_(gathered)
    return weights


def whole_model(model: SmolLM2ForCausalLM, world: World) -> SmolLM2ForCausalLM | None:
    """On rank 0 a copy for samples, which takes 4 bytes a parameter on its device; None on the others. Every
    rank must call it.
    """
    weights = whole_weights(model, keep=world.main)
    if not world.main:
        return None
    with torch.device("meta"):
        copy = SmolLM2ForCausalLM(model.config, model.backend, compute_dtype=model.compute_dtype)
    placed = {name: weight.to(world.device) for name, weight in weights.items()}
    copy.load_state_dict(placed, strict=False, assign=True)
    copy.tie_weights()
    return copy


# ---- torch.distributed.checkpoint --------------------------------------------------------------------------


def writers(world: World) -> World:
    """The same ranks with a second gloo group, for checkpoints that are written while training goes on. Every
    rank must call it.
    """
    return dataclasses.replace(world, control=dist.new_group(backend="gloo"))


def host_copy(tensor: Tensor) -> Tensor:
    """The tensor on the CPU. A shard stays a DTensor, which knows its place in the whole."""
    return tensor.detach().to("cpu", copy=True)


def write_shards(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Every rank writes its parts of the tensors into the folder and flushes them to disk. If one rank fails,
    all raise OSError.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            # "detected an existing checkpoint" from ranks that come second
            warnings.simplefilter("ignore", UserWarning)
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), process_group=group)
    except CheckpointException as error:  # not an Exception
        first = next(iter(error.failures.items()))
        raise OSError(f"rank {first[0]}: {first[1][0]}") from None


def read_metadata(folder: Path) -> Any:
    """The torch.distributed.checkpoint Metadata of a folder of shards.

    torch keeps it as a pickle, which could call any function. Here it makes the objects that torch writes and
    no others, and names files of the folder only. Raises LoadError.
    """
    from torch.distributed.checkpoint import filesystem, metadata

    known = (
        metadata.Metadata, metadata.TensorStorageMetadata, metadata.TensorProperties,
        metadata.ChunkStorageMetadata, metadata.MetadataIndex, metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.Size, torch.serialization._get_layout,
    )  # fmt: skip
    allowed = {(one.__module__, one.__qualname__): one for one in known}
    # the folder that was written, which nobody reads; Python 3.13 has moved the class
    allowed |= {(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
                return dtype
            if (module, name) not in allowed:
                raise pickle.UnpicklingError(f"it names {module}.{name}, which torch does not write there")
            return allowed[module, name]

    path = folder / ".metadata"
    try:
        with path.open("rb") as stream:
            found = Unpickler(stream).load()
        size = 0
        for stored in found.state_dict_metadata.values():
            if type(stored) is not metadata.TensorStorageMetadata:  # all others are pickles too
                raise ValueError(f"expected tensors alone, got {type(stored).__name__}")
            if min(stored.size, default=0) < 0:
                raise ValueError(f"expected sizes, got {list(stored.size)}")
            size += math.prod(stored.size) * stored.properties.dtype.itemsize
        files = {entry.name: entry.stat().st_size for entry in folder.iterdir()}
        for part in found.storage_data.values():
            if part.relative_path not in files or getattr(part, "transform_descriptors", None):
                raise ValueError(f"expected plain files of its folder, got {part.relative_path!r:.80}")
        if size > sum(files.values()):
            raise ValueError(f"its tensors need {size:,} bytes, the files have {sum(files.values()):,}")
    except Exception as error:  # a damaged pickle raises anything
        raise LoadError(f"{path}: not what a sharded save writes ({error}); it was not loaded") from None
    return found


def read_shards(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`parameter name/entry` -> tensor, written by any number of ranks: whole, or cut like the sharded
    parameter of that name in `like`. A rank reads only its own parts. Raises LoadError.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.tensor import DTensor

    reader, content = dcp.FileSystemReader(folder), read_metadata(folder)
    reader.read_metadata = lambda *_, **__: content  # type: ignore[method-assign]
    tensors: dict[str, Tensor] = {}
    for key, stored in content.state_dict_metadata.items():
        parameter = like.get(key.rpartition("/")[0])
        if isinstance(parameter, DTensor) and parameter.shape == stored.size:
            tensors[key] = torch.zeros_like(parameter, dtype=stored.properties.dtype, requires_grad=False)
        else:
            tensors[key] = torch.zeros(stored.size, dtype=stored.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "assuming a single process": each reads for itself
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise LoadError(f"{folder}: cannot be read ({next(iter(error.failures.values()))[0]})") from None
    return tensors


def cut_like(value: Tensor, parameter: Tensor | None) -> Tensor:
    """A copy of a whole tensor, cut like the parameter if that is sharded and has the same shape."""
    if parameter is None or not hasattr(parameter, "placements") or parameter.shape != value.shape:
        return value.clone()
    from torch.distributed.tensor import distribute_tensor

    sharded = cast(Any, parameter)
    # every rank has read it all
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None).clone()
