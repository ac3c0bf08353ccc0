"""Generation: a loop around prefill and decode.

    generate(model, input_ids)          a batch at once
    generate_steps, stream_text         token by token, piece by piece of text

An engine (smollm2/engine/select.py) runs the steps; the loop is the same for all of them. For many prompts
see smollm2/generation/batch.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine, captured_steps
from smollm2.engine.select import default_engine
from smollm2.errors import UsageError
from smollm2.generation.batch import generate_many
from smollm2.generation.prompt_cache import PromptCache
from smollm2.generation.speculative import Draft, Stats, speculative_steps
from smollm2.generation.text import TextPieces, TextStream
from smollm2.model import SmolLM2ForCausalLM, token_ids
from smollm2.pretrained.tokenizer import Tokenizer
from smollm2.sampling import SamplingParams, read_tokens, sample


def generate_steps(
    model: SmolLM2ForCausalLM,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: int = 64,
    params: SamplingParams | None = None,
    seed: int | Sequence[int] = 0,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    engine: Engine | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every row [B] until all rows have ended or max_new_tokens are reached.

    Rows that ended yield pad_token_id. Arguments as in `generate`. prompt_cache: for one prompt, of which it
    may hold a part from a generation before; it then holds this text, without its last token, however far it
    came.
    Raises UsageError before any work is done.
    """
    config, params = model.config, params or SamplingParams()
    prompt, lengths, seeds = _checked(model, input_ids, attention_mask, max_new_tokens, params, seed)
    batch = len(seeds)
    if batch == 0 or max_new_tokens == 0:
        return

    device = model.device
    positions = lengths.tolist()  # of the token drawn next, in each row's own text
    longest = max(positions)
    engine = engine or default_engine(model)
    if isinstance(engine, CapturedEngine) and model.is_plain():
        yield from captured_steps(
            engine.loops, prompt, lengths, max_new_tokens=max_new_tokens, params=params, seeds=seeds,
            eos_token_ids=eos_token_ids, pad_token_id=pad_token_id,
        )  # fmt: skip
        return
    seen = None
    if params.repetition_penalty != 1.0:
        valid = torch.arange(prompt.shape[1], device=prompt.device) < lengths[:, None]
        counts = torch.zeros(batch, config.vocab_size, dtype=torch.int32, device=prompt.device)
        seen = counts.scatter_add_(1, prompt, valid.int()).bool().to(device)

    if prompt_cache is None:
        cache, held = engine.allocate(batch, longest + max_new_tokens), 0
    elif batch == 1:
        cache, held = prompt_cache.open(text := prompt[0, :longest].tolist(), max_new_tokens)
    else:
        raise UsageError(f"prompt_cache: expected one prompt, got {batch}; generate without it")
    logits = engine.prefill(prompt[:, held:longest].to(device), (lengths - held).to(device), cache)
    if prompt_cache is not None:
        prompt_cache.tokens += text[held:]
    finished = torch.zeros(batch, dtype=torch.bool)
    for step in range(max_new_tokens):
        chosen = sample(logits, params, seeds, [position + step for position in positions], seen)
        tokens = torch.where(finished, pad_token_id, read_tokens(chosen))
        yield tokens
        if eos_token_ids:
            finished |= torch.isin(tokens, torch.tensor(list(eos_token_ids)))
            if finished.all():
                return
        if step + 1 == max_new_tokens:
            return
        if seen is not None:
            seen[torch.arange(batch, device=device), chosen] = True
        logits = engine.decode(chosen[:, None], cache)[:, -1]
        if prompt_cache is not None:
            prompt_cache.tokens.append(int(chosen))


