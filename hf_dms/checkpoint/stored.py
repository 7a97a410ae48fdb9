"""The tensors in the safetensors files of a checkpoint, from the files' headers: the model's names, and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..archs.plain_view import names_by_tensor, plain_buffers, tensor_of
from ..errors import HfDmsError
from ..files import open_weights, shards_of

ROWS_AT_A_TIME = 4096  # two embeddings are compared in parts of this many rows, to save memory


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: the safetensors file.
        key: name of the tensor in the file.
        shape: its shape.
    """

    file: Path
    key: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        ValueError: there are none, or a file of the index is missing.
    """
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        kinds = sorted(
            {file.suffix for file in folder.glob("*") if file.suffix in (".bin", ".h5", ".msgpack", ".gguf")}
        )
        raise HfDmsError(
            f"{folder} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}"
            + (f", only {', '.join(kinds)} files, which cannot be read tensor by tensor" if kinds else "")
            + ". Save it as safetensors first: from_pretrained(...).save_pretrained(folder)."
        )
    files = [folder / name for name in shards_of(index)]
    for file in files:
        if not file.is_file():
            raise HfDmsError(f"{folder} lacks {file.name}, which {index.name} names. Download or copy it again.")
    return files


def hub_weights(repo_id: str, revision: str | None, download: bool) -> Path | None:
    """The folder with all safetensors files of a Hub model in the local cache.

    Args:
        repo_id: the model.
        revision: branch, tag or commit; None is main.
        download: whether missing weights are downloaded. The index, a small file, always is.

    Returns:
        The folder; None if the model has no safetensors files, or one is not in the cache and must not be downloaded.

    Raises:
        ValueError: the index is damaged, or it names a file that neither the cache nor the Hub has.
    """

    def cached(name: str, download: bool) -> Path | None:
        try:
            return Path(hf_hub_download(repo_id, name, revision=revision, local_files_only=not download))
        except EntryNotFoundError:  # not on the Hub; or not in the cache, and the Hub cannot be reached
            return None

    # One file or an index with shards: `from_pretrained` looks for them in this order.
    if (single := cached(SAFE_WEIGHTS_NAME, download)) is not None:
        return single.parent
    if (index := cached(SAFE_WEIGHTS_INDEX_NAME, True)) is None:
        return None
    absent = [name for name in shards_of(index) if cached(name, download) is None]
    # Without a download, the content of absent files is unknown. It can only be checked that the Hub has them.
    there = _names_on_hub(repo_id, revision) if absent else None
    if there is not None and (lacking := [name for name in absent if name not in there]):
        raise HfDmsError(
            f"the Hub's '{repo_id}' lacks {lacking[0]}, which {SAFE_WEIGHTS_INDEX_NAME} names. Use another revision "
            "or model, or ask its owner to upload the file."
        )
    return index.parent if download or not absent else None


def _names_on_hub(repo_id: str, revision: str | None) -> set[str] | None:
    """Names of the files of a Hub model, or None if the Hub cannot be reached or does not list them."""
    try:
        return set(HfApi().list_repo_files(repo_id, revision=revision))
    except (HTTPError, OSError):
        return None


def stored_tensors(files: Iterable[Path], model: PreTrainedModel) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of safetensors files by the model's names, from the files' headers.

    Files of some architectures (ViT) have other names than the model; transformers' own mapping renames them.

    Returns:
        The tensors, and the names of those for which the model has no parameter.

    Raises:
        ValueError: transformers would merge several tensors into a parameter, or split one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(plain_buffers(model))
    mapping: Any = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if not isinstance(step, WeightRenaming)]
    tensors, others = {}, []
    for file in files:
        with open_weights(file) as content:
            for key in content.keys():  # noqa: SIM118 (it is no dict)
                name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
                if converter is not None:
                    raise HfDmsError(
                        f"{file} holds '{key}', which transformers merges or splits when it loads it. "
                        "This cannot be cut from files: load the model and use hf_dms.prune."
                    )
                if name in parameters:
                    # `get_slice` knows the shape from the header, without reading the tensor.
                    tensors[name] = Stored(file, key, tuple(content.get_slice(key).get_shape()))
                else:
                    others.append(key)
    return tensors, others


def missing_weights(folder: Path, model: PreTrainedModel) -> list[str]:
    """Names of a model's tensors that are missing from a checkpoint, from the headers of its safetensors files.

    The definition is that of `from_pretrained`: parameters, tied ones once, and buffers of the state dict.

    Args:
        folder: folder of the checkpoint. If it has only other kinds of files, the result is empty.
        model: the model to load, on the meta device or any other.

    Raises:
        ValueError: a file is missing or cut short, or a tensor has another shape than the model's.
    """
    # Pickled weights are loaded by transformers, but their shapes are not in a header that could be read here.
    others = any(folder.glob("*.bin"))
    if others and not any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return []
    tensors, _ = stored_tensors(weight_files(folder), model)
    if wrong := _first_other_shape(tensors, model):
        raise HfDmsError(f"{folder}: {wrong} Is config.json that of the weights?")
    return _absent(tensors, model)


def first_mismatch(tensors: dict[str, Stored], model: PreTrainedModel) -> str | None:
    """The first mismatch between stored tensors and a model, in words: another shape, or a missing tensor."""
    if wrong := _first_other_shape(tensors, model):
        return wrong
    absent = _absent(tensors, model)
    return f"there are no weights for '{absent[0]}'." if absent else None


def _absent(tensors: dict[str, Stored], model: PreTrainedModel) -> list[str]:
    # A tied tensor is there if it is stored under any of its names.
    return [names[0] for names in _all_names(model) if not any(name in tensors for name in names)]


def _all_names(model: PreTrainedModel) -> list[list[str]]:
    """Names of every tensor of a model's state dict, several for tied parameters."""
    return [*names_by_tensor(model).values(), *([name] for name, _ in plain_buffers(model))]


def _first_other_shape(tensors: dict[str, Stored], model: PreTrainedModel) -> str | None:
    for names in _all_names(model):
        shape = tuple(tensor_of(model, names[0]).shape)
        for name in names:
            if name in tensors and tensors[name].shape != shape:
                return f"'{name}' has shape {tensors[name].shape} in {tensors[name].file.name}, expected {shape}."
    return None


def read(stored: Stored) -> Tensor:
    """Read a tensor, on its own memory map of the file, so that the file's pages leave memory with the tensor."""
    with open_weights(stored.file) as content:
        return content.get_tensor(stored.key)


def equal(stored: Stored, other: Stored) -> bool:
    """Whether two tensors of one shape in files are equal, read a few rows at a time."""
    with open_weights(stored.file) as content, open_weights(other.file) as others:
        mine, its = content.get_slice(stored.key), others.get_slice(other.key)
        rows = range(0, stored.shape[0], ROWS_AT_A_TIME)
        return all(torch.equal(mine[row : row + ROWS_AT_A_TIME], its[row : row + ROWS_AT_A_TIME]) for row in rows)
