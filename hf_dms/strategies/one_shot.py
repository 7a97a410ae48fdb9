"""Choose structure without a search: `choose_(model, "flap", batches)`."""

from __future__ import annotations

import importlib

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec
from ..archs.plain_view import adapted_layers, base_model_of, is_packed
from ..config import DMSConfig
from ..errors import HfDmsError, did_you_mean
from ..gates import Gates
from ..gating.attach import gates_of
from .activations import FLAP, WANDA_SP
from .allocate import Batches, Criterion, allocate_
from .block_influence import BLOCK_INFLUENCE
from .candidates import CANDIDATES
from .gisp import GISP
from .hard_concrete import HARD_CONCRETE
from .kfac_obs import KFAC_OBS
from .projected import PROJECTED
from .scaled import SCALED
from .selection import ELEMENT_SELECTION, NUMBER_SELECTION, PAS
from .taylor import TAYLOR, TAYLOR_ELEMENTS
from .topk_variants import VARIANTS
from .weights import MAGNITUDE, RANDOM

CRITERIA: dict[str, Criterion] = {
    "block_influence": BLOCK_INFLUENCE,
    "element_selection": ELEMENT_SELECTION,
    "flap": FLAP,
    "gisp": GISP,
    "hard_concrete": HARD_CONCRETE,
    "kfac_obs": KFAC_OBS,
    "magnitude": MAGNITUDE,
    "number_selection": NUMBER_SELECTION,
    "pas": PAS,
    "projected": PROJECTED,
    "random": RANDOM,
    "scaled": SCALED,
    "taylor": TAYLOR,
    "taylor_elements": TAYLOR_ELEMENTS,
    "wanda_sp": WANDA_SP,
    **CANDIDATES,
    **VARIANTS,
}


def criterion_of(name: str) -> Criterion:
    """A criterion by its name, or your own criterion by its place, `module:NAME`.

    Raises:
        HfDmsError: there is no such criterion.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in CRITERIA:
            raise HfDmsError(
                f"There is no criterion '{name}'.{did_you_mean(name, CRITERIA)} Criteria are {', '.join(CRITERIA)}; "
                "write your own as module:NAME."
            )
        return CRITERIA[name]
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise HfDmsError(f"Criterion '{name}' cannot be imported: {error}.") from error
    if not isinstance(found, Criterion):
        raise HfDmsError(f"'{name}' must be a hf_dms.strategies.allocate.Criterion, got {type(found).__name__}.")
    return found


def choose_(model: PreTrainedModel, name: str | Criterion, batches: Batches = ()) -> None:
    """Set the importance and prune ratios of a model's gates by a one-shot strategy, in place.

    It takes the place of a search or another choice that these gates have been through; only learned scales stay, and
    a strategy that learns masks goes on from them.
    Afterwards `prune(model)` cuts the model exactly as after a search.

    Args:
        model: a model with gates (`attach_`), without adapters or packed weights. Its weights do not change, unless the
            criterion has `changes_weights`. It ends in evaluation mode.
        name: name of the criterion, see `criterion_of`, or the criterion itself.
        batches: keyword arguments of forward passes, with labels if the criterion needs a loss.

    Raises:
        HfDmsError: there is no such criterion, it needs data and there are no batches, or it is not defined for a
            pruned dim; or the model has adapters or packed weights.
    """
    criterion = name if isinstance(name, Criterion) else criterion_of(name)
    gates = gates_of(model)
    if base_model_of(model) is not model or any(adapted_layers(model)) or any(map(is_packed, model.modules())):
        raise HfDmsError(
            "choose_ scores plain weights, and this model has adapters or packed weights. Merge adapters (PEFT's "
            "merge_and_unload) and load the weights unpacked, before attach_."
        )
    check_dims(criterion, str(name), gates)
    if criterion.needs_data and not batches:
        raise HfDmsError(f"Criterion {name} needs batches of data, got none.")
    # Once, because iterative criteria run over them several times.
    batches = [send_to_device(batch, model.device) for batch in batches]
    _start_anew_(gates)
    # From here on a one-shot choice is a search that has ended: the same gates, rounding, cut and proof.
    allocate_(gates, criterion.scores(model, batches), criterion.allocation)
    model.eval()


def _start_anew_(gates: Gates) -> None:
    """Bring gates to where they were before a search or a choice, in place, but for learned scales.

    Some criteria measure the model in evaluation mode, where hard masks would leave out what was cut before.
    """
    kept = {name: state for name, state in gates.search_state().items() if name.startswith("scale_")}
    undone = {f"importance_{name}": torch.zeros_like(gates.raw_importance(name)) for name in gates.dims}
    undone |= {"prune_ratio": torch.zeros_like(gates.prune_ratio), "num_updates": torch.tensor(0)}
    gates.load_search_state_(kept | undone)
    gates.scale_power = 0.0  # the scores of a strategy rank units by themselves
    gates.clamp_ratios_()


def check_choice(config: DMSConfig, gates: Gates, bound: BoundSpec) -> None:
    """Check that the strategy of a request can do what it asks for.

    Raises:
        HfDmsError: there is no such strategy, it is not defined for a pruned dim, or it learns no scales.
    """
    criterion = criterion_of(config.strategy)
    check_dims(criterion, config.strategy, gates, bound)
    if config.scales and not criterion.learns_masks:
        others = ", ".join(name for name, other in CRITERIA.items() if other.learns_masks)
        raise HfDmsError(
            f"dms.strategy = {config.strategy} learns no masks, and so no scales. Leave dms.scales out, or take a "
            f"strategy that learns masks: {others}."
        )


def check_dims(criterion: Criterion, name: str, gates: Gates, bound: BoundSpec | None = None) -> None:
    """Check that a criterion is defined for the dims that are pruned.

    Args:
        criterion: the criterion.
        name: its name, for the message.
        gates: the gates of the pruned dims.
        bound: the architecture. Default: the one that the gates are attached to.

    Raises:
        HfDmsError: it is not defined for a dim.
    """
    spec = (bound or gates.attachment.bound).spec
    wrong = [dim for dim in gates.dims if spec.dim(dim).scope not in criterion.dims]
    if wrong:
        others = [dim for dim in gates.dims if dim not in wrong]
        advice = f"Prune {', '.join(others)} alone" if others else "Prune other dims"
        raise HfDmsError(f"Criterion {name} is not defined for {', '.join(wrong)}. {advice}, or choose another one.")
