"""What changed between a checkpoint and the run that continues it."""

from __future__ import annotations

import dataclasses
from typing import Any

from smollm2.errors import UsageError
from train.config import RunConfig
from train.data.source import Source
from train.data.state import DataState
from train.keys import format_value

RESTART = "or start a new run with another output_dir"


def compare_for_resume(before: dict[str, Any], after: RunConfig) -> list[str]:
    """What changed since the checkpoint, as lines `key: before -> after`.

    before: the saved configuration. Raises UsageError when a key that must not change did: the saved
    optimizer state and data position belong to the old model, data and tokenizer.
    """
    lines, refused, default, saved = [], [], RunConfig(), after.as_saved()
    for entry in dataclasses.fields(RunConfig):
        if entry.name in ("resume", "output_dir"):
            continue
        # A key that the program of the checkpoint did not have yet stood at its default.
        old, new = before.get(entry.name, getattr(default, entry.name)), saved[entry.name]
        # cuda_graph was a boolean once, and interpolations were saved with what they stood for.
        if old not in (new, getattr(after, entry.name)) and format_value(old) != new:
            lines.append(f"{entry.name}: {format_value(old)} -> {format_value(new)}")
            # their states are interchangeable
            same = entry.name == "optimizer" and {old, new} <= {"adamw", "adamw,torch"}
            if entry.metadata["fixed"] and not same:
                refused.append(f"{entry.name}={format_value(old)} (got {format_value(new)})")
    if refused:
        raise UsageError(
            f"resume: the checkpoint was made with {', '.join(refused)}; repeat these, {RESTART}"
        )
    return lines


def compare_data(
    data: DataState, before: dict[str, Any], config: RunConfig, source: Source, validation: str
) -> None:
    """Raises UsageError if a resumed run has other documents than its checkpoint. Where they lie may change.

    data, before: of the checkpoint, its configuration included. validation: fingerprint of validation_paths.
    Fingerprints that an earlier version made are replaced.
    """
    old, new = before.get("validation_paths", []), config.as_saved()["validation_paths"]
    # an older checkpoint does not say what was in them; the fingerprint of local files covers them
    unknown = bool(old) and not data.validation and config.data != "local" and old != new
    if bool(old) != bool(new) or unknown:
        made = f"the checkpoint was made with validation_paths={format_value(old)}"
        raise UsageError(f"resume: {made} (got {format_value(new)}); repeat it, {RESTART}")
    if data.fingerprint != source.fingerprint:
        forbidden = source.older_fingerprints.get(data.fingerprint)
        found = f"expected the data of the checkpoint ({data.fingerprint}), got {source.fingerprint}"
        if forbidden is None:
            how = "restore the files, in the order that their paths had"
            raise UsageError(f"resume: {found}; {how}, {RESTART}")
        if forbidden:
            raise UsageError(f"resume: {forbidden}; go on with the version that began the run, {RESTART}")
    if data.validation and data.validation != validation:
        found = f"expected those of the checkpoint ({data.validation}), got {validation}"
        raise UsageError(f"resume: validation_paths: {found}; restore the files, {RESTART}")
    data.fingerprint, data.validation = source.fingerprint, validation


def changed_versions(before: dict[str, str], now: dict[str, str]) -> str:
    """The libraries whose versions differ, as "torch 2.12.0 -> 2.13.0, ..."; empty if none does."""
    both = sorted(before.keys() & now.keys())
    return ", ".join(f"{name} {before[name]} -> {now[name]}" for name in both if before[name] != now[name])
