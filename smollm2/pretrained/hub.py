"""Uploads models to the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from smollm2.errors import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.card import CARD, model_card
from smollm2.pretrained.files import write_files
from smollm2.pretrained.load import save_model, short_dtype
from smollm2.pretrained.tokenizer import Tokenizer


def push_model(
    model: SmolLM2ForCausalLM, repository: str, tokenizer: Tokenizer | None = None, *, private: bool = False
) -> str:
    """Uploads a model with its tokenizer and a card, as one commit, and returns the address of its page.

    `smollm2 export --push-to-hub` says more on the card. Raises as `check_upload` and `push_folder`.
    """
    check_upload(repository)
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    card = model_card(repository, model.config, short_dtype(str(model.dtype)), chat=has_template)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder, tokenizer)
        write_files(folder, {CARD: lambda path: path.write_text(card, encoding="utf-8")})
        return push_folder(folder, repository, private=private)


def check_upload(repository: str) -> None:
    """Raises UsageError for what is no name of a repository, and LoadError where the hub is not to be used or
    knows no token: before any work is done.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"repository: expected user/name, got {repository!r:.100} ({error})") from None
    if constants.HF_HUB_OFFLINE:
        raise LoadError(f"{repository}: cannot be uploaded offline; unset HF_HUB_OFFLINE")
    if get_token() is None:
        hint = "run `hf auth login`, or set HF_TOKEN"
        raise LoadError(f"{repository}: uploading needs a token of the hub that may write; {hint}")


def push_folder(
    folder: str | Path, repository: str, *, private: bool = False, files: Sequence[str] | None = None
) -> str:
    """Uploads the files of a folder (None: all) as one commit, and returns the address of the page.

    The repository is made if need be. Raises LoadError when the hub refuses or cannot be reached, and
    UsageError for a public one where it is to be private.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        is_public = private and not api.repo_info(url.repo_id).private
    except Exception as error:  # each transport has its own errors; none of them is a bug of the caller
        _refused(repository, error)
    if is_public:
        hint = "make it private on its page first, or name another"
        raise UsageError(f"{repository}: expected a private repository, got one that is public; {hint}")
    try:
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Upload by smollm2-kernels",
            allow_patterns=None if files is None else list(files),
        )  # fmt: skip
    except Exception as error:
        _refused(repository, error)
    return str(url)


def _refused(repository: str, error: Exception) -> NoReturn:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0]
    what = "the token does not allow it" if status in (401, 403) else f"{type(error).__name__}: {said:.200}"
    raise LoadError(f"{repository}: not uploaded ({what})") from error