def generate(
    model: SmolLM2ForCausalLM,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 40,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    suppress_tokens: Sequence[int] = (),
    engine: Engine | None = None,
) -> Tensor:
    """Continues token sequences.

    input_ids [B, T] integers, or lists of one length; attention_mask [B, T] with 0 for padding, on either
    side (rows are compacted, so padding never changes a result) -> [B, T + new] on the device of input_ids
    (of lists: the CPU), where new <=
    max_new_tokens: generation stops when every row has produced an end token, and finished rows are filled
    with pad_token_id (default: the model's pad, else its end token).

    temperature 0 is greedy. seed: row i of a batch draws as that prompt alone with seed + i; a list gives one
    seed per row. eos_token_id: one id or several, default the model's; an empty list never stops.
    suppress_tokens are never chosen. engine: what runs the steps, see `select_engine`; by default the model
    as it is, on CUDA as captured graphs that are kept for the next call. See SamplingParams for the filters.
    The dtype is that of the parameters; torch.autocast changes nothing. Raises UsageError for arguments out
    of range, more than max_position_embeddings tokens in all, and logits that are not finite.
    """
    if eos_token_id is None:
        ends: tuple[int, ...] = model.config.eos_token_ids
    else:
        ends = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    if pad_token_id is None:
        pad_token_id = model.config.pad_token_id if model.config.pad_token_id is not None else (*ends, 0)[0]
    params = SamplingParams(tuple(suppress_tokens), repetition_penalty, temperature, top_k, top_p, min_p)
    input_ids, engine = token_ids("input_ids", input_ids), engine or default_engine(model)
    if input_ids.shape[0] < 2 or isinstance(engine, CapturedEngine):
        steps = generate_steps(
            model, input_ids, attention_mask, max_new_tokens=max_new_tokens, params=params, seed=seed,
            eos_token_ids=ends, pad_token_id=pad_token_id, engine=engine,
        )  # fmt: skip
        return torch.cat([input_ids, *(tokens[:, None].to(input_ids.device) for tokens in steps)], dim=1)

    # A batch whose rows leave the work as they end.
    prompt, lengths, seeds = _checked(model, input_ids, attention_mask, max_new_tokens, params, seed)
    if max_new_tokens == 0:
        return input_ids
    rows = [ids[:length] for ids, length in zip(prompt.tolist(), lengths.tolist(), strict=True)]
    new = dict(
        generate_many(
            model, rows, max_new_tokens=max_new_tokens, params=params, seed=seeds, eos_token_ids=ends,
            slots=len(rows), engine=engine,
        )
    )  # fmt: skip
    longest = max(map(len, new.values()))
    padded = [new[row] + [pad_token_id] * (longest - len(new[row])) for row in range(len(rows))]
    return torch.cat([input_ids, torch.tensor(padded, dtype=torch.int64, device=input_ids.device)], dim=1)


def _checked(
    model: SmolLM2ForCausalLM,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | Sequence[Sequence[int]] | None,
    max_new_tokens: int,
    params: SamplingParams,
    seed: int | Sequence[int],
) -> tuple[Tensor, Tensor, list[int]]:
    """The rows' tokens moved to the front: ids [B, T] with anything behind, lengths [B], and each row's seed.

    Raises UsageError for whatever `generate` cannot continue.
    """
    input_ids = token_ids("input_ids", input_ids)
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        attention_mask = token_ids("attention_mask", attention_mask).to(input_ids.device)
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens: expected a number >= 0, got {max_new_tokens}")
    batch, limit = len(input_ids), model.config.max_position_embeddings
    seeds = [seed + row for row in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise UsageError(f"seed: expected one number or {batch} of them, one per row, got {len(seeds)}")
    params.validate(model.config.vocab_size)
    if attention_mask is None:
        prompt = real = input_ids
        lengths = torch.full((batch,), input_ids.shape[1], dtype=torch.int64, device=input_ids.device)
    elif attention_mask.shape == input_ids.shape:
        mask = attention_mask.bool()
        order = torch.argsort(~mask, dim=1, stable=True)
        prompt, lengths, real = (input_ids * mask).gather(1, order), mask.sum(1), input_ids[mask]
    else:
        expected = f"expected shape {list(input_ids.shape)} as input_ids"
        raise UsageError(f"attention_mask: {expected}, got {list(attention_mask.shape)}")
    if not bool(lengths.all()):
        hint = "start from the beginning-of-text token"
        raise UsageError(f"prompt: expected at least one token in every row, got an empty one; {hint}")
    if real.numel():
        model.config.check_ids("input_ids", *(int(bound) for bound in real.aminmax()))
    longest = int(lengths.max()) if batch else 0
    if longest + max_new_tokens > limit:
        raise UsageError(
            f"prompt and new tokens: expected at most {limit} together, got {longest} + {max_new_tokens}; "
            "shorten the prompt or lower max_new_tokens"
        )
    return prompt, lengths, seeds


def stream_text(
    model: SmolLM2ForCausalLM,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    params: SamplingParams,
    seed: int = 0,
    stop: Sequence[str] = (),
    engine: Engine | None = None,
    draft: Draft | None = None,
    stats: Stats | None = None,
    prompt_cache: PromptCache | None = None,
) -> TextStream:
    """The continuation of one prompt as text, piece by piece, up to a stop token (the model's and the
    tokenizer's, see `Tokenizer.end_ids`) or string, not included.

    draft guesses ahead (smollm2/generation/speculative.py): fewer steps, which stats count, and in fp32 the
    same text. prompt_cache: as in `generate_steps`.
    """
    ends = tokenizer.end_ids(model.config.vocab_size, *model.config.eos_token_ids)
    input_ids = torch.tensor([list(prompt_ids)], dtype=torch.int64)
    if draft is None:
        steps = generate_steps(
            model, input_ids, max_new_tokens=max_new_tokens, params=params, seed=seed, eos_token_ids=ends,
            engine=engine, prompt_cache=prompt_cache,
        )  # fmt: skip
        runs: Iterator[list[int]] = ([int(step[0])] for step in steps)
    else:
        runs = speculative_steps(
            model, input_ids, draft=draft, max_new_tokens=max_new_tokens, params=params, seed=seed,
            eos_token_ids=ends, engine=engine, stats=stats, prompt_cache=prompt_cache,
        )  # fmt: skip
    return TextStream(runs, TextPieces(tokenizer, ends, stop))
