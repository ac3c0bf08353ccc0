"""A cache that does not fit is refused before it is tried, with the numbers that fit."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from captured_cases import GREEDY, looped, prompts, tiny_model

from smollm2 import SmolLM2Config, generate
from smollm2.engine import cache
from smollm2.engine.cache import KVCache, cache_bytes, free_memory, require_memory
from smollm2.engine.captured import DecodeLoops
from smollm2.engine.eager import Engine
from smollm2.errors import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_allocated(dtype: torch.dtype) -> None:
    config = SmolLM2Config.preset("tiny")
    made = KVCache.allocate(config, 3, 70, CPU, dtype)
    assert cache_bytes(config, 3, 70, dtype) == made.keys.nbytes + made.values.nbytes


def test_a_token_of_the_135m_model() -> None:
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
def test_what_fits_is_named_and_fits(
    monkeypatch: pytest.MonkeyPatch, batch: int, capacity: int, free: int, fits: str
) -> None:
    config = SmolLM2Config.preset("135M")
    monkeypatch.setattr(cache, "free_memory", lambda device: free)
    with pytest.raises(UsageError) as refused:
        KVCache.allocate(config, batch, capacity, CPU, torch.bfloat16)
    message = str(refused.value)
    assert message.startswith(
        f"cache: {batch} x {capacity} tokens in bfloat16 need {batch * capacity * 23_040 / 1e6:,.0f} MB, and "
    )
    assert message.endswith(
        f"(90 % of what is free); what fits: {fits}"
        if "even" not in fits
        else f"(90 % of what is free); {fits}"
    )
    for rows in re.findall(r"a batch of (\d+)", message):
        require_memory(config, int(rows), capacity, CPU, torch.bfloat16)
        with pytest.raises(UsageError):
            require_memory(config, int(rows) + 1, capacity, CPU, torch.bfloat16)
    for tokens in re.findall(r"(\d+) tokens(?: \(| *$)", message):
        require_memory(config, batch, int(tokens), CPU, torch.bfloat16)
        with pytest.raises(UsageError):
            require_memory(config, batch, int(tokens) + 1, CPU, torch.bfloat16)


def test_generation_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "free_memory", lambda device: 30_000)
    with pytest.raises(UsageError, match=r"cache: 2 x \d+ tokens in float32 need .* what fits: 26 tokens"):
        generate(tiny_model(), prompts((4, 4))[0], max_new_tokens=64)


def test_idle_loops_make_room_for_one_that_does_not_fit_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = DecodeLoops(Engine(tiny_model()))
    total = 3 * cache_bytes(loops.engine.model.config, 1, 64, torch.float32)
    monkeypatch.setattr(
        cache, "free_memory", lambda device: total - sum(2 * loop.cache.keys.nbytes for loop in loops.idle)
    )
    for rows in (1, 2):
        ids, mask = prompts((4,) * rows)
        looped(loops, ids, mask, list(range(rows)), params=GREEDY, max_new_tokens=60)
        assert [loop.batch for loop in loops.idle] == [rows]
    ids, mask = prompts((4,) * 3)
    with pytest.raises(UsageError, match="what fits: a batch of 2"):
        looped(loops, ids, mask, [0, 1, 2], params=GREEDY, max_new_tokens=60)


def test_what_is_said_to_fit_is_generated_though_its_power_of_two_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loops = DecodeLoops(Engine(tiny_model()))
    free = 150 * cache_bytes(loops.engine.model.config, 1, 1, torch.float32)
    monkeypatch.setattr(
        cache, "free_memory", lambda device: free - sum(2 * loop.cache.keys.nbytes for loop in loops.idle)
    )
    ids, mask = prompts((4,))
    with pytest.raises(UsageError, match="cache: 1 x 136 tokens in float32 .* what fits: 135 tokens"):
        looped(loops, ids, mask, [0], params=GREEDY, max_new_tokens=132)
    for _ in range(2):
        assert len(looped(loops, ids, mask, [0], params=GREEDY, max_new_tokens=131)) == 131
        assert [loop.cache.capacity for loop in loops.idle] == [135]


def test_free_memory_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = free_memory(CPU)
    assert found is None or found > 0
    assert free_memory(torch.device("meta")) is None
    monkeypatch.setattr(cache, "_host_memory", lambda: 500)
    monkeypatch.setattr(cache, "_container_memory", lambda: None)
    assert free_memory(CPU) == 500
    monkeypatch.setattr(cache, "_container_memory", lambda: 300)
    assert free_memory(CPU) == 300
    monkeypatch.setattr(cache, "_host_memory", lambda: None)
    monkeypatch.setattr(cache, "_container_memory", lambda: None)
    assert free_memory(CPU) is None
    KVCache.allocate(SmolLM2Config.preset("tiny"), 1, 1, CPU, torch.float32)  # nobody can say: tried


def test_on_cuda_what_torch_holds_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(
        memory_reserved=lambda device: 700,
        memory_allocated=lambda device: 200,
        mem_get_info=lambda device: (1_000, 80_000),
    )
    monkeypatch.setattr(cache, "torch", SimpleNamespace(cuda=known))
    assert free_memory(torch.device("cuda")) == 1_500


@pytest.mark.parametrize("limit, expected", [("max", None), ("1000", 1000 - 400 + 150)])
def test_a_containers_limit_counts_without_the_page_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, expected: int | None
) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.stat").write_text("anon 10\ninactive_file 150\n")
    monkeypatch.setattr(cache, "Path", lambda name: tmp_path if name == "/sys/fs/cgroup" else Path(name))
    assert cache._container_memory() == expected
    monkeypatch.setattr(cache, "Path", lambda name: tmp_path / "absent")
    assert cache._container_memory() is None
