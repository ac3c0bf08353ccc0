"""litgpt, in a process and a virtual environment of its own (`python -m bench.litgpt_peer setup`): its step
and its generation.

It wants another huggingface_hub than transformers does. A variant is a process that holds one model and is
asked for one step, a prefill or some tokens at a time, so that it takes turns with the variants of this
process; meanwhile it sleeps, threads included. Its time is that of the whole exchange, a fraction of a
millisecond.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.peers.status import NotInstalled
from bench.record import ROOT
from bench.variant import Variant
from smollm2.config import SmolLM2Config
from smollm2.engine.cache import cache_bytes
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.cache import cache_folder
from smollm2.pretrained.load import stored_tensors

LITGPT = "litgpt==0.5.13"
VENV_VARIABLE = "SMOLLM2_LITGPT_VENV"
# of constraints.txt, beside the torch that runs here; litgpt needs other versions of the rest
SHARED = ("triton", "numpy", "safetensors")
ANSWER_SECONDS = 600.0  # for one request: a first step may compile


class PeerFailed(RuntimeError):
    """The process of a peer did not answer as it should; it has been ended."""


class PeerProcess:
    """A process that answers one line of JSON with another. It is killed when nobody holds this any more."""

    def __init__(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> None:
        """environment: what is added to ours. seconds: how long an answer may take."""
        self._seconds = seconds
        self._errors = tempfile.TemporaryFile()
        pipe, variables = subprocess.PIPE, {**os.environ, **(environment or {})}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, env=variables)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        assert self._process.stdout is not None
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        self._close = weakref.finalize(self, _end, self._process)

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """The result of a request. Raises PeerFailed for an error, for what is no answer, for silence and for
        a process that ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=self._seconds)
        except queue.Empty:
            raise self._failed(f"no answer to {call!r} within {self._seconds:.0f} s") from None
        except OSError:
            line = b""
        if not line:
            self._process.wait()
            raise self._failed(f"ended with exit code {self._process.returncode}")
        try:
            answer = json.loads(line)
            found = answer["error"] if "error" in answer else answer["result"]
        except (ValueError, TypeError, KeyError):
            raise self._failed(f"expected an answer to {call!r} in JSON, got {line[:80]!r}") from None
        if "error" in answer:
            raise self._failed(str(found))
        result: dict[str, Any] = found
        return result

    def close(self) -> None:
        """Ends the process."""
        self._close()

    def _failed(self, why: str) -> PeerFailed:
        """Ends the process; the last line that it wrote on stderr is added, unless it spoke for itself."""
        self.close()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return PeerFailed(f"{why}: {last}" if last and why.startswith("ended") else why)


def _read(stream: BinaryIO, lines: queue.SimpleQueue[bytes]) -> None:
    """Hands on every line, and an empty one at the end. A thread, because a read from a pipe has no time-out
    on every system.
    """
    for line in stream:
        lines.put(line)
    lines.put(b"")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


# the environment


def default_venv() -> Path:
    """Where the environment lies."""
    named = os.environ.get(VENV_VARIABLE)
    return Path(named).expanduser() if named else cache_folder() / "bench" / "litgpt-venv"


