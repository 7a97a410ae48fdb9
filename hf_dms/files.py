"""Reading files that may be damaged, and protecting the files that a result is made from.

JSON files are checked against their schema. safetensors files and checkpoints give one clear error when they cannot be
read. A result never replaces its own source.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from .errors import HfDmsError


def read_json(file: Path, room: str, schema: str) -> Any:
    """The content of a JSON file that must conform to a schema of hf_dms.

    Args:
        file: the file to read.
        room: the package of hf_dms that holds the schema, such as `report`.
        schema: file name of the schema.

    Raises:
        HfDmsError: the file is not JSON, or does not conform; the message names the first place that does not.
    """
    from jsonschema import Draft202012Validator  # a slow import that most commands do not need
    from jsonschema.exceptions import best_match

    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise HfDmsError(f"{file} is not valid JSON: {error}") from None
    rules = json.loads(files(f"hf_dms.{room}").joinpath(schema).read_text(encoding="utf-8"))
    if (mistake := best_match(Draft202012Validator(rules).iter_errors(content))) is not None:
        message = mistake.message if len(mistake.message) < 300 else f"{mistake.message[:200]} ..."
        raise HfDmsError(
            f"{file} is not what this hf_dms writes: at {mistake.json_path}, {message}. "
            "If another version wrote it, use that one; if it was changed by hand, mend or remove it."
        )
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON.")


@contextlib.contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """`safetensors.safe_open` for PyTorch.

    Raises:
        HfDmsError: the file cannot be read, because the download or copy is incomplete, or it is not safetensors.
    """
    try:
        with safe_open(file, "pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise HfDmsError(f"{file} is damaged or cut short ({error}). Download or copy it again.") from error


def shards_of(index: Path) -> list[str]:
    """The files that the index of a sharded checkpoint names, sorted.

    Raises:
        HfDmsError: the file is not such an index, or it names files outside its folder.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # Names only: an index from somebody else must not point outside its folder.
        if all(Path(name).name == name for name in names):
            return names
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise HfDmsError(f"{index} does not map tensors to files beside it (weight_map). Download or copy it again.")


TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "merges*")  # names of what tokenizers are saved as


def load_saved(auto: Any, path: str | Path, **options: Any) -> Any:
    """What `auto.from_pretrained(path, **options)` returns, for a config, tokenizer, image processor or model.

    Python code in the folder is not run.

    Raises:
        HfDmsError: transformers cannot load the path, whatever error it raises. Or a model lacks weights, or has some
            of another shape: transformers would initialise those at random and only warn.
    """
    kind = next((word for word in ("Tokenizer", "ImageProcessor") if word in auto.__name__), "model").lower()
    is_model = hasattr(auto, "from_config") or hasattr(auto, "_from_config")
    # False, not left out: transformers would ask at the terminal whether to run the code in a folder.
    options |= {"output_loading_info": True} if is_model else {"trust_remote_code": False}
    try:
        found = auto.from_pretrained(path, **options)
    except Exception as error:  # damaged files make transformers raise errors of many kinds
        has_one = any(file for name in TOKENIZER_FILES for file in Path(path).glob(name))
        if kind == "tokenizer" and Path(path).is_dir() and not has_one:
            raise HfDmsError(
                f"No tokenizer can be read from '{path}'. The folder has no file of one: save that of the model there, "
                "by tokenizer.save_pretrained(folder)."
            ) from error
        lines = str(error).strip().splitlines() or [""]
        raise HfDmsError(f"No {kind} can be read from '{path}'. {lines[0] or type(error).__name__}") from error
    if not is_model:
        return found
    model, loading = found
    if lacking := sorted(loading["missing_keys"]) + [name for name, *_ in loading["mismatched_keys"]]:
        raise HfDmsError(
            f"'{path}' has no weights for '{lacking[0]}' of {type(model).__name__}. Is its config.json whole?"
        )
    return model


def check_not_source(folder: str | os.PathLike, source: str | os.PathLike | None) -> None:
    """Check that a result would not replace the files that it is made from.

    Args:
        folder: where the result goes.
        source: folder of the model that it is made from. None and paths that do not exist (a Hub id) always pass.

    Raises:
        HfDmsError: both are the same folder.
    """
    if source and Path(source).exists() and Path(folder).resolve() == Path(source).resolve():
        raise HfDmsError(replaces(folder, "is", source))


def replaces(folder: str | os.PathLike, relation: str, source: str | os.PathLike) -> str:
    """The error message for a result that would replace the files it is made from.

    Args:
        folder: where the result would go.
        relation: how the folder relates to the source, such as "is".
        source: folder of the model that the result is made from.
    """
    place = f"this is {source}" if str(folder) == str(source) else f"{folder} {relation} {source}"
    return (
        f"{place}, which the result is made from and which it would replace, overwrite or not. Choose another folder."
    )


def keep_source_(model: Any, source: str | None) -> None:
    """Make `save_pretrained` of a model refuse the folder that the model was made from, also when a Trainer calls it.

    Args:
        model: a `PreTrainedModel`.
        source: folder of the dense model. If there is no such folder (a Hub id, a model from a config), nothing
            changes.
    """
    if source and Path(source).is_dir():
        model.save_pretrained = functools.partial(_save_elsewhere, model, str(Path(source).resolve()))


def keeps_source(model: Any) -> bool:
    """Whether `keep_source_` has been called on a model."""
    return getattr(vars(model).get("save_pretrained"), "func", None) is _save_elsewhere


def _save_elsewhere(model: Any, source: str, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    check_not_source(save_directory, source)
    # The class's method, because the attribute of the model is this function.
    return type(model).save_pretrained(model, save_directory, *args, **kwargs)


# Disk full, quota or file size exceeded, read-only file system, no permission (twice), hardware error.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

# Parts of the messages of torch.save when a write fails. Which one appears depends on where in the file it happens.
TORCH_WRITES = ("PytorchStreamWriter", "inline_container.cc", "iostream error")


def refusal_of_the_system(error: BaseException) -> str | None:
    """The operating system's reason when it refused to write or read a file; None for any other error.

    torch and safetensors hide the system's error in errors of their own, so their messages are searched for it.
    """
    words = str(error)
    if isinstance(error, SafetensorError) and (number := re.search(r"os error (\d+)", words)):
        return words if int(number[1]) in REFUSALS else None
    if isinstance(error, RuntimeError):
        opening = re.search(r"open file failed with strerror: (.*)", words)
        if opening and opening[1] in map(os.strerror, REFUSALS):
            return f"torch could not write a checkpoint: {opening[1]}"
        written = any(sign in words for sign in TORCH_WRITES)
        return "torch could not write a checkpoint: is the disk full?" if written else None
    return words if isinstance(error, OSError) and error.errno in REFUSALS else None
