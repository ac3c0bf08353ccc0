"""The card of a model: README.md with YAML in front, which the hub reads, and then text, which people read.

What a run of train.run was trained on and how, and how well it predicts held-out text, is read from the files
in its folder. Of paths on this machine a card holds the last part alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from smollm2.config import PRESETS, SIZES, SmolLM2Config
from smollm2.errors import LoadError
from smollm2.pretrained.files import read_json
from smollm2.pretrained.source import PACKAGE

CARD, PICTURE = "README.md", "training_metrics.png"
# As train.run names them: the record in each checkpoint, and the journal of the run.
RECORD, METRICS = "run.json", "metrics.jsonl"
INSTRUCT = "HuggingFaceTB/SmolLM2-135M-Instruct"
COUNTS = "examples", "sample_len"  # beside the metrics of a task
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Keys of a run that say where it ran and what it left, not what it learned.
UNTOLD = {
    "output_dir", "resume", "token_cache", "tracker", "tracker_project", "tracker_online", "tensorboard",
    "workers", "device", "log_every", "eval_every", "sample_every", "sample_prompts", "sample_tokens",
    "sample_temperature", "checkpoint_every", "keep_checkpoints", "keep_every", "background_save",
    "cuda_graph", "compile",
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What a run says of itself. figures: of its journal, the newest up to the checkpoint."""

    config: dict[str, Any]
    step: int
    tokens: int
    figures: dict[str, Any]
    picture: Path | None


def training_of(checkpoint: Path) -> Training | None:
    """The training that wrote a checkpoint; None for any other folder. Raises LoadError for a record that
    cannot be read.
    """
    path = checkpoint / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    config, step, tokens = (record.get(key) for key in ("config", "step", "tokens"))
    if not (isinstance(config, dict) and isinstance(step, int) and isinstance(tokens, int)):
        raise LoadError(f"{path}: expected config, step and tokens of a run; the file is damaged")
    run = checkpoint.parent.parent
    figures: dict[str, Any] = {}
    if (run / METRICS).is_file():
        for text in (run / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                if line["step"] <= step:
                    figures |= line
            except (ValueError, TypeError, KeyError):  # a line that a killed process left half written
                continue
    picture = run / PICTURE
    return Training(config, step, tokens, figures, picture if picture.is_file() else None)


def base_model(source: str | Path, training: Training | None) -> str | None:
    """The hub id of the model that this one is, or was fine-tuned from, where it has one."""
    name = str(training.config.get("model", "")) if training else str(source)
    if name == PACKAGE:
        return INSTRUCT
    for size in PRESETS:
        for kind in ("", "-Instruct"):
            if name.lower() == f"smollm2-{size}{kind}".lower():  # as train.run calls them
                return f"HuggingFaceTB/SmolLM2-{size}{kind}"
    return name if HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def default_license(base: str | None) -> str | None:
    """That of the released models, for what descends from them."""
    return "apache-2.0" if base and base.startswith("HuggingFaceTB/SmolLM2-") else None


def model_card(
    name: str,
    config: SmolLM2Config,
    dtype: str,
    *,
    base: str | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    training: Training | None = None,
    scores: Mapping[str, Mapping[str, Any]] | None = None,
    chat: bool = False,
) -> str:
    """The text of README.md. name: as the hub calls the model. base: the hub id that it descends from.
    scores: task -> metric -> value, as in the results of lm_eval. chat: whether there is a chat template.
    """
    from huggingface_hub import EvalResult, ModelCardData

    rows = [(task, *row) for task, found in (scores or {}).items() for row in _score_rows(found)]
    kind = "text-generation"
    data = ModelCardData(
        license=license, base_model=base, datasets=_datasets(training) or None,
        language=list(languages) or None, library_name="transformers", pipeline_tag=kind,
        tags=["smollm2", "llama", *(["conversational"] if chat else [])],
        model_name=name if rows else None,
        eval_results=[EvalResult(kind, task, task, metric, value) for task, metric, value, _ in rows] or None,
    )  # fmt: skip
    origin = "trained from scratch" if training else "exported"
    if base is not None:
        origin = f"{'fine-tuned' if training else 'exported'} from [{base}](https://huggingface.co/{base})"
    elif training and training.config.get("model") not in PRESETS:
        origin = f"fine-tuned from {_public(training.config.get('model'))}"
    sizes = [(field.replace("_", " "), getattr(config, field)) for field in SIZES]
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name.rpartition('/')[2]}",
        f"A language model of the Llama architecture with {config.num_parameters() / 1e6:.1f}M parameters in "
        f"{dtype}, {origin} with smollm2-kernels {_version()}.",
        _use(name, chat),
        "## Sizes\n\n" + _table(("", ""), sizes),
        *(_training_parts(training) if training else ()),
    ]
    if rows:
        shown = [(task, metric, f"{value:.4f}{error}") for task, metric, value, error in rows]
        parts.append("## Scores\n\n" + _table(("task", "metric", "value"), shown))
    return "\n\n".join(parts) + "\n"


