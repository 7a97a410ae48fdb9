"""A cut by a plan, from safetensors files to safetensors files, tensor by tensor. The model is never in memory.

Memory holds one output shard, one tensor and its slices. Each tensor is read on its own memory map, which is released
with it. The check needs no forward pass: the written files are read back, names and shapes must be those of the class
that will load them, and every tensor must equal the slice of its source.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..archs.bind import BoundSpec, bind
from ..archs.plain_view import names_by_tensor, tensor_of
from ..archs.registry import class_name, spec_for
from ..archs.skeleton import skeleton
from ..cut.formats import pruned_class_and_config
from ..cut.plan import PLAN_FILE, Plan, load_plan, plan_to_json, scales_by_unit
from ..cut.plans import load_plan_at
from ..cut.slicing import cut_tensor, slice_tensor, source_names
from ..errors import HfDmsError, VerificationError
from ..files import load_saved, open_weights
from ..gating.scales import folded_scales
from .stored import Stored, equal, first_mismatch, read, stored_tensors, weight_files


@dataclass(frozen=True)
class StreamedCut:
    """Everything that a cut of files needs.

    Attributes:
        dense: the dense model on the meta device.
        pruned: the cut model on the meta device.
        bound: the dense model's architecture.
        plan: which units stay.
        layout: uniform, per_layer or padded.
        tensors: the dense model's tensors, by the model's names.
        left_out: names in the files for which the model has no parameter. `from_pretrained` ignores them too.
        factors: factors for dense tensors, by name, from the plan's scales.
    """

    dense: PreTrainedModel
    pruned: PreTrainedModel
    bound: BoundSpec
    plan: Plan
    layout: str
    tensors: dict[str, Stored]
    left_out: list[str]
    factors: dict[str, Tensor]


def prepare_cut(folder: Path, plan_path: str | Path, share: float | None = None) -> StreamedCut:
    """Prepare a cut from a checkpoint's config and the headers of its files.

    Args:
        folder: folder of the dense checkpoint.
        plan_path: `dms_plan.json` or its folder; with `share`, `dms_plans.json` or its folder.
        share: for a plan that the search passed: the share of the dense resource that it keeps.

    Raises:
        ValueError: the checkpoint cannot be cut from its files, or the plan belongs to another model.
    """
    # Cheap checks first: names of files, the config, headers, and only then tensors (where the config ties some).
    files = weight_files(folder)
    dense = _dense_on_meta(folder, files[0])
    tensors, left_out = stored_tensors(files, dense)
    if differing := _tied_but_different(tensors, dense):
        warnings.warn(
            f"tie_word_embeddings is true in {folder}/config.json, but {differing} is another tensor than the one that "
            "it is tied to. Both are kept and counted, and the cut model's config will say false.",
            stacklevel=2,
        )
        dense, tensors = _untied(dense, tensors)
    bound = bind(spec_for(dense.config), dense)
    plan, layout = load_plan(plan_path, bound) if share is None else load_plan_at(plan_path, bound, share)
    if wrong := first_mismatch(tensors, dense):
        raise HfDmsError(f"{folder}: {wrong} Is config.json that of the weights?")
    cls, config = pruned_class_and_config(dense, bound, plan, layout)
    factors = folded_scales(scales_by_unit(plan, bound), bound)
    return StreamedCut(dense, skeleton(cls, config, dense.dtype), bound, plan, layout, tensors, left_out, factors)


def write_cut(job: StreamedCut, folder: Path, target: Path) -> dict[str, int]:
    """Write the cut model: weights, config, generation config, plan, and the model file of a per-layer one.

    Args:
        job: the result of `prepare_cut`.
        folder: folder of the dense checkpoint.
        target: an empty folder. The caller renames it if this succeeds (`folders.new_folder`).

    Returns:
        Numbers of parameters, tied ones once, `{"dense": ..., "pruned": ..., "kept": ...}`: of the dense files, of the
        written files, and of the written files without padding.

    Raises:
        VerificationError: the written files are not those that the plan describes.
    """
    _write_all_but_weights(job, folder, target)
    written, unknown = stored_tensors(_write_weights(job, target), job.pruned)
    # `from_pretrained` would ignore an unknown tensor without a word, and fill a missing one with random numbers.
    wrong = f"'{unknown[0]}' has no parameter." if unknown else first_mismatch(written, job.pruned)
    if wrong:
        raise VerificationError(f"The written files are not what {type(job.pruned).__name__} loads: {wrong}")
    return {"dense": _count(job.tensors, job.dense), "pruned": _count(written, job.pruned), "kept": _count_kept(job)}


def _dense_on_meta(folder: Path, file: Path) -> PreTrainedModel:
    """The model of a folder without its weights."""
    config = load_saved(AutoConfig, folder)
    # An architecture without a description is refused before anything else is said about its config.
    spec_for(config)
    if getattr(config, "quantization_config", None) is not None:
        raise HfDmsError(f"{folder} is quantised: packed weights cannot be cut. Use the unquantised checkpoint.")
    cls: Any = getattr(transformers, class_name(config) or "no class", None)
    if cls is None:
        raise HfDmsError(
            f"{folder}/config.json: architectures is {config.architectures}, expected the name of a model class of "
            "transformers first, such as LlamaForCausalLM. Save the model with save_pretrained, which writes it."
        )
    if config.dtype is None:  # from_pretrained takes the first tensor's dtype too
        with open_weights(file) as content:
            config.dtype = content.get_tensor(next(iter(content.keys()))).dtype
    return skeleton(cls, config, config.dtype)


def _tied_but_different(tensors: dict[str, Stored], model: PreTrainedModel) -> str | None:
    """The name of a tensor that the config ties, but that differs in the files from the tensor it is tied to."""
    for names in names_by_tensor(model).values():
        first, *others = [name for name in names if name in tensors] or names[:1]
        for name in others:
            if tensors[name].shape == tensors[first].shape and not equal(tensors[name], tensors[first]):
                return name
    return None


def _untied(model: PreTrainedModel, tensors: dict[str, Stored]) -> tuple[PreTrainedModel, dict[str, Stored]]:
    """The same model on the meta device with untied embeddings, and the tensors for all of its names.

    A name that is missing in the files, because it was tied, gets the tensor that it was tied to.
    """
    shared = dict(tensors)
    for names in names_by_tensor(model).values():
        if stored := [tensors[name] for name in names if name in tensors]:
            shared |= {name: stored[0] for name in names if name not in tensors}
    model.config.tie_word_embeddings = False
    return skeleton(type(model), model.config, model.dtype), shared


def _count(tensors: dict[str, Stored], model: PreTrainedModel) -> int:
    """Parameters in files, tied ones once."""
    # One of the names of each tensor, so that tied ones count once.
    stored = (next(tensors[name] for name in names if name in tensors) for names in names_by_tensor(model).values())
    return sum(prod(tensor.shape) for tensor in stored)


def _count_kept(job: StreamedCut) -> int:
    """Parameters of the cut model without what pads it, tied ones once."""
    sources = source_names(job.pruned, job.bound, job.plan)
    kept = (sources[names[0]] for names in names_by_tensor(job.pruned).values())
    return sum(slice_tensor(job.dense.get_parameter(name), job.bound, name, job.plan).numel() for name in kept)


def _cut(job: StreamedCut, source: str, name: str) -> Tensor:
    tensor, shape = read(job.tensors[source]), tensor_of(job.pruned, name).shape
    if source in job.factors:
        # The factors are float32: the product is rounded once, as `slicing.cut` rounds it.
        tensor = (tensor * job.factors[source]).to(tensor.dtype)
    return cut_tensor(tensor, shape, job.bound, source, job.plan, job.layout).contiguous()


def _write_shard(job: StreamedCut, names: dict[str, str], file: Path) -> None:
    """Cut tensors (name in the dense model → name in the cut model) into a file, and check the file.

    Raises:
        VerificationError: a tensor that is read back is not the slice of its source.
    """
    keys, tensors = {}, {}
    for source, name in names.items():
        tensor = _cut(job, source, name)
        # Files of some architectures (ViT) have other names than the model.
        (keys[source],) = revert_weight_conversion(job.pruned, {name: tensor})
        tensors[keys[source]] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    # The check reads everything again. Without this, both copies of a shard would be in memory.
    del tensors, tensor
    for source, name in names.items():
        # Cut once more from the source, not kept from above: the write is checked against the source itself.
        expected = _cut(job, source, name)
        found = read(Stored(file, keys[source], tuple(expected.shape)))
        same_kind = (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if not same_kind or not torch.equal(_bytes(found), _bytes(expected)):
            raise VerificationError(f"'{name}' was written, but what is read back is not the slice of '{source}'.")


def _write_all_but_weights(job: StreamedCut, folder: Path, target: Path) -> None:
    if job.pruned.can_generate() and (folder / GENERATION_CONFIG_NAME).is_file():
        job.pruned.generation_config = GenerationConfig.from_pretrained(folder)
    # No tensors: the model is on the meta device, and its weights are written one by one.
    job.pruned.save_pretrained(target, state_dict={})
    (target / PLAN_FILE).write_text(plan_to_json(job.plan, job.bound, job.layout), encoding="utf-8")


def _write_weights(job: StreamedCut, target: Path) -> list[Path]:
    """Write one file for each file of the dense model that holds kept tensors."""
    pruned_names = {source: name for name, source in source_names(job.pruned, job.bound, job.plan).items()}
    by_file: dict[Path, dict[str, str]] = {}
    for source, stored in job.tensors.items():
        if source in pruned_names:
            by_file.setdefault(stored.file, {})[source] = pruned_names[source]
    shards = [target / f"{number}.{SAFE_WEIGHTS_NAME}" for number in range(len(by_file))]
    for shard, names in zip(shards, by_file.values()):
        _write_shard(job, names, shard)
    return _name_shards(shards)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)  # compared as bytes, because a NaN does not equal itself


def _name_shards(shards: list[Path]) -> list[Path]:
    """Give files their final names, with an index beside them if there are several."""
    if len(shards) == 1:
        return [shards[0].rename(shards[0].with_name(SAFE_WEIGHTS_NAME))]
    stem, suffix = SAFE_WEIGHTS_NAME.split(".")
    named, weight_map, size = [], {}, 0
    for number, shard in enumerate(shards, 1):
        named.append(shard.rename(shard.with_name(f"{stem}-{number:05}-of-{len(shards):05}.{suffix}")))
        with open_weights(named[-1]) as content:
            for key in content.keys():  # noqa: SIM118 (it is no dict)
                weight_map[key] = named[-1].name
                size += content.get_tensor(key).nbytes
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    shards[0].with_name(SAFE_WEIGHTS_INDEX_NAME).write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    return named
