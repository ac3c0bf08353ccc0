"""Text, ids and bytes: round trips, special tokens, the chat template, training, and what is refused."""

from __future__ import annotations

import json
import pydoc_data.topics
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.errors import UsageError
from smollm2.pretrained.tokenizer import Tokenizer, train_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def quick_sort(numbers: list[int]) -> list[int]:\n    return sorted(numbers)\n",
    "In 1969, 600 million people watched; 12 walked there. ½ of π is 1.5708.",
    "naïve café — 東京 — Привет — 🦊🌍 don't we'll I'm",
] * 20
TEXTS = [
    *CORPUS[:4],
    *("", " ", "\n\n\t  x", "1234567890"),
    "👩‍👩‍👧‍👦 e\u0301 \u0000\x04\uffff\U0010ffff",
    "a" * 2000,
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, 400)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids) == text.encode()
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_every_text_survives_as_ordinary_text(tokenizer, text):
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids.intersection(ids)


def test_digits_are_single_tokens_and_words_keep_their_space(tokenizer):
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("1969")] == [b"1", b"9", b"6", b"9"]
    assert tokenizer.encode("the the")[-1] != tokenizer.encode("the")[0]
    assert [tokenizer.decode([i]) for i in tokenizer.encode(" the dog")] == [" the", " dog"]


def test_special_tokens_of_a_trained_tokenizer(tokenizer):
    assert tokenizer.special_ids == {0, 1, 2}
    ids = [getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "eot")]
    assert ids == [0, 0, None, 0]
    assert tokenizer.vocab_size == len(tokenizer) == 400
    first, second = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode("a<|im_start|>b<|endoftext|>") == [*first, 1, *second, 0]
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    assert tokenizer.decode([0, *tokenizer.encode("dog"), 2], skip_special_tokens=True) == "dog"
    assert tokenizer.decode([0, *tokenizer.encode("dog"), 2]) == "<|endoftext|>dog<|im_end|>"


def test_special_strings_can_be_read_as_ordinary_text(tokenizer):
    ids = tokenizer.encode("<|im_end|>", special=False)
    assert 2 not in ids and len(ids) > 1
    assert tokenizer.decode(ids) == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [2], "the choice lasts for one call"


def test_a_batch_is_each_text_alone(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_a_character_cut_in_two_is_a_replacement_character(tokenizer):
    ids = tokenizer.encode("🧊")
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:1])


def test_ids_out_of_range_are_refused(tokenizer):
    for token_id in (-1, 400, 2**40):
        for call in (lambda i: tokenizer.decode([1, i]), tokenizer.token_bytes):
            with pytest.raises(UsageError, match=rf"expected token ids in \[0, 400\), got {token_id}"):
                call(token_id)


def test_text_that_utf8_cannot_hold_is_refused(tokenizer):
    long = "x" * 500
    for text, part in (
        ("half a pair: \ud83d", r"'half a pair: \\ud83d'"), ("\udcff", r"'\\udcff'"),
        (f"{long}\udcff{long}", r"'x{20}\\udcffx{20}'"), (3, "int"), (None, "NoneType"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"^tokenizer: expected text that UTF-8 can encode, got {part}$"):
            tokenizer.encode(text)


def test_training_is_reproducible_and_honours_the_size():
    first, second = (train_tokenizer(iter(CORPUS), 300) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    assert first.vocab_size == 300
    assert train_tokenizer(CORPUS, 310).fingerprint() != first.fingerprint()
    smallest = train_tokenizer(CORPUS, 259)
    assert smallest.vocab_size == 259
    assert sorted(smallest.token_bytes(i)[0] for i in range(3, 259)) == list(range(256))
    with pytest.raises(UsageError, match=r"vocab_size: expected at least 259 .*, got 258"):
        train_tokenizer(CORPUS, 258)
    assert 259 < train_tokenizer(["ab ab"], 5000).vocab_size < 300, (
        "a small corpus gives fewer than asked for"
    )


def test_words_without_end_cost_training_what_other_text_costs():
    """Uncut, a word of 100,000 letters took half a minute."""
    letters = random.Random(0).choices("ab", k=100_000)
    tokenizer = train_tokenizer(["a" * 100_000, "".join(letters), *CORPUS], 400)
    text = "".join(letters[:3000])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    data = json.loads(tokenizer.to_json())
    kinds = [part["type"] for part in data["pre_tokenizer"]["pretokenizers"]]
    assert kinds == ["Digits", "ByteLevel"], "encoding cuts no words"


def test_words_of_usual_length_are_learned_whole(monkeypatch):
    """The embedded corpus gives the tokenizer that it gave before words were cut."""
    texts = [text for text in pydoc_data.topics.topics.values()]
    found = train_tokenizer(texts, 1000)
    monkeypatch.setattr("smollm2.pretrained.tokenizer.LONGEST_WORD", 10**9)
    assert found.fingerprint() == train_tokenizer(texts, 1000).fingerprint()


CHATML = """{% for message in messages %}
    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + bos_token }}{% endif %}"""


def test_chat_template_is_rendered_as_transformers_does(tokenizer):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    ours = Tokenizer(tokenizer._backend, tokenizer.special_tokens, CHATML)
    parts = dict(tokenizer_object=tokenizer._backend, bos_token="<|endoftext|>")
    theirs = transformers.PreTrainedTokenizerFast(**parts)
    messages = [{"role": "user", "content": "Hi <b>&"}, {"role": "assistant", "content": "Hello"}]
    for prompt in (True, False):
        options = dict(add_generation_prompt=prompt)
        expected = theirs.apply_chat_template(messages, chat_template=CHATML, tokenize=False, **options)
        assert ours.apply_chat_template(messages, **options) == expected


def test_chat_templates_that_fail_give_one_line(tokenizer):
    with pytest.raises(UsageError, match="no chat template; use an instruct model"):
        tokenizer.apply_chat_template([])
    failures = {
        "{{ raise_exception('roles must alternate') }}": "roles must alternate",
        "{% for %}": "chat template: ",
        "{{ messages.append(1) }}": "chat template: ",  # the sandbox: messages cannot be changed
        "{{ ''.__class__.__mro__ }}": "chat template: ",
    }
    for template, message in failures.items():
        broken = Tokenizer(tokenizer._backend, {}, template)
        with pytest.raises(UsageError, match=message):
            broken.apply_chat_template([{"role": "user", "content": "Hi"}])
