"""All blocks of a decode step in one launch, whose programs stay and meet at a barrier of the grid.

    for every layer: norm, qkv, rope, cache | split attention | (combine |) o, residual | norm, gate and up,
    SiLU | down, residual                                        | is a barrier

R = B * T rows (1 to 16); the phases are the launches of decode_layer.py, in the same functions. No backward
pass.

A launch of a decode step is a few microseconds of which most are spent between launches: the last program
must end, what it wrote must be flushed, and the next programs begin. A barrier is one atomic addition a
program and a few reads of the sum. What a phase reads first, its weights, it requests between its arrival at
the barrier and its wait, so that their way from memory passes meanwhile.

Every phase has at most as many units of work as there are programs, one on each multiprocessor, so that a
unit's weights fit into registers. Attention alone goes around. That suits the 135M model (120, 72, 96 and 72
units); a wider model reads so much for each launch that the launch itself costs little.

The weights and caches of all layers are found by a table of their addresses, since a kernel takes only so
many arguments. The barrier's counter grows with every arrival; the last program to leave sets it to zero. The
launch is cooperative: all programs are resident at once, or it fails.

A barrier cannot be run in Triton's interpreter, which runs one program after the other. So a phase can also
be launched by itself (PHASE); the interpreter, and the test that holds the barriers to equal bits, do that.

Source: Hazy Research 2025, "Look Ma, No Bubbles".
Check: pytest tests -k decode_layers
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.decode_attention import HEAD_DIMS, KEYS_PER_SPLIT, LOG2_E, attend, combined
from kernels.decode_layer import combine_o, norm_gate_up, norm_qkv_rope, project
from kernels.decode_product import arrive, wait
from kernels.launch_config import (
    DEPENDENT_LAUNCH,
    INTERPRETER,
    architecture,
    dependence,
    joins_layers,
    multiprocessors,
)
from kernels.tracing import on_their_gpu
from kernels.types import LayerWeights

MAX_ROWS = 16
WARPS = 8
# Bytes of a matrix that the registers of a program hold beside everything else.
HELD_BYTES = 64 << 10
PHASES = 6  # qkv, attention, combine, o, gate and up, down


@triton.jit
def _at(table_ptr, index, dtype: tl.constexpr):
    """The pointer at that place of the table."""
    return tl.multiple_of(tl.load(table_ptr + index).to(tl.pointer_type(dtype)), 16)


@triton.jit(do_not_specialize=["first", "last", "rows", "queries", "keys", "splits"])
def _decode_layers_kernel(
    table_ptr, counter_ptr, x_ptr, out_ptr, q_ptr, part_ptr, part_max_ptr, part_sum_ptr, mixed_ptr, sum_ptr,
    act_ptr, cos_ptr, sin_ptr, lengths_ptr, first, last, rows, queries, keys, splits, table_batch_stride,
    k_batch_stride, k_time_stride, k_head_stride, v_batch_stride, v_time_stride, v_head_stride,
    EPS: tl.constexpr, SCALE: tl.constexpr, WIDTH: tl.constexpr, FFN: tl.constexpr, HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr, QKV_GROUPS: tl.constexpr, O_GROUPS: tl.constexpr, GATE_GROUPS: tl.constexpr,
    DOWN_GROUPS: tl.constexpr, WARPS: tl.constexpr, ONE_ROW: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Layers first .. last - 1: x [R, E] -> out [R, E], with the other buffers in between. Grid: at least as
    many programs as a phase other than attention has units. PHASE: the only phase that runs, or -1: all.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    MEET: tl.constexpr = PHASE < 0
    IN_TILES: tl.constexpr = (WIDTH + 32 * WARPS - 1) // (32 * WARPS)
    O_TILES: tl.constexpr = (HEADS * HEAD_DIM + 32 * WARPS - 1) // (32 * WARPS)
    FFN_TILES: tl.constexpr = (FFN + 32 * WARPS - 1) // (32 * WARPS)
    unit, programs = tl.program_id(0), tl.num_programs(0)
    met = 0  # arrivals that this program has waited for, or will wait for next
    for layer in range(first, last):
        at = layer * 8  # six weights and two caches
        k_ptr, v_ptr = _at(table_ptr, at + 6, dtype), _at(table_ptr, at + 7, dtype)
        stream = tl.where(layer == first, x_ptr.to(tl.int64), out_ptr.to(tl.int64))
        stream_ptr = tl.multiple_of(stream.to(tl.pointer_type(dtype)), 16)
        if PHASE < 0 or PHASE == 0:
            norm_qkv_rope(
                unit, stream_ptr, _at(table_ptr, at, dtype), _at(table_ptr, at + 1, dtype), cos_ptr, sin_ptr,
                lengths_ptr, q_ptr, k_ptr, v_ptr, rows, queries, keys, table_batch_stride, k_batch_stride,
                k_time_stride, k_head_stride, v_batch_stride, v_time_stride, v_head_stride, counter_ptr, met,
                EPS, WIDTH, HEADS, KEY_HEADS, HEAD_DIM // 2, QKV_GROUPS, WARPS, IN_TILES, MEET,
            )  # fmt: skip
        if PHASE < 0:
            arrive(counter_ptr)
            met += programs
            wait(MEET, counter_ptr, met)
        if PHASE < 0 or PHASE == 1:
            for task in range(unit, splits * (rows // queries) * KEY_HEADS, programs):
                attend(
                    task % splits, task // splits, q_ptr, k_ptr, v_ptr, lengths_ptr, q_ptr, part_ptr,
                    part_max_ptr, part_sum_ptr, queries * HEADS * HEAD_DIM, HEADS * HEAD_DIM, HEAD_DIM,
                    k_batch_stride, k_time_stride, k_head_stride, v_batch_stride, v_time_stride,
                    v_head_stride, queries, keys, splits, None, 0, SCALE, KEY_HEADS, HEADS // KEY_HEADS,
                    HEAD_DIM, BLOCK_M, SPLIT, SPLIT, False, False,
                )  # fmt: skip
        if PHASE < 0:
            arrive(counter_ptr)
            met += programs
        if ONE_ROW:
            if PHASE < 0 or PHASE == 3:
                combine_o(
                    unit, part_ptr, part_max_ptr, part_sum_ptr, lengths_ptr, _at(table_ptr, at + 2, dtype),
                    stream_ptr, sum_ptr, keys, counter_ptr, met, WIDTH, HEADS, HEAD_DIM, SPLIT, BLOCK_H,
                    O_GROUPS, WARPS, MEET,
                )  # fmt: skip
        else:
            if PHASE < 0 or PHASE == 2:
                wait(MEET, counter_ptr, met)
                if unit < rows:
                    head = tl.arange(0, BLOCK_H)[:, None]
                    length = tl.load(lengths_ptr + unit // queries).to(tl.int32)
                    filled = tl.minimum(tl.cdiv(length, SPLIT), splits)
                    lane = tl.arange(0, HEAD_DIM)[None, :]
                    mixed = combined(
                        part_ptr, part_max_ptr, part_sum_ptr, unit * HEADS + head, head < HEADS, splits,
                        filled, HEAD_DIM, False,
                    )  # fmt: skip
                    target = mixed_ptr + (unit * HEADS + head) * HEAD_DIM + lane
                    tl.store(target, mixed.to(dtype), mask=(head < HEADS) & (lane < HEAD_DIM))
            if PHASE < 0:
                arrive(counter_ptr)
                met += programs
            if PHASE < 0 or PHASE == 3:
                project(
                    unit, mixed_ptr, _at(table_ptr, at + 2, dtype), stream_ptr, sum_ptr, rows, counter_ptr,
                    met, HEADS * HEAD_DIM, WIDTH, O_GROUPS, WARPS, O_TILES, MEET,
                )  # fmt: skip
        if PHASE < 0:
            arrive(counter_ptr)
            met += programs
        if PHASE < 0 or PHASE == 4:
            norm_gate_up(
                unit, sum_ptr, _at(table_ptr, at + 3, dtype), _at(table_ptr, at + 4, dtype), act_ptr, rows,
                counter_ptr, met, EPS, WIDTH, FFN, GATE_GROUPS, WARPS, IN_TILES, MEET,
            )  # fmt: skip
        if PHASE < 0:
            arrive(counter_ptr)
            met += programs
        if PHASE < 0 or PHASE == 5:
            project(
                unit, act_ptr, _at(table_ptr, at + 5, dtype), sum_ptr, out_ptr, rows, counter_ptr, met, FFN,
                WIDTH, DOWN_GROUPS, WARPS, FFN_TILES, MEET,
            )  # fmt: skip
        if PHASE < 0:
            before = arrive(counter_ptr)
            met += programs
            if layer == last - 1 and before == met - 1:  # the last program of all
                tl.store(counter_ptr, 0)


@dataclass(frozen=True)
class _Table:
    """The addresses of all layers' weights and caches, and the barrier's counter, on the device."""

    addresses: Tensor  # [8 L] int64
    counter: Tensor  # [1] int32


# A capture must find it made: a copy from the host cannot be captured.
@functools.lru_cache(maxsize=64)
def _table_of(addresses: tuple[int, ...], device: torch.device) -> _Table:
    return _Table(
        torch.tensor(addresses, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )


_captured: list[_Table] = []  # by graphs, which know only where they lie


def _table(addresses: tuple[int, ...], device: torch.device) -> _Table:
    table = _table_of(addresses, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(table)
    return table


class _Shape(NamedTuple):
    """The sizes of a layer, and how its work is dealt out."""

    width: int
    ffn: int
    heads: int
    key_heads: int
    head_dim: int

    def groups(self, programs: int) -> dict[str, int]:
        """The fewest groups of eight weight rows a program, powers of two, with which no phase has more units
        than there are programs.
        """
        columns = {
            "QKV_GROUPS": (self.heads + 2 * self.key_heads) * self.head_dim, "O_GROUPS": self.width,
            "GATE_GROUPS": 2 * self.ffn, "DOWN_GROUPS": self.width,
        }  # fmt: skip
        return {
            name: triton.next_power_of_2(triton.cdiv(triton.cdiv(count, 8), programs))
            for name, count in columns.items()
        }

    def held(self, programs: int, itemsize: int) -> int:
        """Bytes of the largest part of a matrix that a program holds."""
        groups, inputs = self.groups(programs), self.heads * self.head_dim
        lengths = dict(QKV_GROUPS=self.width, O_GROUPS=inputs, GATE_GROUPS=self.width, DOWN_GROUPS=self.ffn)
        step = 32 * WARPS
        return (
            max(8 * groups[name] * step * triton.cdiv(size, step) for name, size in lengths.items())
            * itemsize
        )


def _programs(device: torch.device) -> int:
    """One on each multiprocessor; in the interpreter as few as have one for each row."""
    return MAX_ROWS if architecture(device) == INTERPRETER else multiprocessors(device)


def _shape(weights: LayerWeights, key_cache: Tensor) -> _Shape:
    key_heads, head_dim = key_cache.shape[2:]
    width, ffn = weights.down.shape
    return _Shape(width, ffn, weights.o.shape[1] // head_dim, key_heads, head_dim)


def supports(
    x: Tensor, layers: Sequence[LayerWeights], key_caches: Sequence[Tensor], value_caches: Sequence[Tensor]
) -> bool:
    """Whether one launch takes these layers, and is the way for this device."""
    return (
        not torch.compiler.is_compiling()
        and joins_layers(x.device)
        and not _obstacle(x, layers, key_caches, value_caches)
    )


def _obstacle(
    x: Tensor, layers: Sequence[LayerWeights], key_caches: Sequence[Tensor], value_caches: Sequence[Tensor]
) -> str:
    """What keeps these layers from one launch, as what was expected instead; empty if nothing does."""
    # `requested` has an instruction of these
    if architecture(x.device) != INTERPRETER and not dependence(x.device)["DEPENDENT"]:
        return f"a device that is one of {', '.join(DEPENDENT_LAUNCH)}"
    programs, caches = _programs(x.device), (*key_caches, *value_caches)
    rows = x.shape[0] * x.shape[1] if x.dim() == 3 else 0
    if not layers or not caches or not 1 <= rows <= min(MAX_ROWS, programs):
        return f"x [B, T, E] of 1 to {min(MAX_ROWS, programs)} rows, and layers"
    kinds = {(cache.shape, cache.stride()) for cache in caches}
    sizes = {tuple(tensor.shape for tensor in weights) for weights in layers}
    if len(kinds) > 1 or len(sizes) > 1:
        return "equal layers, with caches of one shape and stride"
    weights = list(itertools.chain(*layers))
    if any(tensor.data_ptr() % 16 for tensor in (x, *caches, *weights)):
        return "x, weights and caches at multiples of 16 bytes"
    if caches[0].stride(3) != 1 or not all(tensor.is_contiguous() for tensor in weights):
        return "contiguous weights, and caches with a last stride of 1"
    shape = _shape(layers[0], key_caches[0])
    held = shape.held(programs, x.element_size())
    if shape.head_dim not in HEAD_DIMS:
        return f"a head dim in {list(HEAD_DIMS)}"
    if held > HELD_BYTES or 8 * shape.groups(programs)["QKV_GROUPS"] > shape.head_dim:
        return f"layers narrow enough that {programs} programs hold a matrix in {HELD_BYTES} bytes each"
    return ""


@on_their_gpu
def _launch(
    x: Tensor, layers: Sequence[LayerWeights], key_caches: Sequence[Tensor], value_caches: Sequence[Tensor],
    lengths: Tensor, cos: Tensor, sin: Tensor, eps: float, by_phase: bool,
) -> Tensor:  # fmt: skip
    """As `decode_layers`, of checked arguments. by_phase: a launch for every phase of every layer."""
    (batch, queries, width), keys = x.shape, key_caches[0].shape[1]
    shape, rows = _shape(layers[0], key_caches[0]), batch * queries
    heads, head_dim, splits = shape.heads, shape.head_dim, triton.cdiv(keys, KEYS_PER_SPLIT)
    addresses = tuple(
        tensor.data_ptr()
        for weights, *caches in zip(layers, key_caches, value_caches, strict=True)
        for tensor in (*weights, *caches)
    )
    table = _table(addresses, x.device)
    programs = _programs(x.device)

    def empty(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    part = empty(rows * heads, splits, head_dim, dtype=torch.float32)
    part_max, part_sum = (empty(rows * heads, splits, dtype=torch.float32) for _ in range(2))
    out = empty(batch, queries, width)
    buffers = (
        out, empty(rows, heads, head_dim), part, part_max, part_sum, empty(rows, heads, head_dim),
        empty(rows, width), empty(rows, shape.ffn), cos, sin, lengths,
    )  # fmt: skip
    sizes = (
        rows, queries, keys, splits, cos.stride(0) if cos.dim() == 3 else 0, *key_caches[0].stride()[:3],
        *value_caches[0].stride()[:3],
    )  # fmt: skip
    constants: dict[str, Any] = dict(
        EPS=eps, SCALE=LOG2_E / math.sqrt(head_dim), WIDTH=width, FFN=shape.ffn, HEADS=heads,
        KEY_HEADS=shape.key_heads, HEAD_DIM=head_dim, SPLIT=KEYS_PER_SPLIT,
        BLOCK_M=max(16, triton.next_power_of_2(queries * heads // shape.key_heads)),
        BLOCK_H=max(triton.next_power_of_2(heads), 32 * WARPS // head_dim), WARPS=WARPS, ONE_ROW=rows == 1,
        num_warps=WARPS, num_stages=1, **shape.groups(programs),
    )  # fmt: skip
    if not by_phase:
        _decode_layers_kernel[(programs,)](
            table.addresses, table.counter, x, *buffers, 0, len(layers), *sizes, **constants, PHASE=-1,
            launch_cooperative_grid=True,
        )  # fmt: skip
        return out
    for layer in range(len(layers)):
        for phase in range(PHASES):
            if not (rows == 1 and phase == 2):
                _decode_layers_kernel[(programs,)](
                    table.addresses, table.counter, out if layer else x, *buffers, layer, layer + 1, *sizes,
                    **constants, PHASE=phase,
                )  # fmt: skip
    return out


def decode_layers(
    x: Tensor, layers: Sequence[LayerWeights], key_caches: Sequence[Tensor], value_caches: Sequence[Tensor],
    lengths: Tensor, cos: Tensor, sin: Tensor, *, eps: float, by_phase: bool = False,
) -> Tensor:  # fmt: skip
    """All blocks of a decode step for at most 16 rows in one launch, layer by layer what `decode_layer` does.

    x [B, T, E] with 1 <= T and B * T <= 16 (float32, float16, bfloat16), contiguous weights of one dtype for
    each layer, all of one shape, so narrow that no program holds more than 64 kB of a matrix; caches
    [B, S, K, D] with D 32, 64 or 128, all of one shape and stride, with a last stride of 1; lengths [B]
    integer, the new tokens included; cos and sin [B, T, D/2] or [T, D/2] -> [B, T, E], contiguous. x, weights
    and caches begin at multiples of 16 bytes. Writes the new keys and values into the caches. The first call
    for given weights and caches copies their addresses to the device, which a CUDA graph cannot capture; the
    host reads no value. Two launches over the same caches must not overlap. A row's result does not depend on
    the other rows. by_phase: launches every phase by itself, with the same bits; it is what the interpreter
    can run. Raises ValueError naming what was expected. Same semantics as `kernels.reference.decode_layers`;
    backend.py chooses.
    """
    op = "decode_layers"
    for weights, key_cache, value_cache in zip(layers, key_caches, value_caches, strict=True):
        checks.decode_layer(x, weights, key_cache, value_cache, lengths, cos, sin)
    checks.kernel_dtype(op, x)
    obstacle = _obstacle(x, layers, key_caches, value_caches)
    obstacle and checks.refuse(op, obstacle, f"{len(layers)} layers, x {checks.shape(x)}")
    return _launch(
        x.contiguous(), layers, key_caches, value_caches, lengths.contiguous(), cos.contiguous(),
        sin.contiguous(), eps, by_phase,
    )  # fmt: skip
