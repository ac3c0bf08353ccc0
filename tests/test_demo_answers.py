"""The demo without a browser: what gradio would call, and the line that says how to install it."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from generation_cases import tiny_model, tiny_tokenizer

from smollm2.demo import answers, main
from smollm2.engine.eager import Engine
from smollm2.errors import UsageError
from smollm2.pretrained.tokenizer import Tokenizer
from smollm2.serving.scheduler import Scheduler

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture
def tokenizer() -> Tokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def scheduler(tokenizer: Tokenizer) -> Iterator[Scheduler]:
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    scheduler = Scheduler(Engine(model), tokenizer, slots=2, context=128)
    scheduler.start()
    yield scheduler
    scheduler.close(0)


def test_an_answer_grows_and_says_what_was_cut(scheduler, tokenizer):
    told: list[str] = []
    answer = answers(scheduler, tokenizer, tuple(sorted(scheduler.ends)), told.append)
    texts = list(answer("fox", [], "dog", 0.0, 1.0, 12))
    assert len(texts) >= 12 and all(
        late.startswith(early) for early, late in zip(texts, texts[1:], strict=False)
    )
    assert told == ["The answer was stopped at 12 tokens; the settings allow more."]
    assert scheduler.totals.prompt_tokens == len(tokenizer.encode("system: dog\nuser: fox\n"))
    # gradio keeps a turn as a list of parts; turns that do not fit are left out
    long = [
        {"role": role, "content": [{"type": "text", "text": "fox " * 60}]} for role in ("user", "assistant")
    ]
    list(answer("fox", long, "", 0.0, 1.0, 12))
    assert any("oldest turns are left out" in line for line in told)
    with pytest.raises(UsageError, match="expected at most 128 tokens"):
        next(answer("the quick brown fox " * 100, [], "", 0.0, 1.0, 12))


def test_an_answer_that_is_closed_frees_its_row(scheduler, tokenizer):
    answer = answers(scheduler, tokenizer, tuple(sorted(scheduler.ends)), print)
    stopped = answer("fox", [], "", 0.0, 1.0, 100)
    next(stopped)
    stopped.close()
    scheduler.close()  # waits for what runs
    assert (scheduler.totals.cancelled, scheduler.running) == (1, 0)
    assert scheduler.totals.new_tokens < 100


def test_says_how_to_install_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(
        UsageError, match=r"needs the package gradio; install it with: pip install 'gradio>=6'"
    ):
        main([])


def test_the_page_of_gradio(monkeypatch, scheduler):
    gradio = pytest.importorskip("gradio")
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: launched.append(options))
    monkeypatch.setattr("smollm2.demo.load", lambda args: scheduler.engine.model)
    monkeypatch.setattr("smollm2.demo.load_tokenizer", lambda name: scheduler.tokenizer)
    assert main(["--context", "64"]) == 0
    assert len(launched) == 1


def test_a_space_installs_what_the_package_needs(project_root: Path):
    folder = project_root / "docs" / "space"
    project = tomllib.loads((project_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert set(lines[1:]) >= set(project["dependencies"]) - {"prompt_toolkit"}
    page = (folder / "README.md").read_text(encoding="utf-8")
    front = dict(re.findall(r"^(\w+): (.*)$", page.split("---")[1], flags=re.MULTILINE))
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    spec = importlib.util.spec_from_file_location("app", folder / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    assert app.main is main
