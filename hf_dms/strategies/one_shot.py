"""Choose structure in one shot: `choose_(model, "flap", batches)` in place of a search."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..errors import HfDmsError
from ..gating.attach import gates_of
from .activations import FLAP, WANDA_SP
from .allocate import Batches, Criterion, allocate_
from .block_influence import BLOCK_INFLUENCE
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
    **VARIANTS,
}


def choose_(model: PreTrainedModel, name: str, batches: Batches = ()) -> None:
    """Leave importance and prune ratios of a one-shot criterion in the gates of a model, in place.

    After it, `prune(model)` cuts the model exactly as it would after a search.

    Args:
        model: a model with gates (`attach_`); its weights stay as they are, unless the criterion says
            `changes_weights`. It ends in evaluation mode.
        name: of the criterion, see `CRITERIA`.
        batches: keyword arguments of forward passes, with labels where the criterion needs a loss.

    Raises:
        HfDmsError: no such criterion, no batches for one that needs data, or a dim that it is not defined for.
    """
    gates = gates_of(model)
    check_criterion(name, [gates.attachment.bound.spec.dim(dim).scope for dim in gates.dims], list(gates.dims))
    criterion = CRITERIA[name]
    if criterion.needs_data and not batches:
        raise HfDmsError(f"Criterion {name} needs batches of data, got none.")
    allocate_(gates, criterion.scores(model, batches), criterion.allocation)
    model.eval()


def check_criterion(name: str, scopes: list[str], dims: list[str]) -> None:
    """Check that there is such a criterion, and that it is defined for the dims that are pruned.

    Args:
        name: of the criterion.
        scopes: the scope of each pruned dim.
        dims: their names.

    Raises:
        HfDmsError: it is not.
    """
    if name not in CRITERIA:
        raise HfDmsError(f"There is no criterion '{name}'. Criteria are {', '.join(CRITERIA)}.")
    wrong = [dim for dim, scope in zip(dims, scopes) if scope not in CRITERIA[name].dims]
    if wrong:
        others = [dim for dim in dims if dim not in wrong]
        advice = f"Prune {', '.join(others)} alone" if others else "Prune other dims"
        raise HfDmsError(f"Criterion {name} is not defined for {', '.join(wrong)}. {advice}, or choose another one.")
