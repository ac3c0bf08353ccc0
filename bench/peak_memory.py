"""The most memory that a call holds at one time beyond what was there before it: exact, on a CPU as on a GPU.

On a GPU the allocator knows. On a CPU torch's profiler reports every allocation and release in order, and the
running sum has a highest point; what a library takes without torch's allocator is not in it. The profiler
knows the size of what is released only if it saw it allocated: of a call that releases what an earlier one
left (a training step the old gradients), the second one measured counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes. The result of the call is alive at its end, and counts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    recorded = profiler.profiler
    assert recorded is not None and recorded.kineto_results is not None, (
        "a profile that has ended has results"
    )
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
