"""A cache that does not fit is refused before it is tried, with the numbers that fit."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from generation_cases import GREEDY, looped, prompts, tiny_model

from smollm2 import SmolLM2Config, generate
from smollm2.engine import cache
from smollm2.engine.cache import KVCache, cache_bytes, free_memory, require_memory
from smollm2.engine.eager import Engine
from smollm2.engine.loops import DecodeLoops
from smollm2.errors import UsageError

CPU = torch.device("cpu")


def test_cache_bytes_are_those_allocated():
    for dtype in (torch.float32, torch.bfloat16):
        config = SmolLM2Config.preset("tiny")
        made = KVCache.allocate(config, 3, 70, CPU, dtype)
        assert cache_bytes(config, 3, 70, dtype) == made.keys.nbytes + made.values.nbytes
    assert cache_bytes(SmolLM2Config.preset("135M"), 1, 1, torch.bfloat16) == 23_040


@pytest.mark.parametrize(
    "batch, capacity, free, fits",
    [
        (8, 1024, 100_000_000, "a batch of 3, or 488 tokens (prompt and new ones) for each of the 8"),
        (1, 8192, 100_000_000, "3906 tokens"),
        (8, 8192, 100_000_000, "488 tokens (prompt and new ones) for each of the 8"),
        (8, 8192, 10_000, "not even one token fits: free some memory"),
    ],
)
def test_what_fits_is_named_and_fits(monkeypatch, batch, capacity, free, fits):
    config = SmolLM2Config.preset("135M")
    monkeypatch.setattr(cache, "free_memory", lambda device: free)
    with pytest.raises(UsageError) as refused:
        KVCache.allocate(config, batch, capacity, CPU, torch.bfloat16)
    message, needed = str(refused.value), f"{batch * capacity * 23_040 / 1e6:,.0f} MB"
    assert message.startswith(f"cache: {batch} x {capacity} tokens in bfloat16 need {needed}, and ")
    assert message.endswith(f"(90 % of what is free); {'' if 'even' in fits else 'what fits: '}{fits}")
    found = [(int(rows), 0) for rows in re.findall(r"a batch of (\d+)", message)]
    found += [(batch, int(tokens)) for tokens in re.findall(r"(\d+) tokens(?: \(| *$)", message)]
    for rows, tokens in found:
        require_memory(config, rows, tokens or capacity, CPU, torch.bfloat16)
        more = (rows, tokens + 1) if tokens else (rows + 1, capacity)
        with pytest.raises(UsageError):
            require_memory(config, *more, CPU, torch.bfloat16)


def test_generation_says_so_too(monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda device: 30_000)
    with pytest.raises(UsageError, match=r"cache: 2 x \d+ tokens in float32 need .* what fits: 26 tokens"):
        generate(tiny_model(), prompts((4, 4))[0], max_new_tokens=64)


def loops_in(free, monkeypatch):
    """Loops of a model, with that much memory for their caches."""
    loops = DecodeLoops(Engine(tiny_model()))
    free *= cache_bytes(loops.engine.model.config, 1, 1, torch.float32)
    taken = lambda: sum(2 * loop.cache.keys.nbytes for loop in loops.idle)  # noqa: E731
    monkeypatch.setattr(cache, "free_memory", lambda device: free - taken())
    return loops


def test_idle_loops_make_room_for_one_that_does_not_fit_beside_them(monkeypatch):
    loops, options = loops_in(3 * 64, monkeypatch), dict(params=GREEDY, max_new_tokens=60)
    for rows in (1, 2):
        looped(loops, *prompts((4,) * rows), list(range(rows)), **options)
        assert [loop.batch for loop in loops.idle] == [rows]
    with pytest.raises(UsageError, match="what fits: a batch of 2"):
        looped(loops, *prompts((4,) * 3), [0, 1, 2], **options)


def test_what_is_said_to_fit_is_generated_though_its_power_of_two_does_not_fit(monkeypatch):
    loops, prompt = loops_in(150, monkeypatch), prompts((4,))
    with pytest.raises(UsageError, match="cache: 1 x 136 tokens in float32 .* what fits: 135 tokens"):
        looped(loops, *prompt, [0], params=GREEDY, max_new_tokens=132)
    for _ in range(2):
        assert len(looped(loops, *prompt, [0], params=GREEDY, max_new_tokens=131)) == 131
        assert [loop.cache.capacity for loop in loops.idle] == [135]


def test_free_memory_is_what_the_system_says(monkeypatch):
    found = free_memory(CPU)
    assert found is None or found > 0
    assert free_memory(torch.device("meta")) is None
    for host, container, expected in ((500, None, 500), (500, 300, 300), (None, None, None)):
        monkeypatch.setattr(cache, "_host_memory", lambda host=host: host)
        monkeypatch.setattr(cache, "_container_memory", lambda container=container: container)
        assert free_memory(CPU) == expected
    KVCache.allocate(SmolLM2Config.preset("tiny"), 1, 1, CPU, torch.float32)  # nobody can say: tried


def test_on_cuda_what_torch_holds_and_does_not_use_is_free(monkeypatch):
    known = SimpleNamespace(
        memory_reserved=lambda device: 700,
        memory_allocated=lambda device: 200,
        mem_get_info=lambda device: (1_000, 80_000),
    )
    monkeypatch.setattr(cache, "torch", SimpleNamespace(cuda=known))
    assert free_memory(torch.device("cuda")) == 1_500


@pytest.mark.parametrize("limit, expected", [("max", None), ("1000", 1000 - 400 + 150)])
def test_a_containers_limit_counts_without_the_page_cache(monkeypatch, tmp_path, limit, expected):
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.stat").write_text("anon 10\ninactive_file 150\n")
    monkeypatch.setattr(cache, "Path", lambda name: tmp_path if name == "/sys/fs/cgroup" else Path(name))
    assert cache._container_memory() == expected
    monkeypatch.setattr(cache, "Path", lambda name: tmp_path / "absent")
    assert cache._container_memory() is None
