"""Tokenizers from and to files: folders that transformers opens, GGUF files, and what broken ones give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smollm2.errors import LoadError
from smollm2.pretrained.load import load_tokenizer
from smollm2.pretrained.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    "Hello, world! It's 2024; we'll pay $1,234.50 (don't ask).",
    "def f(x):\n\treturn {'a': x ** 2}  # 🦊 naïve 東京\n\n\n",
    "<|im_start|>user\nHi<|im_end|>  trailing   spaces  ",
    "½ ²  Ⅷ ٣٤ 𝟘𝟙 x\u00a0y\r\n",
]


@pytest.fixture(scope="module")
def trained():
    tokenizer = train_tokenizer(TEXTS * 10, 350)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


@pytest.fixture
def folder(trained, tmp_path):
    trained.save(tmp_path)
    return tmp_path


def assert_same_tokenizer(first: Tokenizer, second: Tokenizer) -> None:
    assert first.encode_batch(TEXTS) == second.encode_batch(TEXTS)
    assert first.encode_batch(TEXTS, special=False) == second.encode_batch(TEXTS, special=False)
    for name in ("special_tokens", "special_ids", "vocab_size", "chat_template"):
        assert getattr(first, name) == getattr(second, name)
    assert first.fingerprint() == second.fingerprint()


def test_save_and_load_give_the_same_tokenizer(trained, folder):
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert_same_tokenizer(trained, load_tokenizer(folder))


@pytest.mark.parametrize("auto", [True, False])
def test_transformers_opens_the_folder_and_agrees(trained, folder, auto):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    kind = transformers.AutoTokenizer if auto else transformers.PreTrainedTokenizerFast
    theirs = kind.from_pretrained(folder)
    assert theirs(TEXTS)["input_ids"] == trained.encode_batch(TEXTS)
    for ids in trained.encode_batch(TEXTS):
        assert theirs.decode(ids) == trained.decode(ids)
        assert theirs.decode(ids, skip_special_tokens=True) == trained.decode(ids, skip_special_tokens=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, None)
    messages = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == trained.apply_chat_template(messages)


def test_what_transformers_saves_we_load(trained, folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    loaded = load_tokenizer(tmp_path / "theirs")
    assert loaded.encode_batch(TEXTS) == trained.encode_batch(TEXTS)
    assert loaded.special_tokens == trained.special_tokens
    assert loaded.chat_template == trained.chat_template


def test_special_tokens_are_read_in_every_spelling(folder):
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": None, "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    others = {"eos_token": "<|im_end|>", "bos_token": "ignored: the configuration comes first"}
    (folder / "special_tokens_map.json").write_text(json.dumps(others))
    loaded = load_tokenizer(folder)
    ids = [getattr(loaded, f"{role}_token_id") for role in ("bos", "eos", "pad", "eot")]
    assert ids == [1, 2, None, 0]
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    assert load_tokenizer(folder).special_tokens == {}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("one", "one"),
        ([{"name": "default", "template": "two"}, {"name": "tools", "template": "x"}], "two"),
        (None, None),
    ],
)
def test_chat_template_in_every_spelling(folder, entry, expected):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    assert load_tokenizer(folder).chat_template == expected
    (folder / "chat_template.jinja").write_text("{{ from a file }}")
    assert load_tokenizer(folder).chat_template == "{{ from a file }}"


def test_limits_of_a_trainer_are_not_inherited(trained, folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = dict(strategy="BatchLongest", direction="Right", pad_id=0, pad_type_id=0)
    data["padding"] = {**padding, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert load_tokenizer(folder).encode_batch(TEXTS) == trained.encode_batch(TEXTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"expected a tokenizer \(tokenizer\.json\), found none"),
        ("tokenizer.json", '{"version": "1.0", "model"', r"tokenizer\.json: not a readable tokenizer"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a readable tokenizer"),
        ("tokenizer.json", '{"version": "' + "x" * 9999, r"tokenizer\.json: not a readable tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not a readable JSON file"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', r"eos_token '</s>' is not in the vocabulary"),
        ("tokenizer_config.json", '{"eos_token": {}}', r"eos_token 'None' is not in the vocabulary"),
        (
            "tokenizer_config.json",
            '{"eos_token": "\\ud800"}',
            r"eos_token '.*ud800' is not in the vocabulary",
        ),
    ],
)
def test_broken_folders_are_reported(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(LoadError, match=message) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)


def tokenizer_metadata(tokenizer: Tokenizer, pre: str = "smollm") -> dict[str, Any]:
    """What a converter writes into a GGUF file for this tokenizer."""
    data = json.loads(tokenizer._backend.to_str())
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    parts = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": [" ".join(merge) for merge in data["model"]["merges"]],
        "token_type": [3 if index in tokenizer.special_ids else 1 for index in range(len(tokens))],
        "bos_token_id": 0, "eos_token_id": 0, "unknown_token_id": 0, "padding_token_id": None,
    }  # fmt: skip
    metadata = {f"tokenizer.ggml.{key}": value for key, value in parts.items()}
    return {**metadata, "tokenizer.chat_template": tokenizer.chat_template}


@pytest.fixture
def write_gguf(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    import gguf_files

    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "cache"))

    def write(metadata: dict[str, Any]) -> Path:
        gguf_files.write_gguf(tmp_path / "model.gguf", metadata=metadata)
        return tmp_path / "model.gguf"

    return write


@pytest.mark.parametrize("cached", [True, False])
def test_a_gguf_file_gives_the_same_tokenizer(trained, write_gguf, cached, tmp_path, monkeypatch):
    path = write_gguf(tokenizer_metadata(trained))
    if not cached:
        (tmp_path / "occupied").write_text("")
        monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "occupied"))
    assert_same_tokenizer(trained, load_tokenizer(path))


def test_gpt2s_pre_tokenizer_keeps_digits_together(trained, write_gguf):
    metadata = tokenizer_metadata(trained, "gpt-2")
    metadata["tokenizer.ggml.tokens"] += ["12"]
    metadata["tokenizer.ggml.token_type"] += [1]
    metadata["tokenizer.ggml.merges"] += ["1 2"]
    assert load_tokenizer(write_gguf(metadata)).encode("12") == [350]


def test_user_defined_tokens_are_found_in_text_but_are_not_special(trained, write_gguf):
    metadata = tokenizer_metadata(trained)
    metadata["tokenizer.ggml.tokens"] += ["<fact>"]
    metadata["tokenizer.ggml.token_type"] += [4]
    loaded = load_tokenizer(write_gguf(metadata))
    assert loaded.encode("<fact>") == [350] and 350 not in loaded.special_ids
    assert loaded.decode([350], skip_special_tokens=True) == "<fact>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "of kind gpt2/smollm or gpt2/gpt-2, got llama/smollm"),
        ({"tokenizer.ggml.pre": "qwen2"}, "got gpt2/qwen2"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "the merges of the tokenizer do not fit its tokens"),
        ({"tokenizer.ggml.merges": None}, r"\d+ tokens of the tokenizer have no merge that makes them"),
        ({"tokenizer.ggml.tokens": ["a"] * 350}, "349 tokens of the tokenizer occur twice"),
        ({"tokenizer.ggml.tokens": None}, "metadata tokenizer.ggml.tokens missing"),
    ],
)
def test_a_gguf_file_without_a_usable_tokenizer_still_has_weights(trained, write_gguf, changes, message):
    from smollm2.pretrained.load import load_model

    path = write_gguf({**tokenizer_metadata(trained), **changes})
    assert load_model(path, "torch").config.vocab_size == 300
    with pytest.raises(LoadError, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize("kept", [0.5, -1])
def test_merges_cut_short_are_noticed(trained, write_gguf, kept):
    metadata = tokenizer_metadata(trained)
    merges = metadata["tokenizer.ggml.merges"]
    metadata["tokenizer.ggml.merges"] = merges[: int(kept * len(merges)) if kept > 0 else kept]
    with pytest.raises(LoadError, match="have no merge that makes them.*convert the model again"):
        load_tokenizer(write_gguf(metadata))


def test_tokens_that_no_text_holds_in_one_piece_need_no_merge(trained, write_gguf):
    metadata = tokenizer_metadata(trained)
    metadata["tokenizer.ggml.tokens"] += ["<unused0>"]
    metadata["tokenizer.ggml.token_type"] += [1]
    assert len(load_tokenizer(write_gguf(metadata))) == 351


@pytest.mark.parametrize("place", ["vocabulary", "added token"])
def test_an_id_beyond_the_size_of_the_file_is_refused(folder, place):
    """Tables have an entry for every id: this one would take gigabytes."""
    data = json.loads((folder / "tokenizer.json").read_text())
    if place == "vocabulary":
        data["model"]["vocab"]["a token"] = 2**31
    else:
        data["added_tokens"].append({**data["added_tokens"][0], "id": 2**31, "content": "<|far|>"})
        data["model"]["vocab"]["<|far|>"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(LoadError, match=r"tokenizer\.json: expected token ids below 1048576, got 2147483648"):
        load_tokenizer(folder)
