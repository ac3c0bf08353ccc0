"""What trl's SFTTrainer makes of rows: token ids, labels and the loss, written to a JSON file.

    python tests/trl_worker.py FOLDER

It runs in an environment that has trl, and imports nothing of this project. FOLDER has a model and its
tokenizer, and cases.json: {name: {"rows": [...], "config": {...}, "template": text or null}}. It leaves
found.json: for every case "ids", "labels", "loss" (nats per learned token, over all rows in one batch) and
"packed_loss", the same with trl's packing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl


def trained_on(folder: Path, case: dict[str, Any], packing: bool) -> tuple[Any, float]:
    """The dataset as trl prepares it, and the loss of all of it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if case["template"] is not None:
        tokenizer.chat_template = case["template"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = datasets.Dataset.from_list(case["rows"])
    with tempfile.TemporaryDirectory() as output:
        config = trl.SFTConfig(
            output_dir=output, report_to="none", use_cpu=True, bf16=False, packing=packing,
            per_device_train_batch_size=len(rows), gradient_checkpointing=False, **case["config"],
        )  # fmt: skip
        trainer = trl.SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        prepared = trainer.train_dataset
        inputs = trainer.data_collator([prepared[index] for index in range(len(prepared))])
        targets = int((inputs["labels"][:, 1:] != -100).sum())
        model.eval()
        with torch.no_grad():
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(targets))
    return prepared, float(loss)


def main(folder: Path) -> None:
    datasets.disable_caching()
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    found = {}
    for name, case in cases.items():
        prepared, loss = trained_on(folder, case, packing=False)
        ids, labels = list(prepared["input_ids"]), list(prepared["labels"])
        _, packed = trained_on(folder, case, packing=True)
        found[name] = {"ids": ids, "labels": labels, "loss": loss, "packed_loss": packed}
    versions = {name: version(name) for name in ("trl", "transformers", "torch")}
    text = json.dumps({"versions": versions, "cases": found})
    (folder / "found.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
