"""`python -m smollm2.perplexity --model M text.txt`: how well a model predicts a text, in nats, perplexity
and bits per byte. With `--compare int8,int4` what those weights cost in quality.

A text longer than the window is cut into windows that begin `stride` tokens apart, as in Hugging Face's guide
to perplexity. Each scores the tokens that the one before did not reach, so that every token but the first is
scored once, with at least window - stride tokens of context from the second window on. A small stride is the
better estimate, and costs window / stride times the work. The average is over scored tokens, not over
windows.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smollm2.cli import Parser, load, run_command
from smollm2.engine.eager import Engine
from smollm2.engine.eager_step import plain_weights
from smollm2.engine.quantized import KINDS, QuantizedEngine
from smollm2.engine.select import select_engine
from smollm2.errors import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.load import load_model, load_tokenizer
from smollm2.pretrained.text import decode_text
from smollm2.projections import apply, is_plain

WINDOW = 1024
DECODE_TOKENS = 16  # what one decode step of an engine takes
COMPARED = ("bf16", *KINDS)
COMPARE_WINDOW, COMPARE_TOKENS = 512, 2048  # of the text that --compare has without one


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
        counts = self.tokens + other.tokens, self.scored + other.scored, self.windows + other.windows
        return Score(self.nats + other.nats, *counts, size)


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
        least = "expected at least 2 tokens, of which all but the first are scored"
        raise UsageError(f"text: {least}, got {list(ids.shape)}")
    if not 2 <= window <= limit:
        raise UsageError(
            f"window: expected a number from 2 to {limit}, the positions of the model, got {window}"
        )
    if not 1 <= stride <= window:
        raise UsageError(f"stride: expected a number from 1 to {window}, the window, got {stride}")
    model.config.check_ids("text", *(int(bound) for bound in ids.aminmax()))

    ids = ids.to(model.device)
    spans = list(windows(len(ids), window, stride))
    scored = 0
    total = torch.zeros((), dtype=torch.float64)
    for begin, first, end in spans:
        window_ids, unscored = ids[begin:end], first - begin
        losses = (
            _engine_losses(engine, window_ids, unscored) if engine else _losses(model, window_ids, unscored)
        )
        total += losses.sum(dtype=torch.float64).cpu()
        scored += end - first
    nats = total.item()
    if not math.isfinite(nats):
        hint = "use another dtype, or check the weights with smollm2.doctor"
        raise UsageError(f"score: expected a finite number, got {nats}; {hint}")
    return Score(nats, len(ids), scored, len(spans))


@torch.inference_mode()
def _losses(model: SmolLM2ForCausalLM, ids: Tensor, first: int) -> Tensor:
    """-ln p of the tokens ids[first:] given those before them: [N - first] fp32."""
    hidden = model.model(ids[None], dtype=model.compute_dtype)[0, first - 1 : -1]
    if not is_plain(model.lm_head):
        return F.cross_entropy(apply(model.lm_head, hidden).float(), ids[first:], reduction="none")
    return model.backend.linear_cross_entropy(hidden, model.lm_head.weight, ids[first:], reduction="none")


@torch.inference_mode()
def _engine_losses(engine: Engine, ids: Tensor, first: int) -> Tensor:
    """The same by prefill of the context and decode steps over what is scored but for the last token."""
    cache = engine.allocate(1, len(ids))
    logits = [engine.prefill(ids[None, :first], torch.tensor([first], device=ids.device), cache)]
    losses = [F.cross_entropy(logits[0].float(), ids[first : first + 1], reduction="none")]
    for start in range(first, len(ids) - 1, DECODE_TOKENS):
        stop = min(start + DECODE_TOKENS, len(ids) - 1)
        step = engine.decode(ids[None, start:stop], cache)[0]
        losses.append(F.cross_entropy(step.float(), ids[start + 1 : stop + 1], reduction="none"))
    return torch.cat(losses)


class Quality(NamedTuple):
    """How well weights of one kind predict a text."""

    kind: str
    nats: float  # per token: the logarithm of the perplexity
    agreement: float  # share of positions where the most likely next token is that of fp32
    bytes: int  # of all matrices as often as a token reads them: the head once, the embedding not at all


def compare(source: str | Path, kinds: Sequence[str], windows: Tensor) -> list[Quality]:
    """fp32 and kinds of COMPARED of one source on the same token windows [B, T], on the CPU.

    Every window is one decode step of the engine that generates with these weights. Raises UsageError for
    windows longer than the model's positions.
    """
    found: list[Quality] = []
    expected = torch.empty(0)
    for kind in ("fp32", *kinds):
        model = load_model(source, "torch", "cpu", "fp32" if kind == "fp32" else "bf16")
        limit = model.config.max_position_embeddings
        if windows.shape[1] > limit:
            bounds = f"from 2 to {limit}, the positions of the model"
            raise UsageError(f"--window: expected a number {bounds}, got {windows.shape[1]}")
        quantized = QuantizedEngine(model, kind) if kind in KINDS else None
        engine, weights = quantized or Engine(model), quantized.few if quantized else plain_weights(model)
        losses, choices = [], []
        for window in windows.split(1):  # one at a time: the logits of 512 tokens are 100 MB
            logits = engine.decode(window, engine.allocate(1, window.shape[1]))[0, :-1]
            losses.append(F.cross_entropy(logits, window[0, 1:], reduction="none"))
            choices.append(logits.argmax(-1))
        chosen = torch.cat(choices)
        expected = expected if found else chosen
        agreement = (chosen == expected).double().mean().item()
        parts = [(matrix,) if isinstance(matrix, Tensor) else matrix for matrix in weights.matrices()]
        size = sum(part.nbytes for matrix in parts for part in matrix)
        found.append(Quality(kind, torch.cat(losses).mean().item(), agreement, size))
    return found


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m smollm2.perplexity",
        description="How well a model predicts a text; each file is a text of its own.",
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="text files in UTF-8; - is standard input")
    add("--text", action="append", default=[], metavar="TEXT", help="a text given here; may be repeated")
    parser.add("--model")
    words = f"tokens that the model sees at once ({WINDOW}, or as many positions as it has)"
    add("--window", type=int, metavar="N", help=words)
    add("--stride", type=int, metavar="N", help="tokens from one window to the next (half the window)")
    parser.add("--device", "--dtype", "--backend", "--quantize")
    words = "print a table of fp32 and, say, bf16,int8,int4; without a text, for Python's language reference"
    add("--compare", metavar="KINDS", help=words)
    add("--json", action="store_true", help="print one JSON object")
    parser.add("--debug")
    args = parser.parse_args(argv)
    if not args.files and not args.text and not args.compare:
        raise UsageError("text: expected files, - for standard input, or --text, got none")
    texts = [
        *((name, _read(name)) for name in args.files),
        *((f"--text {index}", text) for index, text in enumerate(args.text, 1)),
    ]
    for name, text in texts:
        if not text:
            raise UsageError(f"{name}: expected some text, got none")
    if args.compare:
        refused = "stride", "dtype", "backend", "quantize", "json"
        given = [name for name in refused if getattr(args, name) != parser.get_default(name)]
        if given:
            raise UsageError(f"--compare: cannot be combined with --{given[0]}")
        if args.device not in ("auto", "cpu"):
            raise UsageError(f"--compare: runs on the CPU, got --device {args.device}")
        return _print_comparison(args, texts)

    model, tokenizer = load(args), load_tokenizer(args.model)
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
        scores[name] = replace(score, size=len(text.encode()))
    total = sum(list(scores.values())[1:], next(iter(scores.values())))
    if args.json:
        dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
        options = {"model": args.model, "dtype": dtype, "quantize": args.quantize}
        parts = [{"text": name, **_record(score)} for name, score in scores.items()]
        record = {**options, "window": window, "stride": stride, **_record(total), "texts": parts}
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return 0
    for name, score in scores.items() if len(scores) > 1 else ():
        figures = f"{score.nats_per_token:.4f} nats/token, {score.bits_per_byte:.4f} bits/byte"
        print(f"{name}: {figures}, {score.tokens:,} tokens")
    print(f"nats/token  {total.nats_per_token:.4f}")
    print(f"perplexity  {total.perplexity:.3f}")
    print(f"bits/byte   {total.bits_per_byte:.4f}")
    print(f"tokens      {total.tokens:,}, {total.scored:,} scored; {total.size:,} bytes")
    print(f"windows     {total.windows:,} of {window:,} tokens, stride {stride:,}")
    return 0


def _print_comparison(args: argparse.Namespace, texts: Sequence[tuple[str, str]]) -> int:
    """The table of --compare, on as many windows as the texts fill."""
    kinds = args.compare.split(",")
    for kind in kinds:
        if kind not in COMPARED:
            raise UsageError(f"--compare: expected some of {', '.join(COMPARED)}, got {kind!r}")
    tokenizer, window = load_tokenizer(args.model), COMPARE_WINDOW if args.window is None else args.window
    name, most = ", ".join(name for name, _ in texts), None
    if not texts:  # Python's own language reference: a text that is everywhere
        topics, most = importlib.import_module("pydoc_data.topics").topics, COMPARE_TOKENS
        name = f"pydoc_data.topics of Python {sys.version.split()[0]}"
        texts = [(name, "\n".join(topics[topic] for topic in sorted(topics))[: 16 * most])]
    ids = [token for _, text in texts for token in tokenizer.encode(text, special=False)][:most]
    if window < 2 or len(ids) < window:
        bounds = f"from 2 to {len(ids)}, the tokens of the text"
        raise UsageError(f"--window: expected a number {bounds}, got {window}")
    ids = ids[: len(ids) // window * window]
    digest = hashlib.sha256(repr(ids).encode()).hexdigest()[:8]
    rows = compare(args.model, kinds, torch.tensor(ids).view(-1, window))
    print(f"{args.model}: {len(ids) // window} windows of {window} tokens of {name} (ids {digest})")
    print("weights   nats/token   perplexity   same top token as fp32   MB read per token")
    for row in rows:
        quality = f"{row.nats:13.4f}{math.exp(row.nats):13.3f}{100 * row.agreement:23.2f} %"
        print(f"{row.kind:7}{quality}{row.bytes / 1e6:20.1f}")
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
        hint = "to score the words themselves, use --text"
        raise LoadError(f"{name}: cannot be read ({error.strerror}); {hint}") from None
    return decode_text(content, name)


if __name__ == "__main__":
    sys.exit(run_command(main))
