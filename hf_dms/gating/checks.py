"""Which models can have gates: checks that run before anything changes a model, each with its own error."""

from __future__ import annotations

import functools
import warnings

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel

from ..archs.plain_view import PACKED, names_by_tensor, plain_parameters
from ..archs.skeleton import config_as_tied, skeleton, untied_names
from ..errors import HfDmsError


def check_model(model: object, function: str) -> None:
    """Check that a model is a `PreTrainedModel`, not a wrapper around one. The caller unwraps a `PeftModel` first.

    Args:
        model: the user's argument.
        function: name of the function that got it, for the message.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(model, PreTrainedModel):
        return
    inner = extract_model_from_parallel(model, keep_torch_compile=False) if isinstance(model, nn.Module) else model
    inside = f" around a {type(inner).__name__}. Pass the model inside it, and wrap it afterwards."
    raise HfDmsError(
        f"{function} takes a transformers PreTrainedModel, got {type(model).__name__}"
        + ("." if inner is model else inside)
    )


def check_attachable(model: PreTrainedModel) -> None:
    """Check that a model's weights are loaded, unsharded plain tensors, and that no fused kernel bypasses the gates.

    Raises:
        ValueError: a weight is missing, sharded or quantised in an unsupported way, or kernels replace modules.
    """
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if getattr(model, "is_quantized", False) and method != "bitsandbytes":
        raise HfDmsError(
            f"This model is quantised by {method or 'an unknown method'}, whose weights cannot be cut. Load it without "
            "quantisation, or in 8 or 4 bits by bitsandbytes."
        )
    for name, parameter, _ in plain_parameters(model):
        if parameter.device.type == "meta":
            raise HfDmsError(
                f"Parameter '{name}' is on the meta device and has no weights: the model was never loaded, or a "
                "device_map offloads that part. Load it with from_pretrained, on one device."
            )
        # By name: bitsandbytes is not imported for a model that does not use it.
        packed = type(parameter).__name__ in PACKED
        if (type(parameter) is not nn.Parameter and not packed) or parameter.numel() == 0:
            kind = type(parameter).__name__ if parameter.numel() else "tensor without elements"
            raise HfDmsError(
                f"Parameter '{name}' is a {kind}, not a whole plain tensor: the model is sharded (FSDP, tensor "
                "parallel, ZeRO-3) or quantised. Load it on one device, without either."
            )
    if getattr(model, "use_kernels", False):
        raise HfDmsError("use_kernels=True replaces norms and MLPs by fused kernels that bypass the gates. Set it off.")
    check_checkpointing(model)


def check_checkpointing(model: nn.Module) -> None:
    """Check that activation checkpointing, if it is on, is not reentrant.

    Reentrant checkpointing runs a separate backward pass for each layer. The masks of all layers belong to one graph,
    which the first of these passes would free.

    Raises:
        ValueError: it is reentrant.
    """
    for module in model.modules():
        # transformers keeps the checkpointing function, with its options bound, on each module that uses it.
        checkpointing = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpointing, functools.partial) and checkpointing.keywords.get("use_reentrant"):
            raise HfDmsError(
                "This model has activation checkpointing with use_reentrant=True, which the gates cannot work with. "
                "Leave it out: non-reentrant is the default."
            )


def check_as_built(model: PreTrainedModel) -> None:
    """Check that a model has the parameters that its class and config define.

    The cut model is built from class and config, so a parameter that they do not know would be lost. One difference is
    accepted, with a warning: embeddings that the config ties but that are separate tensors, as merged checkpoints have.

    Raises:
        ValueError: a parameter is missing, added, of another shape, tied or untied.
    """
    built = skeleton(type(model), model.config)
    untied = untied_names(model, built)
    if untied:
        built = skeleton(type(model), config_as_tied(model))
    # Names of both: a parameter that is only in one of the two would be lost, or random, in the cut model.
    found, expected = _shapes_and_owners(model), _shapes_and_owners(built)
    for name in [*found, *expected]:
        if found.get(name) != expected.get(name):
            raise HfDmsError(
                f"Parameter '{name}' {_in_words(found.get(name), name)} here, and "
                f"{_in_words(expected.get(name), name)} in a "
                f"{type(model).__name__} built from this model's config. A module was replaced, wrapped or "
                "quantised, or the parameter resized, tied or untied by hand. Put gates on the model as "
                "from_pretrained returns it, and change it afterwards."
            )
    if untied:
        warnings.warn(
            f"tie_word_embeddings is true in this model's config, but {untied[0]} is a tensor of its own. Both are "
            "kept and counted, and the cut model's config will say false.",
            stacklevel=3,  # the caller of attach_
        )


def _shapes_and_owners(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape of every parameter by name, and the first name of the tensor."""
    owners = names_by_tensor(model)
    return {name: (shape, owners[id(parameter)][0]) for name, parameter, shape in plain_parameters(model)}


def _in_words(shape_and_owner: tuple[tuple[int, ...], str] | None, name: str) -> str:
    if shape_and_owner is None:
        return "does not exist"
    shape, owner = shape_and_owner
    return f"has shape {shape}" + ("" if owner == name else f" and is tied to '{owner}'")
