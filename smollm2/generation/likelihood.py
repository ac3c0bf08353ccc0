"""How likely a model finds given continuations of given contexts.

    scores = log_likelihoods(model, [(context_ids, continuation_ids), ...])   # (ln p, is it greedy), in order

The answers to a question share its text: it is read once, and each answer then reads on from copies of its
keys and values. Texts of similar length are read together. Only the positions that predict a token of a
continuation go through the head, which has a fifth of all weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smollm2.engine.eager import Engine, outside_autocast
from smollm2.errors import UsageError
from smollm2.layers import Cache
from smollm2.model import SmolLM2ForCausalLM
from smollm2.projections import apply

BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}  # read at once; what more would gain, the memory takes
SHARED = 16  # tokens of a context from which on several continuations read it once
HEAD_ROWS = 256  # positions at once: their logits are 50 MB with SmolLM2's vocabulary
ENGINE_TOKENS = 512  # of a step of an engine, which makes the logits of all of them


class Likelihood(NamedTuple):
    """Of a continuation: ln p in nats, and whether each of its tokens is the most likely one at its place."""

    nats: float
    is_greedy: bool


@dataclass(frozen=True)
class _Answer:
    """A continuation: its first tokens are predicted by the text before it, the others by `tail`."""

    index: int
    tokens: list[int]
    tail: list[int]


@dataclass(frozen=True)
class _Text:
    """What is read once, and the continuations that it predicts or that read on from it."""

    ids: list[int]
    answers: list[_Answer]

    @property
    def width(self) -> int:
        return len(self.ids) + max(len(answer.tail) for answer in self.answers)


def log_likelihoods(
    model: SmolLM2ForCausalLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    engine: Engine | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> list[Likelihood]:
    """ln p(continuation | context) of every pair of token ids, neither of which is empty.

    What is read of a pair, all but its last token, is cut from the left to max_length tokens (default: the
    positions of the model). batch_size: most pairs at once; by default as many as fill the device. engine:
    all is read by its decode steps, one pair at a time, so that what is scored are the weights that generate
    (int8, say). report(n) is told that n more pairs are done. Raises UsageError, naming the pair, for empty
    parts, continuations longer than max_length and ids out of range.
    """
    limit = max_length or model.config.max_position_embeddings
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or not 1 <= len(continuation) <= limit:
            expected = f"expected at least one token of context and 1 to {limit} of continuation"
            raise UsageError(f"pair {index}: {expected}, got {len(context)} and {len(continuation)}")
        model.config.check_ids(f"pair {index}", *_bounds(context, continuation))
    found: dict[int, Likelihood] = {}
    batches = _batches(list(_texts(pairs, limit, share=engine is None)), batch_size, model.device)
    with torch.inference_mode(), outside_autocast(model.device):
        for batch in [[text] for texts in batches for text in texts] if engine else batches:
            read = _score(model, batch) if engine is None else _score_by_engine(engine, batch[0])
            found.update(read)
            report(len(read))
    return [found[index] for index in range(len(pairs))]


def _bounds(*parts: Sequence[int]) -> tuple[int, int]:
    return min(map(min, parts)), max(map(max, parts))


def _texts(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], limit: int, share: bool) -> Iterator[_Text]:
    """The pairs, those of one context together."""
    groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (context, continuation) in enumerate(pairs):
        # Cut to the limit, continuations of one context no longer share what is left of it.
        whole = share and SHARED <= len(context) and len(context) + len(continuation) <= limit + 1
        groups[tuple(context) if whole else (-1, index)].append(index)
    for group in groups.values():
        context = list(pairs[group[0]][0])
        if len(group) > 1:
            tokens = [list(pairs[index][1]) for index in group]
            yield _Text(context, [_Answer(*one, one[1][:-1]) for one in zip(group, tokens, strict=True)])
        else:
            continuation = list(pairs[group[0]][1])
            yield _Text((context + continuation)[-limit - 1 : -1], [_Answer(group[0], continuation, [])])


def _batches(texts: list[_Text], batch_size: int | None, device: torch.device) -> Iterator[list[_Text]]:
    """Texts of similar length, the longest first, so that a lack of memory shows at once."""
    tokens = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    # Those that are read on from are padded on the other side.
    texts.sort(key=lambda text: (len(text.answers) > 1, text.width, text.ids), reverse=True)
    batch: list[_Text] = []
    rows = width = 0
    for text in texts:
        rows += len(text.answers)
        width = max(width, text.width)
        full = rows > batch_size if batch_size else rows * width > tokens
        if batch and (full or (len(text.answers) > 1) != (len(batch[0].answers) > 1)):
            yield batch
            batch, rows, width = [], len(text.answers), text.width
        batch.append(text)
    if batch:
        yield batch


def _score(model: SmolLM2ForCausalLM, batch: Sequence[_Text]) -> dict[int, Likelihood]:
    """Reads the texts of a batch, then the tails of their answers behind them."""
    device, width = model.device, max(len(text.ids) for text in batch)
    shared = len(batch[0].answers) > 1
    # Texts end together where others read on, and begin together elsewhere: that needs no mask.
    pads = [width - len(text.ids) if shared else 0 for text in batch]
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, (text, pad) in enumerate(zip(batch, pads, strict=True)):
        ids[row, pad : pad + len(text.ids)] = torch.tensor(text.ids)
    doc_start = None
    if any(pads):
        first = torch.tensor(pads, dtype=torch.int32)[:, None]
        doc_start = torch.where(torch.arange(width) < first, 0, first).to(device)
    caches = _caches(model, len(batch), width) if shared else None
    hidden = model.model(ids.to(device), doc_start, dtype=model.compute_dtype, cache=caches)
    rows: list[int] = []
    places: list[int] = []
    targets: list[list[int]] = []
    for row, (text, pad) in enumerate(zip(batch, pads, strict=True)):
        for answer in text.answers:
            count = len(answer.tokens) - len(answer.tail)
            rows += [row] * count
            places += range(pad + len(text.ids) - count, pad + len(text.ids))
            targets.append(answer.tokens[:count])
    parts = [hidden[torch.tensor(rows, device=device), torch.tensor(places, device=device)]]

    answers = [(row, one) for row, text in enumerate(batch) for one in text.answers]
    tails = [(row, one) for row, one in answers if one.tail]
    if caches is not None and tails:
        longest = max(len(one.tail) for _, one in tails)
        ids = torch.zeros(len(tails), longest, dtype=torch.int64)
        for place, (_, one) in enumerate(tails):
            ids[place, : len(one.tail)] = torch.tensor(one.tail)
        source = torch.tensor([row for row, _ in tails], device=device)
        behind = _caches(model, len(tails), width + longest)
        for read, new in zip(caches, behind, strict=True):
            new.keys[:, :width] = read.keys[source]
            new.values[:, :width] = read.values[source]
        doc_start = torch.tensor([pads[row] for row, _ in tails], dtype=torch.int32, device=device)
        doc_start = doc_start[:, None].expand(-1, longest)
        hidden = model.model(ids.to(device), doc_start, dtype=model.compute_dtype, cache=behind)
        used = torch.arange(longest) < torch.tensor([len(one.tail) for _, one in tails])[:, None]
        parts.append(hidden[used.to(device)])
        targets += [one.tokens[-len(one.tail) :] for _, one in tails]
    owners = [one.index for _, one in answers] + [one.index for _, one in tails]
    return _sums(owners, targets, *_judge(model, torch.cat(parts), targets))


def _caches(model: SmolLM2ForCausalLM, rows: int, width: int) -> list[Cache]:
    config, dtype = model.config, model.compute_dtype or model.dtype
    shape = rows, width, config.num_key_value_heads, config.head_dim
    return [
        Cache(*(torch.empty(shape, dtype=dtype, device=model.device) for _ in range(2)))
        for _ in range(config.num_hidden_layers)
    ]


def _judge(model: SmolLM2ForCausalLM, hidden: Tensor, targets: list[list[int]]) -> tuple[Tensor, Tensor]:
    """hidden [N, hidden], which predict N tokens -> their ln p [N] and whether they are the most likely."""
    tokens = torch.tensor([token for part in targets for token in part], device=hidden.device)
    parts = zip(hidden.split(HEAD_ROWS), tokens.split(HEAD_ROWS), strict=True)
    judged = [_judge_logits(apply(model.lm_head, rows).float(), some) for rows, some in parts]
    return torch.cat([nats for nats, _ in judged]), torch.cat([best for _, best in judged])


def _judge_logits(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V] in fp32 and tokens [N] -> ln p [N] and whether each is the most likely [N]."""
    # The function that lm_eval's own models call: on a CPU it is off by 2e-5 nats, and so are their scores.
    nats = F.log_softmax(logits, dim=1).gather(1, tokens[:, None])[:, 0]
    return nats, logits.argmax(1) == tokens


