"""What a run reports besides its training loss: the loss on documents that it never trains on, and samples.

Neither draws a random number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from smollm2.engine.eager import Engine
from smollm2.generation.loop import generate
from smollm2.model import IGNORE_INDEX, SmolLM2ForCausalLM, shift_labels
from smollm2.pretrained.tokenizer import Tokenizer
from train.config import RunConfig
from train.data.packing import Tensors
from train.distributed import World


@torch.no_grad()
def evaluate(model: SmolLM2ForCausalLM, held_out: Tensors, config: RunConfig, world: World) -> float:
    """The loss in nats per target on the held-out rows; the ranks share the batches.

    Leaves the model in training mode.
    """
    ids, labels = held_out.ids, held_out.targets
    doc_start = held_out.doc_start if config.document_masking else None
    total = torch.zeros((), dtype=torch.float64)
    with _evaluating(model):
        for first in range(world.rank * config.batch_size, len(ids), world.size * config.batch_size):
            rows = slice(first, first + config.batch_size)
            piece = ids[rows].to(world.device)
            starts = None if doc_start is None else doc_start[rows].to(world.device)
            wanted = piece if labels is ids else labels[rows].to(world.device)
            loss = model(piece, labels=wanted, doc_start=starts, reduction="sum").loss
            total += loss.cpu().double()  # some devices have no float64
    targets = int((shift_labels(labels, doc_start) != IGNORE_INDEX).sum())
    return sum(world.gather(float(total))) / max(1, targets)


def sample(model: SmolLM2ForCausalLM, tokenizer: Tokenizer, config: RunConfig) -> list[str]:
    """A continuation of every prompt, or with format=chat its answer below it.

    Sampling noise is a function of (seed, position) and no generator is touched: the loss curve is the same
    without samples.
    """
    vocab_size = model.config.vocab_size
    ends = tokenizer.end_ids(vocab_size, *model.config.eos_token_ids)
    banned = tokenizer.banned_ids(vocab_size, ends)
    texts = []
    with _evaluating(model):
        for index, prompt in enumerate(config.sample_prompts):
            if config.format == "chat":
                ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": prompt}]))
            else:
                ids = tokenizer.encode(prompt, special=False) or [tokenizer.eot_token_id or 0]
            out = generate(
                model,
                torch.tensor([ids], device=model.lm_head.weight.device),
                max_new_tokens=min(config.sample_tokens, model.config.max_position_embeddings - len(ids)),
                temperature=config.sample_temperature,
                seed=config.seed + index,
                eos_token_id=ends,
                suppress_tokens=banned,
                engine=Engine(model),  # not captured: a graph would keep memory that training needs
            )
            shown, new = ("", out[0]) if config.format == "text" else (f"{prompt}\n", out[0, len(ids) :])
            texts.append(shown + tokenizer.decode(new.tolist(), skip_special_tokens=True))
    return texts


@contextlib.contextmanager
def _evaluating(model: SmolLM2ForCausalLM) -> Iterator[None]:
    """Evaluation mode inside, training mode afterwards, whatever happens."""
    model.eval()
    try:
        yield
    finally:
        model.train()
