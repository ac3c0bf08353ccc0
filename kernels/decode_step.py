"""The two ends of a decode step, a launch each: what goes into the first layer, and what the head's output
becomes.

    inputs  position = lengths + t;  x = W[token], cos and sin of the position;  lengths += T
    next    token = the first candidate of the highest score, NOT_FINITE if that is NaN or infinite;
            output[slot] = finished ? pad : token;  tokens = finished ? 0 : max(token, 0);
            finished |= tokens in ends;  slot += 1

B rows of T tokens, embedding W [V, E], tables [P, D/2]; scores [B, C] of C candidates, 16 or 32 bits, and
their ids. No backward pass.

A step is a chain of launches, each of which waits for the one before it, so at batch 1 these operations cost
launches and not bytes. As torch's own they are twenty small kernels, some 40 us (predicted). One launch each,
they take what a launch takes: a row of the embedding and two of the tables are 1.4 kB, the 384 scores of the
135M model 1.5 kB. More than 16 rows have whole logits, in 16 bits 98 kB a row, 25 MB at batch 256.

Both kernels write what they have read: the length, the slot, the mark of a finished row. A row belongs to one
program, so that no program reads what another one writes. Within a program the threads of all warps load
these numbers and one thread stores them: a barrier stands before the store.

Rounding: none. Scores are compared in fp32, which holds 16 bits exactly.

Check: pytest tests -k decode_step
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.decode_product import wait
from kernels.launch_config import dependence, launch_config
from kernels.layout import dense_lanes
from kernels.tracing import traceable
from kernels.types import NOT_FINITE, TokenState


@triton.jit(do_not_specialize=["queries", "vocabulary", "positions"])
def _decode_inputs_kernel(
    token_ptr, w_ptr, length_ptr, cos_ptr, sin_ptr, x_ptr, row_cos_ptr, row_sin_ptr, queries, vocabulary,
    positions, w_stride, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program owns a row: its length and the T rows of x and of both tables. Grid: B.

    All but the embedding is contiguous. What a token or a position outside its table leads to is NaN.
    """
    wait(DEPENDENT)
    batch = tl.program_id(0).to(tl.int64)
    column, lane = tl.arange(0, BLOCK), tl.arange(0, BLOCK_HALF)
    length = tl.load(length_ptr + batch).to(tl.int64)
    for time in range(0, queries):
        row = batch * queries + time
        token = tl.load(token_ptr + row).to(tl.int64)
        position = length + time
        known = (token >= 0) & (token < vocabulary) & (column < WIDTH)  # [BLOCK]
        there = (position >= 0) & (position < positions) & (lane < HALF)  # [BLOCK_HALF]
        x = tl.load(w_ptr + token * w_stride + column, mask=known, other=float("nan"))
        cos = tl.load(cos_ptr + position * HALF + lane, mask=there, other=float("nan"))
        sin = tl.load(sin_ptr + position * HALF + lane, mask=there, other=float("nan"))
        tl.store(x_ptr + row * WIDTH + column, x, mask=column < WIDTH)
        tl.store(row_cos_ptr + row * HALF + lane, cos, mask=lane < HALF)
        tl.store(row_sin_ptr + row * HALF + lane, sin, mask=lane < HALF)
    tl.debug_barrier()  # every thread has read the length
    tl.store(length_ptr + batch, (length + queries).to(length_ptr.dtype.element_ty))


@triton.jit
def _first_best(score_ptr, candidates, BLOCK: tl.constexpr):
    """The highest of contiguous scores [candidates] in fp32, where NaN counts as +inf, and the first index
    that has it.
    """
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    for start in range(0, candidates, BLOCK):
        column = start + lane
        score = tl.load(score_ptr + column, mask=column < candidates, other=float("-inf")).to(tl.float32)
        score = tl.where(score == score, score, float("inf"))
        index = tl.where(score > best, column, index)  # of equal scores a lane keeps the first
        best = tl.maximum(best, score)
    highest = tl.max(best, axis=0)
    return highest, tl.min(tl.where(best == highest, index, candidates), axis=0)