def _use(name: str, chat: bool) -> str:
    """How to load the model, and what it then puts out."""
    ask = (
        'messages = [{"role": "user", "content": "What is gravity?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        if chat
        else 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    )
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{ask}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""


def _training_parts(training: Training) -> list[str]:
    """Data, settings, the held-out loss and the picture of a run."""
    config, figures = training.config, training.figures
    facts = [("steps", f"{training.step:,}"), ("tokens", f"{training.tokens:,}")]
    named = {
        "loss": "training loss, nats per token", "held_out_loss": "held-out loss, nats per token",
        "held_out_bits_per_byte": "held-out bits per byte", "unique_examples": "different documents",
        "epochs": "epochs",
    }  # fmt: skip
    for key, words in named.items():
        if isinstance(value := figures.get(key), int | float):
            facts.append((words, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
    told = {
        key: _public(value) for key, value in config.items() if key not in UNTOLD and value not in (None, [])
    }
    settings = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in told.items())
    return [
        "## Data\n\n" + "\n".join(f"- {line}" for line in _data(config)),
        "## Training\n\n" + _table(("", ""), facts),
        *([f"![Loss, documents, throughput]({PICTURE})"] if training.picture else ()),
        f"<details><summary>Settings</summary>\n\n```yaml\n{settings}\n```\n\n</details>",
    ]


def _parts(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of a run: those of its mixture, or the run itself."""
    if config.get("data") != "mixture":
        return [dict(config)]
    return [{**config, "data": "hub", **part} for part in config.get("mixture", ())]


def _data(config: Mapping[str, Any]) -> list[str]:
    """A line about each source."""
    lines = []
    for part in _parts(config):
        share = f", weight {part['weight']}" if "weight" in part else ""
        if part["data"] == "hub":
            where = "".join(
                f", {part[key]}" for key in ("dataset_config", "dataset_revision") if part.get(key)
            )
            lines.append(f"{part['dataset']}{where}, split {part['dataset_split']}{share}")
        elif part["data"] == "local":
            lines.append(f"files: {', '.join(map(str, _public(part['paths'])))}{share}")
        else:
            lines.append(f"Python's own documentation{share}")
    return lines


def _datasets(training: Training | None) -> list[str]:
    parts = _parts(training.config) if training else []
    return list(dict.fromkeys(part["dataset"] for part in parts if part["data"] == "hub"))


def _public(value: Any) -> Any:
    """A setting without the folders of this machine."""
    if isinstance(value, list):
        return [_public(one) for one in value]
    if isinstance(value, dict):
        return {key: _public(one) for key, one in value.items()}
    is_path = isinstance(value, str) and "/" in value
    is_public = not is_path or (HUB_ID.fullmatch(value) and not os.path.exists(value))
    return value if is_public else Path(value).name


def _score_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    """(metric, value, its standard error as text) of one task: "acc" as `smollm2 evaluate` has it, or
    "acc,none" as lm_eval has it.
    """
    for key, value in found.items():
        metric, comma, rest = key.partition(",")
        if isinstance(value, int | float) and "_stderr" not in metric and metric not in COUNTS:
            error = found.get(f"{metric}_stderr{comma}{rest}")
            yield metric, float(value), f" ± {error:.4f}" if isinstance(error, int | float) else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _version() -> str:
    try:
        return version("smollm2-kernels")
    except PackageNotFoundError:  # a checkout that was not installed
        return ""