def _sums(owners: list[int], targets: list[list[int]], nats: Tensor, best: Tensor) -> dict[int, Likelihood]:
    """What the parts of every continuation come to."""
    sizes = [len(part) for part in targets]
    found: dict[int, Likelihood] = {}
    parts = zip(owners, nats.double().cpu().split(sizes), best.cpu().split(sizes), strict=True)
    for owner, part, are_best in parts:
        before = found.get(owner, Likelihood(0.0, True))
        found[owner] = Likelihood(before.nats + part.sum().item(), before.is_greedy and bool(are_best.all()))
    return found


def _score_by_engine(engine: Engine, text: _Text) -> dict[int, Likelihood]:
    """The same by decode steps over the text and its only answer."""
    (answer,), length, device = text.answers, len(text.ids), engine.model.device
    ids, first = torch.tensor([text.ids], device=device), length - len(answer.tokens)
    tokens = torch.tensor(answer.tokens, device=device)
    cache = engine.allocate(1, length)
    judged = []
    for start in range(0, length, ENGINE_TOKENS):
        stop = min(start + ENGINE_TOKENS, length)
        logits = engine.decode(ids[:, start:stop], cache)[0, max(first - start, 0) :]
        if len(logits):
            judged.append(_judge_logits(logits, tokens[max(start - first, 0) : stop - first]))
    nats, best = (torch.cat(parts) for parts in zip(*judged, strict=True))
    return _sums([answer.index], [answer.tokens], nats, best)
