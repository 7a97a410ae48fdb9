"""Batches for least squares on tiny models, inputs and outputs of their modules, and cuts by a plan."""

import torch
from helpers.tiny import token_batch

from hf_dms.archs.bind import bind
from hf_dms.archs.registry import ARCHS, spec_for
from hf_dms.cut.slicing import cut


def text(seed, batches=12, padded=2):
    """Random tokens, the last of each sequence padding."""
    for number in range(batches):
        batch = token_batch(6, 12, seed=100 * seed + number)
        batch["attention_mask"][:, 12 - padded :] = 0
        yield batch


def images(model, seed, batches=12):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        side = model.config.image_size
        yield {"pixel_values": torch.randn(6, 2, side, side, generator=generator).to(model.dtype)}


def batches_for(model, seed=1, batches=12):
    if model.main_input_name == "pixel_values":
        return list(images(model, seed, batches))
    return list(text(seed, batches))


def labelled_batches(model, seed=1, batches=12):
    """The same batches with labels."""
    found = batches_for(model, seed, batches)
    for batch in found:
        classes = torch.arange(6) % 3
        batch["labels"] = classes if "pixel_values" in batch else batch["input_ids"]
    return found


def layers_of(model):
    return model.base_model.get_submodule(ARCHS[model.config.model_type.removeprefix("dms_")].layers)


def bound_of(model):
    return bind(spec_for(model.config), model)


def cut_by(model, plan, layout="per_layer"):
    return cut(model, bound_of(model), plan, layout)


@torch.no_grad()
def captured(model, module, batches):
    """Inputs and outputs of a module at the positions that count, in a forward pass of the whole model."""
    inputs, outputs = [], []

    def keep(_, args, output):
        inputs.append(args[0])
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hook = module.register_forward_hook(keep)
    for batch in batches:
        model(**{name: value for name, value in batch.items() if name != "labels"})
    hook.remove()
    shape = inputs[0].shape[:2]
    counts = [batch.get("attention_mask", torch.ones(shape)).bool() for batch in batches]
    return [torch.cat([tensor[rows] for tensor, rows in zip(found, counts)]) for found in (inputs, outputs)]


NORMS = {"bert": "output.LayerNorm", "electra": "output.LayerNorm", "distilbert": "output_layer_norm"}


def stream_after(model, layer, batches):
    """The residual stream behind a layer's last map, before a norm that the stream itself passes."""
    norm = NORMS.get(model.config.model_type, "")
    return captured(model, layers_of(model)[layer].get_submodule(norm), batches)[0 if norm else 1]


def weights_of_positions(model, layer, batches):
    """The weight of each position in the least squares of a layer's last map."""
    return 1 / stream_after(model, layer, batches).square().mean(1, keepdim=True)
