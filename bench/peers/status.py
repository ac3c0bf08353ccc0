"""The libraries that the benchmarks measure beside this project: which version of each is here, and why one
was not measured.

A benchmark hands the outcome of every variant to `peer_status`, which becomes `peers` in its JSON, and prints
`not_measured`: nobody has to guess whether a library is absent from a table because it was slow, because it
failed or because it was not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from smollm2.errors import UsageError

EXTRA = "pip install -e '.[peers]'"
# Distribution -> how to get it. Those of torch itself are there with torch.
INSTALL = {
    **dict.fromkeys(("transformers", "torchao", "liger-kernel", "llama-cpp-python", "gguf"), EXTRA),
    "litgpt": "python -m bench.litgpt_peer setup",
    "llama-server": "build it as bench/serve.py says, and name it with --llama-server",
    "flash-attn": "pip install flash-attn --no-build-isolation",
    "quack-kernels": "pip install quack-kernels",
}
OF_TORCH = ("torch.compile", "torch flash attention", "torch cuDNN attention", "torch FlexAttention")
NOT_ASKED = "not asked for"


def how_to_get(peer: str) -> str:
    return INSTALL.get(peer, f"pip install {peer}")


class Unavailable(UsageError):
    """A peer that cannot be measured here; the message names it, its version and the reason."""


class NotInstalled(Unavailable, ModuleNotFoundError):
    """A peer that is not here; the message says how to install it."""

    def __init__(self, peer: str) -> None:
        super().__init__(f"{peer} is not installed; {how_to_get(peer)}")
        self.name = peer


def peer_version(peer: str) -> str | None:
    """The version of a peer that runs in this process; None where it is not installed. torch's own kernels
    have that of torch.
    """
    if peer in OF_TORCH:
        return str(torch.__version__)
    try:
        return version(peer)
    except PackageNotFoundError:
        return None


def require(peer: str, device: torch.device | None = None) -> str:
    """Its version. With a device: the peer has kernels for GPUs only. Raises NotInstalled, or Unavailable on
    a CPU.
    """
    found = peer_version(peer)
    if found is None:
        raise NotInstalled(peer)
    if device is not None and device.type != "cuda":
        raise Unavailable(f"{peer} {found}: needs a GPU")
    return found


def peer_status(
    outcomes: Mapping[str, Iterable[str]], versions: Mapping[str, str | None] | None = None
) -> dict[str, dict[str, Any]]:
    """What became of each peer: {peer: {"version": ..., "used": ..., "why": ...}}, as it goes into the JSON.

    outcomes: for each variant of a peer "" where it was measured, else why not; no variant at all means that
    it was not asked for. versions: of those peers that do not run in this process. `why` is None for a peer
    that was measured.
    """
    found = {}
    for peer, reasons in outcomes.items():
        known = versions[peer] if versions is not None and peer in versions else peer_version(peer)
        said = list(reasons)
        used = "" in said
        found[peer] = {"version": known, "used": used, "why": None if used else _reason(peer, said, known)}
    return found


def _reason(peer: str, said: list[str], known: str | None) -> str:
    """The first reason, without the name of the peer, which stands before it."""
    if not said:
        return NOT_ASKED if known is not None else f"not installed; {how_to_get(peer)}"
    text = said[0].removeprefix("not available: ")
    for head in (f"{peer} {known}: ", f"{peer} is "):
        _, found, tail = text.partition(head)
        if found:
            return tail
    return text


def not_measured(peers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each peer of a `peer_status` that was not measured: its version and the reason, or how to
    install it.
    """
    return [
        f"not measured: {' '.join(filter(None, (peer, row['version'])))}: {row['why']}"
        for peer, row in peers.items()
        if not row["used"]
    ]
