"""AdamW for all parameters in one launch, which also writes their 16-bit copies for the next forward pass;
and the norm for gradient clipping.

    norm       |g| = sqrt(sum of g^2 over all tensors), factor = min(1, max_norm / (|g| + 1e-6))
    scalars    t += 1, step_size = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t), decay = lr * weight_decay
    AdamW      g' = factor * g
               m  = lerp(m, g', 1 - beta1)   lerp(a, b, w) = a + w (b - a), from the other end for w >= 1/2
               v  = lerp(v, g'^2, 1 - beta2)
               p  = p - decay * p
               p  = p - step_size * m / (sqrt(v) * root + eps)
               copy = round(p)

The operations are done in this order, and each is rounded to fp32, except that a compiler may fuse a product
with the sum that follows. Square root and quotient are IEEE's. The scalars are computed in fp64, once for
each tensor, and rounded. torch's fused AdamW differs in the last bit of m, v and p, because it computes
beta * m + (1 - beta) * g and divides by sqrt(1 - beta2^t).

Bytes a parameter: norm 4 (g); AdamW 16 read (g, p, m, v), 12 written (p, m, v) and 2 written (copy): 34. In
separate passes it is 46: norm 4, scaling the gradients 8, AdamW 28, casting the weights 6. At 134.5M
parameters and 3.0 TB/s that predicts 1.52 ms instead of 2.06. (Casting 16-bit gradients to fp32, 6 more, is
not included.)

The kernels find the tensors in a table of addresses in device memory, int64 [5 * N + 8 * G]:
    N words each for gradients, parameters, m, v, copies   0: none; a tensor without a gradient is left alone
    8 words for each of G groups   address of lr (fp32), and as fp64 weight_decay, log beta1, log beta2,
                                   1 - beta1, 1 - beta2, eps, 0
A static table gives each program one chunk of one tensor. If all five addresses allow it, the chunk is read
in blocks of 16-byte accesses; the rest, or all of it, is read with a mask. Every sum has a fixed order:
results are bit-identical from run to run.

found_inf = 1 skips the step on the device: p, m, v and t are not written, the gradient is not read, and the
copy is written from the unchanged p.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101); addresses as in Triton's tutorial 08, grouped GEMM.
Check: pytest tests -k adamw
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch_config import launch_config
from kernels.tracing import on_their_gpu

GROUP_WORDS = 8
SCALARS = 8  # a tensor's row of `scalars`: step_size, decay, root, 1 - beta1, 1 - beta2, eps
TAIL = 128  # elements of a masked block: one a thread, which takes no more registers
COPY_NAMES = {None: "", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def _span(sizes_ptr, owner_ptr, chunk_ptr, CHUNK: tl.constexpr):
    """The (tensor, first element, end) that this program owns."""
    program = tl.program_id(0)
    begin = tl.load(chunk_ptr + program).to(tl.int64) * CHUNK
    tensor = tl.load(owner_ptr + program)
    return tensor, begin, tl.minimum(begin + CHUNK, tl.load(sizes_ptr + tensor))


@triton.jit
def _sum_of_squares_kernel(
    table_ptr, sizes_ptr, owner_ptr, chunk_ptr, partial_ptr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr
):  # fmt: skip
    """A program owns a chunk of a gradient and one partial sum. Grid: the plan's programs."""
    tensor, begin, end = _span(sizes_ptr, owner_ptr, chunk_ptr, CHUNK)
    address = tl.load(table_ptr + tensor)
    end = tl.where(address == 0, begin, end)
    wide = tl.where(address % 16 == 0, begin + (end - begin) // BLOCK * BLOCK, begin)
    total = tl.zeros([BLOCK], tl.float32)
    wide_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    for start in range(begin, wide, BLOCK):
        g = tl.load(wide_ptr + start + tl.arange(0, BLOCK))  # [BLOCK]
        total += g * g
    any_ptr = address.to(tl.pointer_type(tl.float32))
    rest = tl.zeros([TAIL], tl.float32)
    for start in range(wide, end, TAIL):
        offset = start + tl.arange(0, TAIL)
        g = tl.load(any_ptr + offset, mask=offset < end, other=0.0)  # [TAIL]
        rest += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0) + tl.sum(rest, axis=0))


