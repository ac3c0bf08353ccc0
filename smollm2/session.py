"""What `generate` and `chat` share: flags, and the engine, tokenizer and sampling that they stand for."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import sys
import time
from dataclasses import dataclass

from smollm2.cli import Parser, load
from smollm2.engine.eager import Engine
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.generation.batch_file import check_stop
from smollm2.generation.speculative import MAX_ROWS, Draft, DraftModel, PromptLookup
from smollm2.pretrained.load import load_model, load_tokenizer
from smollm2.pretrained.text import decode_text
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


@dataclass(frozen=True)
class Session:
    """What a command generates with. draft: None where nothing guesses ahead."""

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams
    draft: Draft | None


def add_sampling(parser: Parser, unlimited: str = "no limit", **defaults: float | None) -> None:
    """Adds --model, how tokens are chosen, and where an answer stops. defaults: some in place of NUMBERS';
    unlimited: what None means, in words.
    """
    add = parser.add_argument
    parser.add("--model")
    for flag, metavar, usual, words in NUMBERS:
        default = defaults.get(flag.strip("-").replace("-", "_"), usual)
        add(
            flag,
            type=type(usual),
            default=default,
            metavar=metavar,
            help=f"{words} ({unlimited if default is None else default})",
        )
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be repeated")


def add_engine(parser: Parser) -> None:
    """Adds the flags of the engine, and of what guesses ahead."""
    add = parser.add_argument
    parser.add("--device", "--dtype", "--backend", "--quantize")
    words = "compile the decode step for this machine once (ten seconds); later runs use it"
    add("--compile", action="store_true", help=words)
    words = "speculative decoding: guess N tokens (1 to 15) from the text so far, check them in one step"
    add("--speculate", type=int, default=0, metavar="N", help=words)
    words = "guess with a smaller model of the same vocabulary: as many tokens as --speculate says, or 4"
    add("--draft", metavar="MODEL", help=words)


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for what needs no model to be seen wrong."""
    check_stop(args.stop)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: expected a number >= 1, got {args.max_new_tokens}")
    if not 0 <= args.speculate < MAX_ROWS:
        raise UsageError(f"--speculate: expected 0 (off) or 1 to {MAX_ROWS - 1} tokens, got {args.speculate}")


def open_session(args: argparse.Namespace) -> Session:
    """Loads what the flags ask for; with --verbose, says on stderr what was loaded and chosen."""
    began = time.perf_counter()
    model = load(args)
    tokenizer = load_tokenizer(args.model)
    engine = select_engine(model, quantize=args.quantize, compiled=True if args.compile else "auto")
    engine.frozen = True  # nothing here changes the weights
    draft: Draft | None = None
    if args.draft is not None:
        small = load_model(args.draft, model.backend, model.device, model.lm_head.weight.dtype)
        draft = DraftModel(select_engine(small), args.speculate or 4)
    elif args.speculate:
        draft = PromptLookup.suited_to(engine, args.speculate)
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
    return Session(engine, tokenizer, params, draft)


def note_greedy(args: argparse.Namespace) -> None:
    """Says on stderr which flags change nothing, because nothing is drawn."""
    only_drawing = "--seed", "--top-k", "--top-p", "--min-p"
    given = [
        flag
        for flag, _, usual, _ in NUMBERS
        if flag in only_drawing and getattr(args, flag[2:].replace("-", "_")) != usual
    ]
    if given and args.temperature == 0:
        names = f"{' and '.join(given)} {'change' if len(given) > 1 else 'changes'} nothing"
        hint = "which takes the most likely token; to sample, add --temperature 0.8"
        print(f"{names} at --temperature 0, {hint}", file=sys.stderr)


def note_unread_stdin() -> None:
    """Says on stderr that text waits on stdin which the command will not read, as it has a prompt already.

    It only looks: a loop of the shell may have more lines for others there.
    """
    import fcntl
    import termios

    with contextlib.suppress(OSError, ValueError):  # no file, or a device that cannot be asked
        descriptor = sys.stdin.fileno()
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            waiting = status.st_size - os.lseek(descriptor, 0, os.SEEK_CUR)
        elif stat.S_ISFIFO(status.st_mode):
            waiting = int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
        else:
            return
        if waiting > 0:
            hint = "leave the prompt out to use it"
            print(f"standard input is not read, as there is a prompt; {hint}", file=sys.stderr)


def read_stdin() -> str:
    """All of standard input. Raises LoadError for what is not UTF-8."""
    return decode_text(sys.stdin.buffer.read(), "standard input")
