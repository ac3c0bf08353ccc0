"""A digest of a model's weights: whether what an engine derived from them is still theirs."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smollm2.engine.native import find_library, load_library
from smollm2.errors import LoadError
from smollm2.model import SmolLM2ForCausalLM

WORDS = 1024  # words of 8 bytes that are added up at a time
ROWS = 64  # sums made at a time, of words that stay in the processor's cache


@functools.cache
def _factors() -> Tensor:
    """Odd, so that every single word that changes shows."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(-(2**62), 2**62, (WORDS,), generator=generator) * 2 + 1


def digest(model: SmolLM2ForCausalLM) -> bytes:
    """16 bytes that tell the parameters' values, dtypes and names, on the CPU.

    torch's own counters do not do: fused optimizers, writes through `.data` and raw kernels leave them as
    they are. One pass over the memory, at its speed where decode_step.cpp is compiled. It notices accidents;
    it is no protection from someone who looks for a collision.
    """
    named = list(model.named_parameters())
    of_values: Callable[[Tensor], bytes] = _sums_of_torch
    with suppress(LoadError):  # of a library that is there, and is not for this system
        if library := find_library():
            of_values = partial(_sums, load_library(library).smollm2_digest)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        shares = pool.map(lambda share: [of_values(parameter) for _, parameter in share], _shares(named))
    found = hashlib.blake2b(digest_size=16)
    for (name, parameter), values in zip(named, itertools.chain(*shares), strict=True):
        found.update(f"{name} {parameter.dtype} {list(parameter.shape)};".encode() + values)
    return found.digest()


def _shares(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Neighbours for each thread, of about as many bytes: a task for every parameter would cost as much as it
    computes.
    """
    threads, total = torch.get_num_threads(), sum(parameter.nbytes for _, parameter in named)
    shares: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(threads)]
    before = 0
    for name, parameter in named:
        shares[min(threads - 1, threads * before // max(1, total))].append((name, parameter))
        before += parameter.nbytes
    return shares


@torch.inference_mode()
def _sums(function: Any, parameter: Tensor) -> bytes:
    values = parameter.data.contiguous()
    sums = (ctypes.c_uint32 * 32)()
    function(ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.nbytes), sums)
    return bytes(sums)


@torch.inference_mode()
def _sums_of_torch(parameter: Tensor) -> bytes:
    """Words times odd factors are added up. Takes longer than the memory: torch has no fast integers."""
    values = parameter.data.contiguous().flatten().view(torch.uint8)
    if values.storage_offset() % 8:
        values = values.clone()
    whole = len(values) // (8 * WORDS) * (8 * WORDS)
    found = []
    for words in values[:whole].view(torch.int64).view(-1, WORDS).split(ROWS):
        # A sum loses its carry: two signs in highest bits cancel, so the upper halves are added again.
        found += [torch.mv(words, _factors()), torch.mv(words >> 32, _factors())]
    return b"".join(part.numpy().tobytes() for part in [*found, values[whole:]])
