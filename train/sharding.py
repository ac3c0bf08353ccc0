"""Sharded training (FSDP2, `fully_shard`): each rank keeps a part of the parameters, gradients and moments
instead of all of them.

    torchrun --nproc-per-node 8 -m train.run smollm2_1.7b_sharded.yaml sharding=full

A decoder layer is gathered when it is needed, in the compute dtype, and let go after its forward and after
its backward pass; the embedding, which is also the head, and the last norm are gathered in fp32 and stay for
the step. Gradients are summed over the ranks in fp32. The parameters are fp32 as everywhere (DESIGN: fp32
masters, cast on use): a layer's cast merely happens before the gathering instead of after it, so that what is
computed stays the same.

full: one copy of the model over all ranks. hybrid: one copy per group of consecutive ranks (a node),
gradients summed over the groups. What is imported here from torch.distributed costs a second, so that only
sharded runs import it.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
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
    """Raises UsageError when this number of processes cannot be sharded as asked."""
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
    return (
        f", sharded over {group}" + (f", {world.size // group} copies" if group < world.size else "")
        if group > 1
        else ""
    )


# ---- model and gradients -----------------------------------------------------------------------------------


def shard(model: SmolLM2ForCausalLM, config: RunConfig, world: World) -> SmolLM2ForCausalLM:
    """Cuts the parameters over the ranks, in place, layer by layer: only one whole layer at a time moves to
    the device.

    model: whole, the same on every rank, on the CPU or the device. The optimizer is built afterwards, on the
    shards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    group = group_size(config, world.size)
    if group == world.size:
        mesh = init_device_mesh(world.device.type, (group,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(
            world.device.type, (world.size // group, group), mesh_dim_names=("replicate", "shard")
        )
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    # cosines and sines stay fp32: inputs are not cast
    in_compute_dtype = dataclasses.replace(whole, param_dtype=model.compute_dtype)
    for layer in model.model.layers:
        # Gathered parameters lie where FSDP puts them: nothing to keep side by side, and a buffer would keep
        # the whole model alive.
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
    """Before a micro-batch: whether its gradients are the last of the step, after which those of the copies
    (hybrid) are summed.

    Within a copy they are summed after every micro-batch: whole gradients that wait for the last would take
    the memory that sharding saves.
    """
    cast(Any, model).set_requires_all_reduce(last)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """train.optim.clip_gradients for shards: one norm over all parts of all ranks, by one sum of a scalar."""
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
    """The fp32 weights, whole, on the CPU of the ranks that `keep` them; an empty dictionary on the others.
    Every rank must call it.

    Takes 4 bytes of host memory a parameter (1.7B: 6.8 GB), and on every device room for the largest
    parameter.
    """
    cast(Any, model).reshard()  # after an evaluation the embedding is still whole
    weights = {}
    for name, parameter in model.named_parameters():
        gathered = cast(Any, parameter.detach()).full_tensor()
        if keep:
            weights[name] = torch.empty(gathered.shape, dtype=gathered.dtype).copy_(gathered)
    return weights


def whole_model(model: SmolLM2ForCausalLM, world: World) -> SmolLM2ForCausalLM | None:
    """A copy that rank 0 can use alone, for samples; None on the others. Every rank must call it. 4 bytes a
    parameter on its device.
    """
    weights = whole_weights(model, keep=world.main)
    if not world.main:
        return None
    with torch.device("meta"):
        copy = SmolLM2ForCausalLM(model.config, model.backend, compute_dtype=model.compute_dtype)
    copy.load_state_dict(
        {name: weight.to(world.device) for name, weight in weights.items()}, strict=False, assign=True
    )
    copy.tie_weights()
    return copy


# ---- torch.distributed.checkpoint --------------------------------------------------------------------------


def writers(world: World) -> World:
    """The ranks of a run with a gloo group of their own, for checkpoints written beside the training. Every
    rank must call it.
    """
    return dataclasses.replace(world, control=dist.new_group(backend="gloo"))


def host_copy(tensor: Tensor) -> Tensor:
    """A shard on the CPU that still knows which part of the whole it is; or a plain tensor on the CPU."""
    return tensor.detach().to("cpu", copy=True)


def write_shards(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Every rank writes its parts of the tensors into the folder, flushed to disk. Raises OSError on all
    ranks if one of them fails.
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


def read_shards(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`parameter name/entry` -> tensor, whichever number of ranks wrote them: whole, or cut as the sharded
    parameter of that name in `like` is. A rank reads only its own parts. Raises LoadError.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.tensor import DTensor

    reader = dcp.FileSystemReader(folder)
    tensors: dict[str, Tensor] = {}
    for key, stored in cast(dict[str, Any], reader.read_metadata().state_dict_metadata).items():
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
    """A whole tensor in memory of its own, cut as the parameter is if that is sharded and of its shape."""
    if parameter is None or not hasattr(parameter, "placements") or parameter.shape != value.shape:
        return value.clone()
    from torch.distributed.tensor import distribute_tensor

    sharded = cast(Any, parameter)
    # every rank has read it all
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None).clone()
