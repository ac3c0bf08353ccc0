"""Opens the documents that a configuration names: Python's own documentation, local files, a dataset on the
hub, or a mixture of these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from smollm2.errors import UsageError
from train.config import RunConfig
from train.data.embedded import EmbeddedSource
from train.data.hub import HubSource
from train.data.local import LocalSource
from train.data.mixture import MixtureSource
from train.data.source import Part, Revision, Single, Source
from train.data.source_record import cache_root


def open_source(config: RunConfig, revision: Revision = None) -> Source:
    """The source that config.data names. revision: what the checkpoint of a resumed run pinned, as
    `Source.revision` was. Raises UsageError for paths that name no files, LoadError for what cannot be read.
    """
    if config.data != "mixture":
        return _open_single(config, revision)
    pinned = revision if isinstance(revision, Mapping) else {}
    parts = config.mixture_parts()
    return MixtureSource(
        [Part(one.name, one.weight, _open_single(one.config, pinned.get(one.name))) for one in parts]
    )


def _open_single(config: RunConfig, revision: Revision) -> Single:
    if config.data == "embedded":
        return EmbeddedSource()
    root = cache_root(config)
    if config.data == "local":
        folders = [Path(os.path.expanduser(path)).resolve() for path in config.paths]
        if root is not None and any(root.resolve().is_relative_to(folder) for folder in folders):
            raise UsageError(
                "token_cache: expected a folder outside of paths, where its files would be taken for "
                f"documents, got {root}"
            )
        return LocalSource(
            config.paths, config.text_column, config.validation_paths, train_on=learned(config)
        )
    commit = revision if isinstance(revision, str) else config.dataset_revision
    return HubSource(
        config.dataset, config.dataset_config, config.dataset_split, commit, config.text_column, root,
        learned(config),
    )  # fmt: skip


def held_out_files(config: RunConfig) -> LocalSource:
    """The documents of validation_paths."""
    return LocalSource(
        config.validation_paths, config.text_column, key="validation_paths", train_on=learned(config)
    )


def learned(config: RunConfig) -> str | None:
    """train_on where the documents are conversations, else None."""
    return config.train_on if config.format == "chat" else None