def venv_python(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def litgpt_version(venv: Path | None = None) -> str | None:
    """The version in the environment, without starting it; None where there is none."""
    found = sorted((venv or default_venv()).glob("[Ll]ib/**/litgpt-*.dist-info"))
    return found[0].name.removeprefix("litgpt-").removesuffix(".dist-info") if found else None


def setup(venv: Path) -> None:
    """Makes the environment, or completes it. Raises UsageError where pip does not succeed."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line.partition("==")[0] in SHARED]
    pins.append(f"torch=={torch.__version__.partition('+')[0]}")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
        pip: list[str | Path] = [venv_python(venv), "-m", "pip", "install", "-c", constraints]
        commands: list[list[str | Path]] = [
            [sys.executable, "-m", "venv", venv],
            [*pip, LITGPT, "torch", "numpy", "safetensors"],
        ]
        for command in commands:
            if subprocess.run(command).returncode != 0:
                told = " ".join(map(str, command))
                raise UsageError(f"setup: {told} failed; remove {venv}, or name another folder with --venv")


# the peer


def start(
    weights: Mapping[str, Tensor], config: SmolLM2Config, dtype: torch.dtype, device: torch.device
) -> tuple[PeerProcess, dict[str, Any]]:
    """A process with the model of those weights (Hugging Face's names), and what it says of itself. Raises
    NotInstalled.
    """
    python = venv_python(default_venv())
    if not python.is_file() or litgpt_version() is None:
        raise NotInstalled("litgpt")
    worker = Path(__file__).with_name("litgpt_worker.py")
    # -I: neither this folder nor PYTHONPATH. Threads that wait must not take the processor from those whose
    # turn it is.
    process = PeerProcess([python, "-I", worker], {"OMP_WAIT_POLICY": "PASSIVE"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        stored = {name: weight.contiguous() for name, weight in weights.items() if name != "lm_head.weight"}
        save_file(stored, path)
        facts = process.ask(
            "load", config=litgpt_config(config), weights=str(path), dtype=str(dtype).removeprefix("torch."),
            device=str(device), threads=torch.get_num_threads(),
        )  # fmt: skip
    if facts["parameters"] != config.num_parameters():
        process.close()
        wanted = f"{config.num_parameters():,} parameters, with a tied head"
        raise PeerFailed(f"expected {wanted}, got {facts['parameters']:,}")
    return process, facts


def litgpt_config(config: SmolLM2Config) -> dict[str, Any]:
    """Ours under litgpt's names."""
    return {
        "block_size": config.max_position_embeddings, "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size, "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads, "n_embd": config.hidden_size,
        "n_query_groups": config.num_key_value_heads, "intermediate_size": config.intermediate_size,
        "rope_base": int(config.rope_theta), "norm_eps": config.rms_norm_eps,
    }  # fmt: skip


class LitgptStep:
    """Optimizer steps on the same tokens; with autocast in bf16, which litgpt calls bf16-mixed."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: SmolLM2Config,
        ids: Tensor,
        autocast: bool,
        compiler: str | None = None,
    ) -> None:
        """weights: fp32, Hugging Face's names. ids [B, T]. compiler: the backend of torch.compile. Raises
        NotInstalled, PeerFailed.
        """
        self._process, self.facts = start(weights, config, torch.float32, ids.device)
        # as bench.step.TrainingStep
        recipe = {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.01, "clip": 1.0}
        self._process.ask("train", ids=ids.tolist(), autocast=autocast, compiler=compiler, **recipe)

    def __call__(self, ids: Tensor | None = None) -> Tensor:
        """One step on the tokens that it was made with -> its loss in nats."""
        return torch.tensor(self.steps(1)["loss"])

    def steps(self, count: int) -> dict[str, Any]:
        """Several with one wait -> {"loss": of the last, "peak_memory_bytes": on a GPU}."""
        return self._process.ask("steps", count=count)


def litgpt_variant(model: SmolLM2ForCausalLM, dtype: torch.dtype, device: torch.device) -> Variant:
    """Generation with the weights of `model`, parameters and cache in dtype. Raises NotInstalled,
    PeerFailed.
    """
    weights = {name: weight.float().cpu() for name, weight in stored_tensors(model).items()}
    process, facts = start(weights, model.config, dtype, device)
    return Variant(
        str(dtype).removeprefix("torch."), facts["weight_bytes"], cache_bytes(model.config, 1, 1, dtype),
        partial(LitgptTurns, process),
    )  # fmt: skip


class LitgptTurns:
    """A batch in the other process, whose cache it is: the last one that began has it."""

    def __init__(self, process: PeerProcess, prompts: Tensor, new_tokens: int) -> None:
        self._process, self._device = process, prompts.device
        process.ask("begin", prompts=prompts.tolist(), new_tokens=new_tokens)

    def prefill(self) -> Tensor:
        return torch.tensor(self._process.ask("prefill")["tokens"], device=self._device)

    def decode(self, tokens: Tensor, steps: int) -> Tensor:
        found = self._process.ask("decode", tokens=tokens.tolist(), steps=steps)
        return torch.tensor(found["tokens"], device=self._device)
