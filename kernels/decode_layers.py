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
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_attention import KEYS_PER_SPLIT, LOG2_E, attend, combined
from kernels.decode_layer import combine_o, norm_gate_up, norm_qkv_rope, project
from kernels.decode_product import GRID, arrive, wait
from kernels.launch_config import dependence, multiprocessors
from kernels.types import LayerWeights

MAX_ROWS = 16
WARPS = 8
# Bytes of a matrix that the registers of a program hold beside everything else.
HELD_BYTES = 64 << 10
PHASES = 6  # qkv, attention, combine, o, gate and up, down
ADDRESSES = 8  # of a layer: six weights and two caches


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
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Layers first .. last - 1: x [R, E] -> out [R, E], with the other buffers in between. Grid: at least as
    many programs as a phase other than attention has units. PHASE: the only phase that runs, or -1: all.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    MEET: tl.constexpr = GRID if PHASE < 0 else 0
    IN_TILES: tl.constexpr = (WIDTH + 32 * WARPS - 1) // (32 * WARPS)
    O_TILES: tl.constexpr = (HEADS * HEAD_DIM + 32 * WARPS - 1) // (32 * WARPS)
    FFN_TILES: tl.constexpr = (FFN + 32 * WARPS - 1) // (32 * WARPS)
    unit, programs = tl.program_id(0), tl.num_programs(0)
    met = 0
    wait(DEPENDENT)
    for layer in range(first, last):
        at = layer * 8
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

    addresses: Tensor  # [L * ADDRESSES] int64
    counter: Tensor  # [1] int32


@functools.lru_cache(maxsize=16)
def _table(addresses: tuple[int, ...], device: torch.device) -> _Table:
    return _Table(
        torch.tensor(addresses, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )


def _groups(columns: int, per_group: int, programs: int) -> int:
    """The fewest groups a program, a power of two, with which that many columns make no more units than
    programs.
    """
    return triton.next_power_of_2(triton.cdiv(triton.cdiv(columns, per_group), programs))


def decode_layers(
    x: Tensor, layers: Sequence[LayerWeights], key_caches: Sequence[Tensor], value_caches: Sequence[Tensor],
    lengths: Tensor, cos: Tensor, sin: Tensor, *, eps: float, dependent: bool = False, by_phase: bool = False,
    cooperative: bool = False,
) -> Tensor:  # fmt: skip
    """`decode_layer` of all layers, one after the other."""
    batch, queries, width = x.shape
    keys, key_heads, head_dim = key_caches[0].shape[1:]
    heads, ffn, rows = layers[0].o.shape[1] // head_dim, layers[0].down.shape[1], batch * queries
    splits = triton.cdiv(keys, KEYS_PER_SPLIT)
    addresses = [
        tensor.data_ptr()
        for weights, *caches in zip(layers, key_caches, value_caches, strict=True)
        for tensor in (*weights, *caches)
    ]
    table = _table(tuple(addresses), x.device)
    programs = multiprocessors(x.device) if not by_phase else 132
    qkv, o = _groups((heads + 2 * key_heads) * head_dim, 8, programs), _groups(width, 8, programs)
    gate, down = _groups(ffn, 4, programs), _groups(width, 8, programs)

    def empty(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    part = empty(rows * heads, splits, head_dim, dtype=torch.float32)
    part_max, part_sum = (empty(rows * heads, splits, dtype=torch.float32) for _ in range(2))
    out = empty(batch, queries, width)
    one = (
        table.addresses, table.counter, x, out, empty(rows, heads, head_dim), part, part_max, part_sum,
        empty(rows, heads, head_dim), empty(rows, width), empty(rows, ffn), cos, sin, lengths,
    )  # fmt: skip
    other = (
        rows, queries, keys, splits, cos.stride(0) if cos.dim() == 3 else 0, *key_caches[0].stride()[:3],
        *value_caches[0].stride()[:3],
    )  # fmt: skip
    constants = dict(
        EPS=eps, SCALE=LOG2_E / math.sqrt(head_dim), WIDTH=width, FFN=ffn, HEADS=heads, KEY_HEADS=key_heads,
        HEAD_DIM=head_dim, SPLIT=KEYS_PER_SPLIT,
        BLOCK_M=max(16, triton.next_power_of_2(queries * heads // key_heads)),
        BLOCK_H=max(triton.next_power_of_2(heads), 32 * WARPS // head_dim), QKV_GROUPS=qkv, O_GROUPS=o,
        GATE_GROUPS=gate, DOWN_GROUPS=down, WARPS=WARPS, ONE_ROW=rows == 1, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    if cooperative:
        constants["launch_cooperative_grid"] = True
    if by_phase:
        for layer in range(len(layers)):
            for phase in range(PHASES):
                if not (rows == 1 and phase == 2):
                    _decode_layers_kernel[(programs,)](
                        *one, layer, layer + 1, *other, **constants, PHASE=phase, DEPENDENT=False
                    )
            one = (*one[:2], out, *one[3:])  # the next layer reads what this one wrote
    else:
        _decode_layers_kernel[(programs,)](
            *one, 0, len(layers), *other, **constants, PHASE=-1, **dependence(x.device, dependent)
        )
    return out
