"""litgpt's SmolLM2, asked over a line protocol. Runs in litgpt's own virtual environment, by its path, and
imports nothing of this project.

A request is one line of JSON on stdin, {"call": NAME, ...arguments}; the answer one line on stdout,
{"result": {...}} or {"error": TEXT}. It ends with its stdin. What libraries print goes to stderr. Between
requests the process waits in a read, and its threads sleep.

The weights come in Hugging Face's layout and are converted by litgpt's own function; the head is tied, as in
SmolLM2, which litgpt's training does not do by itself. A training step is litgpt's pretraining loop: its
forward, its chunked loss, and autocast for bf16.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from typing import Any, TextIO

import torch
from torch import Tensor


class Worker:
    """One model, which trains or generates. Every public method is a request."""

    def load(
        self, config: dict[str, Any], weights: str, dtype: str, device: str, threads: int
    ) -> dict[str, Any]:
        """config: what differs from litgpt's SmolLM2-135M. weights: a safetensors file. dtype: of the
        parameters.
        """
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
        from safetensors.torch import load_file

        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.config = Config.from_name("SmolLM2-135M", **config)
        self.model: Any = GPT(self.config)
        state: dict[str, Tensor] = {}
        copy_weights_hf_llama(self.config, {}, state, load_file(weights))
        self.model.load_state_dict(state)
        self.model.lm_head.weight = self.model.transformer.wte.weight
        for parameter in self.model.parameters():
            # and not the rotary tables, which litgpt keeps in fp32
            parameter.data = parameter.data.to(getattr(torch, dtype))
        self.model.to(self.device)
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "weight_bytes": sum(parameter.nbytes for parameter in self.model.parameters()),
            "litgpt": version("litgpt"), "torch": version("torch"), "threads": torch.get_num_threads(),
        }  # fmt: skip

    def train(
        self,
        ids: list[list[int]],
        autocast: bool,
        compiler: str | None,
        lr: float,
        betas: list[float],
        weight_decay: float,
        clip: float,
    ) -> dict[str, Any]:
        """Prepares `steps` on the tokens ids [B, T]. compiler: the backend of torch.compile; None runs
        eagerly.
        """
        self.model.train()
        self._ids = torch.tensor(ids, device=self.device)
        # Every position is computed and the last has no target, as in the others: no tokens are saved by
        # cutting the input.
        self._targets = torch.cat([self._ids[:, 1:], torch.full_like(self._ids[:, :1], -100)], 1)
        self._called = self.model if compiler is None else torch.compile(self.model, backend=compiler)
        self._autocast, self._clip = autocast, clip
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() == 1]
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
        self._optimizer = torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=True)
        return {}

    def steps(self, count: int) -> dict[str, Any]:
        """That many optimizer steps -> the loss of the last, and on a GPU the peak of memory so far; one wait
        at the end.
        """
        from litgpt.utils import chunked_cross_entropy

        loss = torch.zeros(())
        for _ in range(count):
            self._optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                loss = chunked_cross_entropy(self._called(self._ids), self._targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
            self._optimizer.step()
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        return {"loss": loss.item(), "peak_memory_bytes": peak}

    @torch.inference_mode()
    def begin(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Makes the cache for prompts [B, T] and so many tokens after them."""
        self.model.eval()
        self._prompts = torch.tensor(prompts, device=self.device)
        batch, length = self._prompts.shape
        self.model.clear_kv_cache()
        self.model.max_seq_length = length + new_tokens
        dtype = self.model.lm_head.weight.dtype
        self.model.set_kv_cache(batch, max_seq_length=length + new_tokens, device=self.device, dtype=dtype)
        return {}

    @torch.inference_mode()
    def prefill(self) -> dict[str, Any]:
        """-> the first new token of every row. litgpt computes the logits of the whole prompt."""
        self._position = self._prompts.shape[1]
        logits = self.model(
            self._prompts, torch.arange(self._position, device=self.device), input_pos_maxp1=self._position
        )
        return {"tokens": logits[:, -1:].argmax(-1).tolist()}

    @torch.inference_mode()
    def decode(self, tokens: list[list[int]], steps: int) -> dict[str, Any]:
        """Appends tokens [B, 1] and, one by one, the most likely after it -> the tokens of those steps [B,
        steps].
        """
        found = [torch.tensor(tokens, device=self.device)]
        for _ in range(steps):
            position = torch.tensor([self._position], device=self.device)
            self._position += 1
            found.append(self.model(found[-1], position, input_pos_maxp1=self._position)[:, -1:].argmax(-1))
        return {"tokens": torch.cat(found[1:], 1).tolist()}


def serve(worker: object, requests: TextIO, answers: TextIO) -> None:
    """Answers until there are no more requests. An exception is an answer too."""
    for line in requests:
        try:
            request = json.loads(line)
            answer: dict[str, Any] = {"result": getattr(worker, request.pop("call"))(**request)}
        except Exception as failure:  # noqa: BLE001 - whoever asked decides what becomes of it
            answer = {"error": " ".join(f"{type(failure).__name__}: {failure}".split())[:400]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not lie among the answers
    serve(Worker(), sys.stdin, own)