@triton.jit(do_not_specialize=["parts"])
def _norm_kernel(partial_ptr, found_ptr, parts, max_norm, BLOCK: tl.constexpr):
    """The only program adds the partial sums and writes found [2]: the norm, and the factor for the
    gradients.
    """
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + part, mask=part < parts, other=0.0)  # [BLOCK]
    norm = tl.sqrt_rn(tl.sum(total, axis=0))
    factor = tl.minimum(tl.div_rn(max_norm, norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(found_ptr, norm)
    tl.store(found_ptr + 1, tl.where(max_norm > 0.0, factor, 1.0))


@triton.jit(do_not_specialize=["tensors", "found_inf_ptr"])
def _scalars_kernel(
    table_ptr, settings_ptr, group_ptr, steps_ptr, scalars_ptr, found_inf_ptr, tensors, BLOCK: tl.constexpr
):
    """A program owns BLOCK tensors: it advances their step counts and fills their rows of scalars.
    settings_ptr: the table again, as fp64.
    """
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = tensor < tensors
    step = tl.load(steps_ptr + tensor, mask=mask, other=0.0) + 1.0  # [BLOCK]
    if tl.load(found_inf_ptr) == 0.0:
        tl.store(steps_ptr + tensor, step, mask=mask & (tl.load(table_ptr + tensor, mask=mask, other=0) != 0))
    word = 5 * tensors + 8 * tl.load(group_ptr + tensor, mask=mask, other=0)
    lr_ptr = tl.load(table_ptr + word, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    lr = tl.load(lr_ptr, mask=mask, other=0.0).to(tl.float64)
    decay = lr * tl.load(settings_ptr + word + 1, mask=mask, other=0.0)
    count = step.to(tl.float64)
    correction1 = 1.0 - tl.exp(count * tl.load(settings_ptr + word + 2, mask=mask, other=-1.0))
    correction2 = 1.0 - tl.exp(count * tl.load(settings_ptr + word + 3, mask=mask, other=-1.0))
    row_ptr = scalars_ptr + tensor * 8
    tl.store(row_ptr, (lr / correction1).to(tl.float32), mask=mask)
    tl.store(row_ptr + 1, decay.to(tl.float32), mask=mask)
    tl.store(row_ptr + 2, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=mask)
    for index in tl.static_range(4, 7):
        setting = tl.load(settings_ptr + word + index, mask=mask, other=0.0).to(tl.float32)
        tl.store(row_ptr + index - 1, setting, mask=mask)


@triton.jit
def _lerp(a, b, weight):
    return tl.where(weight < 0.5, a + weight * (b - a), b - (1.0 - weight) * (b - a))


@triton.jit
def _adamw_block(
    g_ptr, p_ptr, m_ptr, v_ptr, copy_ptr, mask, update, copied, factor, step_size, decay, root, weight1,
    weight2, eps, COPY: tl.constexpr
):  # fmt: skip
    """One block of one tensor. Pointers and mask are [BLOCK]. update: write p, m and v; copied: write the
    copy.
    """
    p = tl.load(p_ptr, mask=mask, other=0.0)
    if update:
        g = tl.load(g_ptr, mask=mask, other=0.0) * factor
        m = _lerp(tl.load(m_ptr, mask=mask, other=0.0), g, weight1)
        v = _lerp(tl.load(v_ptr, mask=mask, other=0.0), g * g, weight2)
        p -= decay * p
        p -= tl.div_rn(step_size * m, tl.sqrt_rn(v) * root + eps)
        tl.store(m_ptr, m, mask=mask)
        tl.store(v_ptr, v, mask=mask)
        tl.store(p_ptr, p, mask=mask)
    if COPY != "":
        if copied:
            tl.store(copy_ptr, p.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tensors", "found_inf_ptr", "factor_ptr"])
def _adamw_kernel(
    table_ptr, sizes_ptr, owner_ptr, chunk_ptr, scalars_ptr, found_inf_ptr, factor_ptr, tensors,
    COPY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A program owns a chunk of a parameter, of its averages and of its copy. Grid: the plan's programs.

    COPY: "bf16", "fp16", or "" for none. factor_ptr points to the factor for the gradients.
    """
    tensor, begin, end = _span(sizes_ptr, owner_ptr, chunk_ptr, CHUNK)
    g, p = tl.load(table_ptr + tensor), tl.load(table_ptr + tensors + tensor)
    m, v = tl.load(table_ptr + 2 * tensors + tensor), tl.load(table_ptr + 3 * tensors + tensor)
    copy = tl.load(table_ptr + 4 * tensors + tensor)
    update = (g != 0) & (tl.load(found_inf_ptr) == 0.0)
    factor = tl.load(factor_ptr)
    row_ptr = scalars_ptr + tensor * 8
    step_size, decay, root = tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2)
    weight1, weight2, eps = tl.load(row_ptr + 3), tl.load(row_ptr + 4), tl.load(row_ptr + 5)
    copy_type = tl.pointer_type(tl.float16 if COPY == "fp16" else tl.bfloat16)
    fp32 = tl.pointer_type(tl.float32)

    # A thread has four elements, so a warp's fp32 accesses are contiguous; it writes 8 bytes of the copy.
    aligned = ((g | p | m | v) % 16 == 0) & (copy % 8 == 0)
    wide = tl.where(aligned, begin + (end - begin) // BLOCK * BLOCK, begin)
    g_ptr, p_ptr = tl.multiple_of(g.to(fp32), 16), tl.multiple_of(p.to(fp32), 16)
    m_ptr, v_ptr = tl.multiple_of(m.to(fp32), 16), tl.multiple_of(v.to(fp32), 16)
    copy_ptr = tl.multiple_of(copy.to(copy_type), 8)
    for start in range(begin, wide, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        _adamw_block(
            g_ptr + offset, p_ptr + offset, m_ptr + offset, v_ptr + offset, copy_ptr + offset,
            tl.full([BLOCK], True, tl.int1), update, copy != 0, factor, step_size, decay, root, weight1,
            weight2, eps, COPY,
        )  # fmt: skip
    for start in range(wide, end, TAIL):
        offset = start + tl.arange(0, TAIL)
        _adamw_block(
            g.to(fp32) + offset, p.to(fp32) + offset, m.to(fp32) + offset, v.to(fp32) + offset,
            copy.to(copy_type) + offset, offset < end, update, copy != 0, factor, step_size, decay, root,
            weight1, weight2, eps, COPY,
        )  # fmt: skip


class Plan(NamedTuple):
    """Which program owns what, for N tensors of fixed sizes, and the launches' buffers, all on the device."""

    sizes: Tensor  # int64 [N]: elements
    group: Tensor  # int32 [N]: group of a tensor
    owner: Tensor  # int32 [programs]: tensor of a program
    chunk: Tensor  # int32 [programs]: which chunk of that tensor
    partial: Tensor  # fp32 [programs]: sums of squares
    scalars: Tensor  # fp32 [N, SCALARS]
    elements: int  # of a chunk

    @property
    def tensors(self) -> int:
        return self.sizes.shape[0]


def plan(sizes: Sequence[int], group: Sequence[int], device: torch.device) -> Plan:
    """sizes: elements of each tensor; group: index of its group of settings."""
    config = launch_config("adamw", torch.float32, device, 1)
    elements, of_chunk = torch.tensor(sizes, dtype=torch.int64), config.block_m * config.block_n
    chunks = -(-elements // of_chunk)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
    chunk = torch.arange(len(owner)) - (chunks.cumsum(0) - chunks)[owner]
    return Plan(
        elements.to(device),
        torch.tensor(group, dtype=torch.int32).to(device),
        owner.int().to(device),
        chunk.int().to(device),
        torch.empty(len(owner), dtype=torch.float32, device=device),
        torch.empty((len(sizes), SCALARS), dtype=torch.float32, device=device),
        of_chunk,
    )


def table_words(
    addresses: Sequence[Sequence[int]], settings: Sequence[tuple[int, float, float, float, float]]
) -> array[int]:
    """The words of a table. addresses: its five rows; settings: (address of lr, beta1, beta2, eps,
    weight_decay) for each group.
    """
    words = array("q")
    for row in addresses:
        words.extend(row)
    for lr, beta1, beta2, eps, weight_decay in settings:
        logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
        words.append(lr)
        words.frombytes(array("d", [weight_decay, *logs, 1 - beta1, 1 - beta2, eps, 0.0]).tobytes())
    return words


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class AddressTable:
    """The table in device memory. It is sent without waiting, by eager steps only when its words changed.

    An eager step sends from pinned memory of torch's allocator, which does not reuse it before the copy is
    done. A captured step repeats its copy at every replay, so it gets a pinned buffer and a table of its own,
    which no later eager step writes. Both are allocated in advance, because memory cannot be pinned during a
    capture.
    """

    def __init__(self, words: int, device: torch.device) -> None:
        self._words, self._device = words, device
        self._table, self._content = self._empty(), array("q")
        self._kept: list[tuple[Tensor, Tensor]] = []  # buffers and tables of captured steps
        self._spare: tuple[Tensor, Tensor] | None = None

    def _empty(self) -> Tensor:
        return torch.empty(self._words, dtype=torch.int64, device=self._device)

    def send(self, content: array[int]) -> Tensor:
        """The table with that content. Raises RuntimeError in a capture if no eager step has run since the
        previous one.
        """
        if _capturing(self._device):
            if self._spare is None:
                raise RuntimeError(
                    "AdamW: expected an eager step before every capture, got none since the last one"
                )
            self._kept.append(self._spare)
            pinned, table = self._spare
            self._spare = None
            pinned.copy_(torch.tensor(content, dtype=torch.int64))
            return table.copy_(pinned, non_blocking=True)
        pinning = self._device.type == "cuda"
        if self._spare is None:
            self._spare = torch.empty(self._words, dtype=torch.int64, pin_memory=pinning), self._empty()
        if content != self._content:
            self._content = content
            host = torch.tensor(content, dtype=torch.int64)
            self._table.copy_(host.pin_memory() if pinning else host, non_blocking=pinning)
        return self._table


@on_their_gpu
def gradient_norm(table: Tensor, work: Plan, max_norm: float) -> Tensor:
    """fp32 [2] on the device: the norm of all gradients, and the factor that clips it to max_norm (1 if
    max_norm is 0). Reads the gradients once.
    """
    found = torch.empty(2, dtype=torch.float32, device=table.device)
    config = launch_config("adamw_squares", torch.float32, table.device, 1)
    if parts := len(work.owner):
        _sum_of_squares_kernel[(parts,)](
            table, work.sizes, work.owner, work.chunk, work.partial,
            CHUNK=work.elements, BLOCK=config.block_n, TAIL=TAIL, num_warps=config.num_warps,
        )  # fmt: skip
    config = launch_config("adamw_norm", torch.float32, table.device, 1)
    _norm_kernel[(1,)](work.partial, found, parts, max_norm, BLOCK=config.block_n, num_warps=config.num_warps)
    return found


@on_their_gpu
def adamw(
    table: Tensor, work: Plan, steps: Tensor, found_inf: Tensor, factor: Tensor,
    copy_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """One step of AdamW for all tensors of the table, in place: parameters, averages, step counts, copies.

    table: int64, see above. steps: fp32 [N], advanced by one where there is a gradient. found_inf: fp32
    scalar; 1 skips the step. factor: fp32 scalar that multiplies the gradients. copy_dtype: torch.bfloat16 or
    torch.float16, None without copies.
    """
    config, block = launch_config("adamw", torch.float32, table.device, 1), 128
    if not work.tensors:
        return
    _scalars_kernel[(triton.cdiv(work.tensors, block),)](
        table, table.view(torch.float64), work.group, steps, work.scalars, found_inf, work.tensors,
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    if programs := len(work.owner):
        _adamw_kernel[(programs,)](
            table, work.sizes, work.owner, work.chunk, work.scalars, found_inf, factor, work.tensors,
            COPY=COPY_NAMES[copy_dtype], CHUNK=work.elements, BLOCK=config.block_n, TAIL=TAIL,
            num_warps=config.num_warps,
        )  # fmt: skip
