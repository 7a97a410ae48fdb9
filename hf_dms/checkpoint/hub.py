"""Pushing a pruned model's folder to the Hub: `hf-dms push PATH REPO`, and the `hub` section of a recipe.

huggingface_hub does the upload. This file checks before it, and explains errors. It never changes local files, and
never shows the token.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import yaml
from huggingface_hub import HfApi, get_token, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import HfDmsError
from ..files import shards_of
from .search_state import STATE_JSON

STALE = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*.safetensors"]  # weights of an earlier push to delete


def push(
    path: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Push the folder of a pruned model. Weight files of an earlier push that are not in the folder are removed.

    Files that have arrived are not sent again, so an interrupted push continues when it is repeated.

    Args:
        path: a folder written by `save_pruned` or `hf-dms prune`.
        repo_id: `name` or `namespace/name`. The repository is created if it does not exist.
        private: whether a new repository is private. Default: the account's setting.
        revision: branch to push to. It is created if it does not exist. Default: main.
        commit_message: message of the commit. Default: `Pruned with hf_dms`.
        token: token of the Hub. Default: the one from `hf auth login` or HF_TOKEN.

    Returns:
        The URL of the model.

    Raises:
        ValueError: the folder does not hold a complete pruned model; the id is invalid, or that of the dense model;
            there is no token, or the Hub refuses it; or the connection broke.
    """
    check_complete(path)
    check_repo_id(repo_id)
    check_not_base(repo_id, revision, base_of(path))
    check_token(token)
    api = HfApi(token=token)
    try:
        # A name without a namespace becomes the user's own repository, so the dense model's id is compared once more.
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        check_not_base(url.repo_id, revision, base_of(path))
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=Path(path),
            revision=revision,
            commit_message=commit_message or "Pruned with hf_dms",
            delete_patterns=STALE,
        )
    except HfDmsError:
        raise
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        again = push_command(path, repo_id, private, revision, commit_message)
        message = f"{_reason(error, repo_id)}\n{path} is unchanged. To push it again: {again}"
        # No chained traceback: an error of the HTTP library can show the header with the token.
        # "\0" without a token: an empty text would be found between all letters.
        raise HfDmsError(message.replace(token or get_token() or "\0", "<token>")) from None
    return str(url) if revision is None else f"{url}/tree/{revision}"


def _reason(error: Exception, repo_id: str) -> str:
    """Why a push failed, in words. An upload wraps the error of the server or the connection."""
    cause: BaseException = error
    while not isinstance(cause, HTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):
        return _refusal(cause, repo_id)
    said = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    what = "The connection to the Hub broke" if isinstance(cause, HTTPError | ConnectionError) else "Something failed"
    return f"{what} while pushing to '{repo_id}': {said}"


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401:
        return "The Hub refuses the token (401). Make one with write access and run `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"The token may not write to '{repo_id}' (403). It needs write access to that repository or namespace."
    if status == 404:
        return f"The Hub has no '{repo_id}' (404), or the token may not see it. Check the namespace in the id."
    return f"The Hub refuses the push to '{repo_id}' ({status}): {error.server_message or 'it does not say why'}"


def push_command(
    path: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """The command line that pushes a folder."""
    words = ["hf-dms", "push", str(path), repo_id]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    words += ["--message", commit_message] if commit_message else []
    return shlex.join(words)


def check_complete(path: str | os.PathLike) -> None:
    """Check that a folder holds a complete pruned model.

    Raises:
        ValueError: its config or weights are missing, or it is a checkpoint of a search.
    """
    folder = Path(path)
    # A checkpoint of a search has a config and weights too, and would pass the next check.
    if (folder / STATE_JSON).is_file():
        raise HfDmsError(f"{path} is a checkpoint of a search, not a pruned model. Save what `prune` returns.")
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    shards = shards_of(index) if index.is_file() else [SAFE_WEIGHTS_NAME]
    missing = [name for name in ["config.json", *shards] if not (folder / name).is_file()]
    if missing:
        raise HfDmsError(
            f"{path} is not the folder of a complete model: it has no {', '.join(missing)}. "
            "Give the folder that `hf-dms prune` or `save_pruned` wrote."
        )


def check_repo_id(repo_id: str) -> None:
    """Check the name of a repository.

    Raises:
        ValueError: the Hub does not allow this name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HfDmsError(f"'{repo_id}' cannot be a repository on the Hub; expected namespace/name. {error}") from None


def base_of(path: str | os.PathLike) -> str | None:
    """The dense model's id on the Hub, from the card in a folder; None if the card does not have it."""
    card = Path(path) / "README.md"
    try:
        base = (metadata_load(card) or {}).get("base_model") if card.is_file() else None
    except (ValueError, yaml.YAMLError):  # the user has edited the card; the Hub will report what is wrong with it
        return None
    return base if isinstance(base, str) else None


def check_not_base(repo_id: str, revision: str | None, base: str | None, base_revision: str | None = None) -> None:
    """Check that a push would not replace the dense model.

    Args:
        repo_id: repository to push to.
        revision: branch to push to; None is main.
        base: the dense model's id, if it is on the Hub.
        base_revision: branch that the dense model was loaded from; None is main.

    Raises:
        ValueError: the push would replace the dense model.
    """
    if base is not None and repo_id.lower() == base.lower() and (revision or "main") == (base_revision or "main"):
        raise HfDmsError(
            f"'{repo_id}' is the model that the pruned one was made from, and this push would replace it. Choose "
            "another repository, or another branch of it (revision)."
        )


def check_token(token: str | None = None) -> None:
    """Check that there is a token to push with.

    Raises:
        ValueError: there is none, or it cannot be a valid token.
    """
    token = token or get_token()
    if not token:
        raise HfDmsError("Pushing needs a token of the Hub with write access. Run `hf auth login`, or set HF_TOKEN.")
    if not re.fullmatch("[!-~]+", token):  # checked here, because the HTTP library would show the token in its error
        raise HfDmsError("The token of the Hub holds a space, a line break or another character that no token has.")