@triton.jit(do_not_specialize=["rows", "slots", "ends", "pad"])
def _next_token_kernel(
    score_ptr, id_ptr, end_ptr, token_ptr, finished_ptr, output_ptr, slot_ptr, rows, slots, ends, candidates,
    pad, score_stride, id_stride, MARK: tl.constexpr, SCORES: tl.constexpr, IDS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ENDS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program owns a row, of the candidates and of every buffer. Grid: B.

    output is [slots, B]; a row whose slot lies outside writes nothing there.
    """
    wait(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_ENDS)
    end = tl.load(end_ptr + lane, mask=lane < ends, other=-1)  # [BLOCK_ENDS]
    finished = tl.load(finished_ptr + row)
    slot = tl.load(slot_ptr + row)
    if SCORES:
        highest, index = _first_best(score_ptr + row * score_stride, candidates, BLOCK)
        token = index.to(tl.int64)
        if IDS:
            token = tl.load(id_ptr + row * id_stride + index).to(tl.int64)
        token = tl.where(tl.abs(highest) < float("inf"), token, MARK)
    else:
        token = tl.load(id_ptr + row * id_stride).to(tl.int64)
    chosen = tl.where(finished != 0, pad, token)
    fed = tl.where(finished != 0, 0, tl.maximum(token, 0))
    ended = tl.max((end == fed).to(tl.int32), axis=0)
    tl.store(output_ptr + slot * rows + row, chosen, mask=(slot >= 0) & (slot < slots))
    tl.store(token_ptr + row, fed)
    tl.debug_barrier()  # every thread has read the mark and the slot
    tl.store(finished_ptr + row, (finished != 0) | (ended != 0))
    tl.store(slot_ptr + row, slot + 1)


def _fake_inputs(
    tokens: Tensor, embedding: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    table = (*tokens.shape, cos.shape[1])
    x = embedding.new_empty((*tokens.shape, embedding.shape[1]))
    return x, cos.new_empty(table), sin.new_empty(table)


@traceable(_fake_inputs, mutates=("lengths",))
def _decode_inputs(
    tokens: Tensor, embedding: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All but the embedding contiguous, and its last stride 1."""
    batch, queries = tokens.shape
    (vocabulary, width), (positions, half) = embedding.shape, cos.shape
    x = torch.empty((batch, queries, width), dtype=embedding.dtype, device=embedding.device)
    row_cos, row_sin = (
        torch.empty((batch, queries, half), dtype=table.dtype, device=table.device) for table in (cos, sin)
    )
    if batch:
        config = launch_config("decode_inputs", embedding.dtype, embedding.device, width)
        _decode_inputs_kernel[(batch,)](
            tokens, embedding, lengths, cos, sin, x, row_cos, row_sin, queries, vocabulary, positions,
            embedding.stride(0), WIDTH=width, HALF=half, BLOCK=triton.next_power_of_2(width),
            BLOCK_HALF=triton.next_power_of_2(half), num_warps=config.num_warps,
            **dependence(embedding.device),
        )  # fmt: skip
    return x, row_cos, row_sin


def decode_inputs(
    tokens: Tensor, embedding: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a decode step begins with: the rows of the embedding, and the angles of the new positions.

    tokens [B, T] int64 or int32, embedding [V, E] (float32, float16 or bfloat16), E up to 16384; lengths [B]
    integer and contiguous, cos and sin [P, D/2] -> (x [B, T, E], cos and sin [B, T, D/2] at positions
    lengths[b] + t), contiguous. Then adds T to lengths. A token or a position outside its table gives NaN,
    for which the end of the step has a mark; the host reads no value. Raises ValueError naming what was
    expected. Same semantics as `kernels.reference.decode_inputs`.
    """
    op = "decode_inputs"
    checks.decode_inputs(tokens, embedding, lengths, cos, sin)
    checks.kernel_dtype(op, embedding)
    lengths.is_contiguous() or checks.refuse(op, "contiguous lengths, which are written", lengths.stride())
    tables = cos.contiguous(), sin.contiguous()
    return _decode_inputs(tokens.contiguous(), dense_lanes(embedding), lengths, *tables)


@traceable(lambda *_: None, mutates=("tokens", "finished", "output", "slot"))
def _next_token(
    scores: Tensor | None, ids: Tensor | None, ends: Tensor, tokens: Tensor, finished: Tensor, output: Tensor,
    slot: Tensor, pad: int,
) -> None:  # fmt: skip
    """scores or ids with a last stride of 1, all else contiguous."""
    slots, batch = output.shape
    given = tokens if scores is None else scores
    if batch:
        config = launch_config("next_token", torch.float32, given.device, given.shape[1])
        block = min(config.block_n, triton.next_power_of_2(given.shape[1]))
        # so that a lane has 16 bytes, of 64 lanes too
        warps = max(1, min(config.num_warps, block * given.element_size() // 1024))
        _next_token_kernel[(batch,)](
            given, tokens if ids is None else ids, ends, tokens, finished, output, slot, batch, slots,
            ends.numel(), given.shape[1], pad, given.stride(0), 0 if ids is None else ids.stride(0),
            MARK=NOT_FINITE, SCORES=scores is not None, IDS=ids is not None,
            BLOCK=block, BLOCK_ENDS=max(16, triton.next_power_of_2(ends.numel())), num_warps=warps,
            **dependence(given.device),
        )  # fmt: skip


def next_token(scores: Tensor | None, ids: Tensor | None, state: TokenState, ends: Tensor, pad: int) -> None:
    """Ends a decode step: takes the candidate of highest score in each row, and writes it where the next step
    and the host look for it.

    scores [B, P] (float32, float16 or bfloat16) and ids [B, P] int64 or int32 as `decode_best` gives them;
    without ids column i is token i; without scores ids [B, 1] are tokens that were chosen already. state: its
    buffers are contiguous, and written as `kernels.reference.next_token` says, which has the same semantics.
    ends [N] int64, pad in the range of int64. The host reads no value. Raises ValueError naming what was
    expected.
    """
    op = "next_token"
    checks.next_token(scores, ids, state, ends)
    if scores is not None:
        checks.kernel_dtype(op, scores)
        scores = dense_lanes(scores)
    if ids is not None:
        ids = dense_lanes(ids)
    for name, buffer in state._asdict().items():
        buffer.is_contiguous() or checks.refuse(op, f"state.{name} contiguous", buffer.stride())
    _next_token(scores, ids, ends.contiguous(), *state, pad)
