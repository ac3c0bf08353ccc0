"""A file of prompts to a file of answers: what goes in, what comes out, and mistakes by their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from generation_cases import alone, captured_engine, pretend_to_capture, tiny_model, tiny_tokenizer

from smollm2.errors import LoadError, UsageError
from smollm2.generation.batch_file import check_paths, parse_prompts, run_file
from smollm2.sampling import SamplingParams

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARAMS = SamplingParams(temperature=1.0, top_k=50)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(vocab_size=tokenizer.vocab_size)


def write(path: Path, *lines: object) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def answers(model, tokenizer, prompts: Path, **options) -> list[dict]:
    """The lines of the output, in the order of the prompts."""
    output = prompts.with_suffix(".out")
    output.unlink(missing_ok=True)
    run_file(model, tokenizer, prompts, output, **{"params": PARAMS, "max_new_tokens": 12, **options})
    lines = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    return sorted(lines, key=lambda record: record["index"])


def test_each_answer_is_the_prompt_alone_with_its_own_seed_and_budget(model, tokenizer, tmp_path, capsys):
    prompts = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "the quick", "id": "first"},
        "",
        {"prompt": "brown fox", "seed": 77},
        {"prompt": "the lazy <|im_end|>", "max_new_tokens": 3, "category": 5},
    )
    found = answers(model, tokenizer, prompts, seed=40, slots=2)
    expected = [("first", "the quick", 40, 12), (1, "brown fox", 77, 12), (2, "the lazy <|im_end|>", 42, 3)]
    for record, (index, (identity, prompt, seed, new)) in zip(found, enumerate(expected), strict=True):
        tokens = alone(model, tokenizer.encode(prompt, special=False), PARAMS, seed, (0,), new)
        ended = tokens[-1] == 0
        text = b"".join(map(tokenizer.token_bytes, tokens[: len(tokens) - ended]))
        assert record == {
            "id": identity, "index": index, "prompt": prompt, "tokens": tokens,
            "finish_reason": "stop" if ended else "length", "text": text.decode(errors="replace"),
        }  # fmt: skip
    error, count = capsys.readouterr().err, sum(len(record["tokens"]) for record in found)
    assert "cache: 2 x " in error
    assert f"3 rows, {count} tokens in" in error and error.rstrip().endswith("tok/s")


def test_columns_of_a_data_set_are_named_once_and_ignored_and_null_is_absent(
    model, tokenizer, tmp_path, capsys
):
    rows = [
        {"prompt": "the quick", "category": 5, "temperature": None, "max_tokens": 3},
        {"prompt": "brown fox", "category": 6, "so\nurce": "x", "max_new_tokens": None, "seed": None},
    ]
    found = answers(model, tokenizer, write(tmp_path / "p.jsonl", *rows), seed=40)
    plain = [{"prompt": "the quick", "max_new_tokens": 3}, {"prompt": "brown fox"}]
    error = capsys.readouterr().err
    assert error.count("ignored") == 1 and error.splitlines()[0].endswith(
        "p.jsonl: keys that are ignored: 'category', 'so\\nurce'; "
        "a row may have prompt or messages, and id, seed, max_new_tokens"
    )
    assert found == answers(model, tokenizer, write(tmp_path / "plain.jsonl", *plain), seed=40)
    assert "ignored" not in capsys.readouterr().err


def test_a_captured_loop_writes_the_same_lines(model, tokenizer, tmp_path, monkeypatch):
    pretend_to_capture(monkeypatch)
    prompts = write(tmp_path / "p.txt", "the quick", "brown", "fox jumps", "over the lazy dog", "dog")
    options = dict(slots=2, stop=["th", "q"], max_new_tokens=30)
    expected = answers(model, tokenizer, prompts, **options)
    assert {record["finish_reason"] for record in expected} == {"stop", "length"}
    assert answers(model, tokenizer, prompts, engine=captured_engine(model), **options) == expected


def test_plain_text_is_one_prompt_a_line_and_equals_json_lines(model, tokenizer, tmp_path):
    as_text = write(tmp_path / "p.txt", "the quick", '{"a": 1}')
    as_json = write(tmp_path / "p.jsonl", {"prompt": "the quick"}, {"prompt": '{"a": 1}'})
    assert answers(model, tokenizer, as_text) == answers(model, tokenizer, as_json)


def test_messages_go_through_the_chat_template_and_chat_wraps_plain_prompts(model, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    messages = [{"role": "user", "content": "the fox"}]
    [by_messages] = answers(model, tokenizer, write(tmp_path / "m.jsonl", {"messages": messages}))
    [by_chat] = answers(model, tokenizer, write(tmp_path / "c.txt", "the fox"), chat=True)
    ids = tokenizer.encode("<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n")
    assert by_messages["tokens"] == by_chat["tokens"] == alone(model, ids, PARAMS, 0, (0,), 12)
    assert (by_messages["prompt"], by_chat["prompt"]) == (messages, "the fox")


def test_a_system_prompt_goes_before_plain_prompts_of_a_chat(model, tmp_path):
    tokenizer, system = tiny_tokenizer(), {"role": "system", "content": ""}
    tokenizer.chat_template = CHATML
    messages = [system, {"role": "user", "content": "the fox"}]
    [by_messages] = answers(model, tokenizer, write(tmp_path / "m.jsonl", {"messages": messages}))
    rows = ({"prompt": "the fox"}, {"messages": messages, "seed": 0}, {"messages": messages[1:], "seed": 0})
    by_system = answers(model, tokenizer, write(tmp_path / "c.jsonl", *rows), chat=True, system="")
    assert [record["tokens"] for record in by_system] == [by_messages["tokens"]] * 3


def test_a_stop_text_ends_a_row_before_it_even_across_tokens(model, tokenizer, tmp_path):
    prompts = write(tmp_path / "p.txt", *["the quick", "brown", "fox jumps", "over the lazy dog"])
    free = answers(model, tokenizer, prompts, max_new_tokens=40)
    pairs = [record["tokens"][at : at + 2] for record in free for at in range(3, len(record["tokens"]) - 4)]
    pieces = [b"".join(map(tokenizer.token_bytes, pair)).decode("utf-8", "replace") for pair in pairs]
    stop = next(piece for piece in pieces if "\ufffd" not in piece and len(piece) > 1)
    stopped = answers(model, tokenizer, prompts, max_new_tokens=40, stop=[stop, "never seen"])
    assert sum(len(record["tokens"]) for record in stopped) < sum(len(record["tokens"]) for record in free)
    for before, after in zip(free, stopped, strict=True):
        if stop in before["text"]:
            text = before["text"][: before["text"].index(stop)]
            assert (after["text"], after["finish_reason"]) == (text, "stop")
            assert after["tokens"] == before["tokens"][: len(after["tokens"])]
        else:
            assert after == before


def test_a_byte_order_mark_carriage_returns_and_line_separators_are_no_trouble():
    text = '\ufeff{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "c"}\r\n'.encode()
    for name in ("p.jsonl", "prompts"):
        found = parse_prompts(Path(name), text)
        parts = [(prompt.index, prompt.line, prompt.content) for prompt in found]
        assert parts == [(0, 1, "a\u2028b"), (1, 3, "c")]
    plain = parse_prompts(Path("p.txt"), b"\xef\xbb\xbfone \r\n\n two")
    assert [prompt.content for prompt in plain] == ["one ", " two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 'a'}", "expected JSON such as"),
        ('{"prompt": "a"', "expected JSON such as"),
        ("[1]", "expected a JSON object, got list"),
        ('{"text": "a"}', 'expected either "prompt" or "messages", got the keys text'),
        ("{}", r"got the keys \(none\)"),
        ('{"prompt": "a", "messages": []}', "got both"),
        ('{"prompt": 3}', 'expected "prompt" to be a text, got int'),
        ('{"messages": []}', "at least one"),
        ('{"messages": "hello"}', 'expected "messages" to be a list'),
        ('{"messages": [{"role": "user"}]}', 'expected "messages" to be a list'),
        ('{"prompt": "a", "seed": "x"}', "expected \"seed\" to be a whole number, got 'x'"),
        ('{"prompt": "a", "max_new_tokens": true}', '"max_new_tokens" to be a whole number, got True'),
        ('{"prompt": "a", "top_p": 0.5}', '"top_p" cannot be set for a row; --top-p of the command is for '
         "all rows, and a row may have prompt or messages, and id, seed, max_new_tokens"),
        ('{"prompt": "a", "temperature": 1.5}', '"temperature" cannot be set for a row; --temperature'),
        ('{"prompt": "a", "system": "b"}', '"system" cannot be set for a row; --system'),
        ('{"prompt": "a", "stop": ["x"]}', '"stop" cannot be set for a row; --stop of the command'),
        ('{"prompt": "a", "n": 2}', '"n" is not supported; leave it out: a row may have prompt'),
        ('{"prompt": "a", "max_completion_tokens": 2}', '"max_completion_tokens" is not supported'),
        ('{"prompt": "a", "max_tokens": 1.5}', 'expected "max_tokens" to be a whole number, got 1.5'),
        ('{"prompt": "a", "max_tokens": 2, "max_new_tokens": 2}', "which mean the same, got both"),
        (r'{"prompt": "\ud800"}', "surrogates not allowed"),
        ('{"prompt": "a", "max_new_tokens": 0}', "expected max_new_tokens >= 1, got 0"),
        ('{"prompt": ""}', "expected at least one token, got none"),
        (json.dumps({"prompt": "a b " * 300}), "expected at most 512 tokens"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no chat template"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_and_nothing_is_written(model, tokenizer, tmp_path, line, message):
    prompts = write(tmp_path / "p.jsonl", {"prompt": "good"}, "", line)
    with pytest.raises((LoadError, UsageError), match=r"p\.jsonl, line 3: .*" + message):
        run_file(model, tokenizer, prompts, tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl"]


def test_bytes_that_are_no_utf8_and_a_file_without_prompts_are_refused(model, tokenizer, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"good\n\xff\xfe\n")
    with pytest.raises(LoadError, match=r"p\.txt, line 2: .*utf-8"):
        run_file(model, tokenizer, tmp_path / "p.txt", tmp_path / "out.jsonl")
    with pytest.raises(LoadError, match="expected at least one prompt, found none"):
        run_file(model, tokenizer, write(tmp_path / "empty.jsonl", "", " "), tmp_path / "out.jsonl")


def test_wrong_paths_are_named(model, tokenizer, tmp_path):
    prompts = write(tmp_path / "p.txt", "the")
    (tmp_path / "link").symlink_to(prompts)
    for arguments, error, message in (
        ((tmp_path / "nothing.txt", tmp_path / "out"), LoadError, "nothing.txt: no such file"),
        ((tmp_path, tmp_path / "out"), LoadError, "no such file"),
        ((prompts, tmp_path / "absent" / "out"), LoadError, "the folder .*absent does not exist"),
        ((prompts, tmp_path), LoadError, "is a folder"),
        ((prompts, prompts), UsageError, "the output would overwrite the prompts"),
        ((prompts, tmp_path / "." / "p.txt"), UsageError, "the output would overwrite the prompts"),
        ((prompts, tmp_path / "link"), UsageError, "the output would overwrite the prompts"),
    ):
        with pytest.raises(error, match=message):
            run_file(model, tokenizer, *arguments)
    with pytest.raises(UsageError, match="stop: expected texts that are not empty"):
        run_file(model, tokenizer, prompts, tmp_path / "out", stop=[""])
    assert prompts.read_text() == "the\n" and not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="a system with /dev/fd")
def test_a_stream_is_no_output_even_where_it_goes_to_a_file(tmp_path, monkeypatch):
    prompts, chained = write(tmp_path / "p.txt", "the"), tmp_path / "chained"
    (tmp_path / "link").symlink_to("/dev/stdout")
    chained.symlink_to("link")
    with (tmp_path / "goal").open("w") as goal:
        monkeypatch.chdir(tmp_path)
        names = "-", "/dev/stdout", f"/dev/fd/{goal.fileno()}", "/proc/self/fd/1", "/dev/null", "/dev/new"
        for name in (*names, tmp_path / "link", chained, "../../../../../../../dev/stdout"):
            with pytest.raises(UsageError, match="is no file of its own, and answers are read again"):
                check_paths(prompts, Path(name))
    for name in ("-answers", tmp_path / "goal", tmp_path / "dev", "/dev/shm/answers.jsonl"):
        if Path(name).parent.is_dir():
            check_paths(prompts, Path(name))
