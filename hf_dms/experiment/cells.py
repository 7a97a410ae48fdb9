"""The cells of a comparison, a strategy with a target and a seed each, and the recipe that each of them stands for."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from ..config import SEARCH, DMSConfig
from ..errors import HfDmsError
from ..strategies.one_shot import CRITERIA, criterion_of
from .recipe import LENGTHS, Recipe, build_recover
from .sections import RecoverConfig
from .values import coerce_fields


@dataclass(frozen=True)
class Cell:
    """One row of the table, to be made.

    Attributes:
        strategy: name in the table.
        settings: `criterion` for a one-shot strategy; and values of the sections `dms`, `train` and `recover` that
            replace the recipe's.
        target, seed: target and seed of this cell.
    """

    strategy: str
    settings: dict[str, Any]
    target: float
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def cells_of(recipe: Recipe) -> list[Cell]:
    """All cells of a recipe, in the order in which they are made.

    Raises:
        HfDmsError: no strategies, or one that does not exist.
    """
    config = recipe.compare
    if recipe.model.supernet is not None:
        raise HfDmsError(
            "hf-dms compare cuts one dense model, and its target is a share of that model. With model.supernet the "
            "target is a share of another model. Run hf-dms prune for each strategy, or leave model.supernet out."
        )
    if not config.strategies:
        raise HfDmsError("compare.strategies is required: names of strategies, such as {dms: {}, taylor: {}}.")
    named = {name: _strategy(name, settings or {}) for name, settings in config.strategies.items()}
    # Seeds are the outermost loop, so that a comparison that is stopped early has all strategies of a seed.
    combinations = itertools.product(config.seeds, config.targets or [recipe.dms.target], named.items())
    return [Cell(name, settings, target, seed) for seed, target, (name, settings) in combinations]


def _strategy(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a strategy. Without `criterion`, its name is that of a criterion, or begins with dms."""
    known = ("criterion", "dms", "train", "recover")
    inner = settings if isinstance(settings, dict) else {}
    for key, section in {name: settings, **{f"{name}.{key}": inner.get(key) for key in known[1:]}}.items():
        if not isinstance(section, dict | None):
            raise HfDmsError(f"compare.strategies.{key} must be a section with keys, got {section!r}.")
    if unknown := set(settings) - set(known):
        raise HfDmsError(f"compare.strategies.{name} has no key '{min(unknown)}'; keys are {', '.join(known)}.")
    if "criterion" not in settings and name in CRITERIA:
        settings = settings | {"criterion": name}
    if "criterion" in settings:
        criterion_of(settings["criterion"])
    elif name.partition("-")[0] != "dms":
        raise HfDmsError(
            f"compare.strategies.{name}: name a criterion ({', '.join(CRITERIA)}) as criterion:, or let the name of a "
            "search begin with dms, such as dms-fast-decay: {dms: {importance_decay: 0.9}}."
        )
    dms = coerce_fields(DMSConfig, settings.get("dms") or {}, f"compare.strategies.{name}.dms")
    if "strategy" in dms:
        raise HfDmsError(f"compare.strategies.{name}.dms.strategy: write it as criterion: {dms['strategy']}.")
    own = settings.get("recover") or {}
    if "data" in own:
        raise HfDmsError(
            f"compare.strategies.{name}.recover.data: all strategies recover on the same data. Write it outside of "
            "compare, as recover.data."
        )
    try:
        build_recover(own)
    except HfDmsError as error:
        raise HfDmsError(f"compare.strategies.{name}: {error}") from error
    return settings | ({"dms": dms} if dms else {})


def recipe_of(recipe: Recipe, cell: Cell) -> Recipe:
    """The recipe with the values of a cell, which win over its own."""
    strategy, values = cell.settings.get("criterion", SEARCH), cell.settings.get("dms") or {}
    dms = dataclasses.replace(recipe.dms, **values, target=cell.target, strategy=strategy)
    train = _with(recipe.train, cell.settings.get("train") or {}) | {"seed": cell.seed, "save_strategy": "no"}
    own = cell.settings.get("recover")
    recover = _recover_with(recipe.recover, own) if own else recipe.recover
    return dataclasses.replace(recipe, dms=dms, train=train, recover=recover)


def _recover_with(recover: RecoverConfig, own: dict[str, Any]) -> RecoverConfig:
    """A `recover` section with other values: each key of `own` replaces what it names, whole sections too."""
    sections = [field.name for field in dataclasses.fields(RecoverConfig) if field.name in own]
    train = {key: value for key, value in own.items() if key not in sections}
    built = build_recover(own)
    changed = {name: getattr(built, name) for name in sections}
    return dataclasses.replace(recover, **changed, train=_with(recover.train or {}, train) if train else recover.train)


def _with(train: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Values of a training with other ones; a length replaces the length, whether in steps or in epochs."""
    has_length = any(key in own for key in LENGTHS)
    return {key: value for key, value in train.items() if not (has_length and key in LENGTHS)} | own
