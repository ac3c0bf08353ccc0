"""Tasks for lm_eval from Python's own documentation, which comes with Python: nothing is downloaded.

write_tasks(folder)    # task files and their data; lm_eval finds them by include_path=folder
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

CHOICES, CONTEXT, ANSWER = 4, 30, 12  # words
COMMON = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
metadata:
  version: 1.0
"""
# Which of four texts goes on, a text as a whole, and what a model makes of its beginning.
TASKS = {
    "pydoc_choice": """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "pydoc_text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "pydoc_write": """output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n", ". "]
  max_gen_toks: 16
metric_list:
  - metric: exact_match
""",
}


def documents(count: int) -> list[dict[str, object]]:
    """The beginnings of so many topics, each with what follows there and at other topics."""
    topics = importlib.import_module("pydoc_data.topics").topics
    words = [topics[name].split() for name in sorted(topics)]
    words = [text for text in words if len(text) > CONTEXT + ANSWER][:count]
    answers = [" ".join(text[CONTEXT : CONTEXT + ANSWER]) for text in words]
    found = []
    for index, text in enumerate(words):
        label = index % CHOICES
        choices = [answers[(index + place - label) % len(words)] for place in range(CHOICES)]
        context = " ".join(text[:CONTEXT])
        found.append(
            dict(
                context=context,
                choices=choices,
                label=label,
                answer=choices[label],
                text=" ".join(text[:200]),
            )
        )
    return found


def write_tasks(folder: Path, count: int = 16) -> Path:
    """The tasks over `count` documents, as files."""
    data = folder / "pydoc.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in documents(count)), encoding="utf-8")
    for name, text in TASKS.items():
        content = f"task: {name}\n{COMMON.format(data=data)}{text}"
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
    return folder
