"""What the tests of chatting share: a tiny model with a chat template, and conversations with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from generation_cases import GREEDY, let_it_say, tiny_model, tiny_tokenizer

from smollm2.engine.eager import Engine
from smollm2.generation.conversation import Conversation
from smollm2.pretrained.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> Tokenizer:
    """300 tokens, the marks of turns among them."""
    plain = tiny_tokenizer()
    return Tokenizer(plain._backend, {**plain.special_tokens, "eos_token": "<|im_end|>"}, TEMPLATE)


def conversation(say: str = "", **options: Any) -> Conversation:
    """With random weights, or with a model that says one letter for ever; 512 positions unless told."""
    tokenizer = chat_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=options.pop("positions", 512))
    if say:
        let_it_say(model, tokenizer.encode(say)[0])
    params = options.pop("params", GREEDY)
    return Conversation(Engine(model), tokenizer, params, **{"max_new_tokens": 6, **options})


def chat_checkpoint(folder: Path, say: str = "a") -> Path:
    """That model and its tokenizer in a folder."""
    talk = conversation(say, positions=50_000)  # an answer without end takes a minute
    talk.engine.model.save_pretrained(folder)
    talk.tokenizer.save(folder)
    return folder
