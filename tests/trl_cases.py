"""The rows that trl's SFTTrainer and this project are compared on, and what either makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chat_cases import chat_tokenizer
from generation_cases import tiny_model

from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.tokenizer import Tokenizer
from train.data.conversations import NOT_LEARNED, ChatEncoder, ChatFormat
from train.data.packing import Segment, Tensors, tensors
from train.data.rows import as_conversation
from train.data.source import START
from train.data.whole import WholePacker, learnable

GOLDEN = Path(__file__).with_name("trl_golden.json")
LENGTH = 160  # tokens; one of the rows is longer
# SmolLM2's template, and the same with the marks that trl needs; what they enclose is what trl's own marked
# templates enclose for the other models with these marks of turns: the answer, its end, and the line's.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TURN = r"{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
SMOLLM2 = (
    r"{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    rf"{{{{ '<|im_start|>system\n{SYSTEM}<|im_end|>\n' }}}}{{% endif %}}{TURN}{{% endfor %}}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def marked(inside: str, behind: str = "") -> str:
    """The template with generation marks around a part of the assistant's turns."""
    generation = rf"{{% generation %}}{{{{ {inside} }}}}{{% endgeneration %}}{behind}"
    turn = rf"{{{{'<|im_start|>assistant\n'}}}}{generation}"
    return SMOLLM2.replace(
        TURN, f"{{% if message['role'] == 'assistant' %}}{turn}{{% else %}}{TURN}{{% endif %}}"
    )


MARKED = marked(r"message['content'] + '<|im_end|>\n'")
NARROW = marked("message['content']", r"{{ '<|im_end|>\n' }}")


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


MESSAGES = [
    {"messages": talk("the fox", "jumps over 12 dogs")},
    {"messages": talk("quick", "\n brown  ", "and then?", "lazy\n\nünï ☃ dog", system="Be the fox.")},
    {"messages": talk("over " * 9, "the lazy dog " * 30)},
    {"messages": [{"role": "assistant", "content": "Hello."}, *talk("x", "")]},
]
TURNS = [
    {"prompt": talk("the quick"), "completion": [{"role": "assistant", "content": " brown fox"}]},
    {"prompt": talk("a", "b", "c", system="s"), "completion": [{"role": "assistant", "content": "dog\n"}]},
]
TEXTS = [
    {"prompt": "the quick ", "completion": "brown fox"},
    {"prompt": "the la", "completion": "zy dog jumps"},
    {"prompt": "", "completion": "over"},
]
# name -> rows, train_on, what trl is told, and with which template
CASES: dict[str, tuple[list[dict[str, Any]], str, dict[str, Any], str]] = {
    "messages": (MESSAGES, "assistant", {"assistant_only_loss": True}, MARKED),
    "messages, all": (MESSAGES, "all", {}, SMOLLM2),
    "turns": (TURNS, "assistant", {}, SMOLLM2),
    "turns, all": (TURNS, "all", {"completion_only_loss": False}, SMOLLM2),
    "texts": (TEXTS, "assistant", {}, SMOLLM2),
    "texts, all": (TEXTS, "all", {"completion_only_loss": False}, SMOLLM2),
}


def tokenizer(template: str = SMOLLM2) -> Tokenizer:
    found = chat_tokenizer()
    found.chat_template = template
    return found


def model() -> SmolLM2ForCausalLM:
    """Weights by a formula: the same with every version of torch."""
    made = tiny_model(vocab_size=tokenizer().vocab_size, max_position_embeddings=512)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters(), 1):
            waves = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * math.sqrt(number + 1))
            size = 1.0 if parameter.ndim == 1 else 2.0 / math.sqrt(parameter.shape[-1])
            parameter.copy_((waves * size).view_as(parameter))
    return made.eval()


def write_cases(folder: Path) -> None:
    """What trl_worker.py reads."""
    model().save_pretrained(folder)
    tokenizer().save(folder)
    cases = {
        name: {"rows": rows, "config": {"max_length": LENGTH, **told}, "template": template}
        for name, (rows, _, told, template) in CASES.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")


def encoded(rows: list[dict[str, Any]], train_on: str, template: str = SMOLLM2) -> list[np.ndarray]:
    """Of each row its ids, with NOT_LEARNED; those of which nothing would be learned are left out."""
    some = tokenizer(template)
    encoder = ChatEncoder(some.to_json(), ChatFormat.of(some, train_on))
    block = learnable(encoder([as_conversation(row) for row in rows]), LENGTH)
    return [one for one in np.split(block.tokens, np.cumsum(block.lengths)[:-1]) if len(one)]


def packed(arrays: list[np.ndarray], length: int) -> Tensors:
    """All of them in rows of that length."""
    count = len(arrays)
    begins = np.cumsum([0, *map(len, arrays)])[:-1]
    zeros = np.zeros(count, np.uint64)
    segment = Segment(
        START, np.concatenate(arrays), begins, np.arange(count), zeros, zeros.astype(np.int64), zeros * 0.0
    )
    packer = WholePacker(iter([segment]), length, 0)
    rows = []
    while (row := packer.take(1)) is not None:
        rows.append(row)
    return tensors(rows)


def ids_and_labels(array: np.ndarray) -> tuple[list[int], list[int]]:
    """Of one row, cut as trl cuts it."""
    array = array[:LENGTH]
    ids = array & ~NOT_LEARNED
    return ids.tolist(), np.where(array < NOT_LEARNED, ids.astype(np.int64), -100).tolist()
