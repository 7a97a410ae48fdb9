"""The class of each label in the data. A trained head keeps its classes; a label is the name of a class or its number.

All labels of the data are read by the same rule (`read_labels`, `number_labels`):

1. A label that is text, or the name in a `ClassLabel`, is the name of a class. If not all match exactly, case and
   surrounding blanks are ignored.
2. A label that is a whole number (an integer, a float, a bool, or text of one) is the number of a class.
3. The number in a `ClassLabel` is the number of a class if the head has no names of its own (LABEL_0, LABEL_1, ...).

If rules 1 and 2 both read all labels and give different classes, or no rule reads them all, the error names both lists.
A head that is not trained gets the classes of the data: numbers in order, names in alphabetical order.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from ..errors import HfDmsError
from .data import DataConfig
from .sources import Source

logger = logging.get_logger(__name__)
SHOWN = 20  # an error lists at most this many labels


@dataclass(frozen=True)
class Label:
    """A label of the data.

    Attributes:
        name: its text.
        number: its value if it is a whole number, or else None.
        index: its number in a `ClassLabel`, if the author of the data numbered the labels.
        is_class_name: whether it is one of the names of a `ClassLabel`.
    """

    name: str
    number: int | None
    index: int | None = None
    is_class_name: bool = False


@dataclass(frozen=True)
class LabelColumn:
    """The label of every row, or of every object in the rows.

    Attributes:
        labels: labels of all rows, in order.
        names: all names of a `ClassLabel`, including classes that do not occur; None if the column is none.
        cell: function from an index of `labels` to words that say where that label is.
        option: key of the `data` section that names the column.
    """

    labels: list[Label]
    names: tuple[str, ...] | None
    cell: Callable[[int], str]
    option: str = "label_column"


@dataclass(frozen=True)
class Head:
    """The classes that a model's config names.

    Attributes:
        names: names of the classes, in the order of their numbers.
        is_fixed: whether the head is trained, so that its classes must not change.
        fewest: smallest number of classes of such a head.
    """

    names: tuple[str, ...]
    is_fixed: bool
    fewest: int = 2

    @property
    def has_own_names(self) -> bool:
        return not all(re.fullmatch(r"LABEL_\d+", name) for name in self.names)


def head_of(config: Any, ending: str, is_new: bool = False, fewest: int = 2) -> Head:
    """The classes of a model, for one class per example or object.

    Args:
        config: the model's config.
        ending: ending of the names of model classes with such a head. The config names the class that was saved. If it
            names none, the head is taken to be trained.
        is_new: whether the head is randomly initialised, also if the config names classes.
        fewest: smallest number of classes of such a head.

    Raises:
        HfDmsError: the head is for regression or for several labels at once.
    """
    saved_as = config.architectures or ["?" + ending]
    is_fixed = not is_new and any(name.endswith(ending) for name in saved_as)
    kind = config.problem_type
    # transformers takes a saved head with one output for a regression.
    if kind in (None, "single_label_classification") and is_fixed and config.num_labels < fewest:
        kind = "regression"
    if kind not in (None, "single_label_classification"):
        raise HfDmsError(
            f"model.path: the head is for {kind.replace('_', ' ')} ({config.num_labels} outputs); hf_dms takes heads "
            "for one class per example, problem_type single_label_classification."
        )
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise HfDmsError(
            f"model.path: id2label in config.json has the numbers {sorted(config.id2label)}, not 0, 1, ..."
        )
    return Head(tuple(str(config.id2label[number]) for number in range(config.num_labels)), is_fixed, fewest)


# ---- reading a column ------------------------------------------------------------------------------------------------
def read_labels(source: Source, config: DataConfig) -> LabelColumn:
    """The label of every row.

    Raises:
        HfDmsError: there is no such column, a row has no label, or a label is not a class.
    """
    column = config.label_column
    source.check_column(config, "label_column")
    names = getattr(source.rows.features[column], "names", None)
    values = enumerate(source.rows.select_columns([column])[:][column])
    labels = labels_of(values, names, source, column)
    return LabelColumn(labels, None if names is None else tuple(names), lambda row: source.cell(row, column))


def labels_of(values: Iterable[tuple[int, Any]], names: list[str] | None, source: Source, column: str) -> list[Label]:
    """Labels of values.

    Args:
        values: pairs of the row's number and its value.
        names: names of a `ClassLabel`, if the values are its numbers.
        source: the source of the rows, for errors.
        column: the column of the values, for errors.

    Raises:
        HfDmsError: a row has no label, or a label is not a class.
    """
    known: dict[tuple[type, Any], Label] = {}
    labels = []
    for row, value in values:
        if isinstance(value, list | tuple | dict):
            raise HfDmsError(
                f"{source.cell(row, column)} holds several labels, {value!r:.60}. hf_dms takes one class per example."
            )
        # By type too: True and 1 and 1.0 are equal in Python, and are different labels here.
        if (type(value), value) not in known:
            known[type(value), value] = _label(value, names, source, row, column)
        labels.append(known[type(value), value])
    return labels


def _label(value: Any, names: list[str] | None, source: Source, row: int, column: str) -> Label:
    # `value != value` is true for NaN only.
    is_missing = value is None or value != value or (isinstance(value, str) and not value.strip())
    if is_missing or (names is not None and not 0 <= value < len(names)):
        raise HfDmsError(f"{source.cell(row, column)} has no label ({value!r}). Leave such rows out, or label them.")
    if names is not None:
        return Label(names[value], _whole(names[value]), value if source.has_own_numbers else None, True)
    number = _whole(value)
    if number is None and not isinstance(value, str):
        raise HfDmsError(
            f"{source.cell(row, column)} holds {value!r}, which is not a class. Labels are names or whole numbers; "
            "regression is not supported."
        )
    # 1.0 is the class 1, which must not be called 1.0.
    return Label(str(number) if isinstance(value, float) else str(value), number)


def _whole(value: Any) -> int | None:
    """The whole number of a value or its text; None if it is not a whole number."""
    if isinstance(value, str):
        # Up to 15 digits, which a float holds exactly.
        text = value.strip()
        return int(float(text)) if re.fullmatch(r"-?\d{1,15}(\.0*)?", text) else None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else None
    return int(value) if isinstance(value, int) else None


# ---- classes ---------------------------------------------------------------------------------------------------------
def number_labels(train: LabelColumn, held_out: LabelColumn, head: Head) -> tuple[tuple[str, ...], dict[Label, int]]:
    """Names of the classes in order, and the number of each label of the data.

    Args:
        train: labels of the training data.
        held_out: labels of the held-out data.
        head: the model's classes.

    Raises:
        HfDmsError: the labels are not classes of the head, or can be read in two ways, or there are too few classes.
    """
    labels, option = {*train.labels, *held_out.labels}, train.option
    if head.is_fixed:
        numbers = _read_as_classes(labels, head, option)
        if numbers is None:
            raise HfDmsError(_unlike(labels, head, option) + _first_unlike((train, held_out), head))
        return head.names, numbers
    numbers = _read_as_classes(labels, head, option) if head.has_own_names else _by_name(labels, head.names)
    return _own_classes(train, held_out, head.fewest) if numbers is None else (head.names, numbers)


def _read_as_classes(labels: set[Label], head: Head, option: str) -> dict[Label, int] | None:
    """The class of each label, by the rule that reads all labels; None if no rule does."""
    by_name, count = _by_name(labels, head.names), len(head.names)
    # In a ClassLabel the author has said that these are names, so digits among them are not numbers.
    if by_name is not None and all(label.is_class_name for label in labels):
        return by_name
    by_number = _in_range({label: label.number for label in labels}, count)
    by_index = None if head.has_own_names else _in_range({label: label.index for label in labels}, count)
    readings = [reading for reading in (by_name, by_number, by_index) if reading is not None]
    if any(reading != readings[0] for reading in readings):
        raise HfDmsError(
            f"data.{option}: the labels {_listed(labels)} can be read as names and as numbers of different classes "
            f"of the model, {', '.join(head.names[:SHOWN])}. Write the names, in a ClassLabel column."
        )
    return readings[0] if readings else None


def _by_name(labels: set[Label], names: tuple[str, ...]) -> dict[Label, int] | None:
    """Classes by name: all exactly, or else all regardless of case and blanks, with a warning.

    A name that several classes share is ignored: models of COCO have ten classes `N/A` that never occur.
    """
    exact = _numbers_by_name(names)
    if all(label.name in exact for label in labels):
        return {label: exact[label.name] for label in labels}
    plain = _numbers_by_name([_plain(name) for name in names])
    if not all(_plain(label.name) in plain for label in labels):
        return None
    logger.warning(f"The labels {_listed(labels)} are taken as {', '.join(names[:SHOWN])}, regardless of case.")
    return {label: plain[_plain(label.name)] for label in labels}


def _numbers_by_name(names: Sequence[str]) -> dict[str, int]:
    """The numbers of the classes that have a unique name."""
    times = Counter(names)
    return {name: number for number, name in enumerate(names) if times[name] == 1}


def _plain(name: str) -> str:
    return name.strip().casefold()


def _in_range(numbers: dict[Label, int | None], count: int) -> dict[Label, int] | None:
    """The numbers, if all labels have one and every number is that of a class; or else None."""
    found = {label: number for label, number in numbers.items() if number is not None and 0 <= number < count}
    return found if len(found) == len(numbers) else None


def _own_classes(train: LabelColumn, held_out: LabelColumn, fewest: int) -> tuple[tuple[str, ...], dict[Label, int]]:
    """The classes of the data, for a new head."""
    names = train.names or tuple(_in_order(train.labels))
    if not names:
        raise HfDmsError(f"data.{train.option}: no row of data.path has an object, so there are no classes to learn.")
    if len(names) < fewest:
        raise HfDmsError(f"data.{train.option}: all labels are {names[0]!r}. A classifier needs two classes at least.")
    places = {name: place for place, name in enumerate(names)}
    for name in _in_order(held_out.labels):
        if name not in places:
            raise HfDmsError(
                f"data.held_out: label '{name}' is not among those of data.path: {', '.join(names[:SHOWN])}."
            )
    return names, {label: places[label.name] for label in {*train.labels, *held_out.labels}}


# ---- words -----------------------------------------------------------------------------------------------------------
def _in_order(labels: Iterable[Label]) -> list[str]:
    """The names of labels, sorted by number if all are numbers, or else as text."""
    distinct = set(labels)
    if all(label.number is not None for label in distinct):
        return list(
            dict.fromkeys(label.name for label in sorted(distinct, key=lambda label: (label.number, label.name)))
        )
    return sorted({label.name for label in distinct})


def _listed(labels: Iterable[Label]) -> str:
    names = _in_order(labels)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _unlike(labels: set[Label], head: Head, option: str) -> str:
    classes = ", ".join(f"{name} ({number})" for number, name in enumerate(head.names[:SHOWN]))
    return (
        f"data.{option}: the labels are {_listed(labels)}; the model has the classes {classes}"
        f"{', ...' if len(head.names) > SHOWN else ''}. A label must be the name or the number of one of them, because "
        "a trained head is never relabelled. Rename them in the data or in the model's config.json (id2label), or give "
        "a model without a head (architectures in its config.json names none); it gets the classes of the data."
    )


def _first_unlike(columns: Iterable[LabelColumn], head: Head) -> str:
    """Where the first label is that is neither the name nor the number of a class, as a sentence; empty without one."""
    names, count = {_plain(name) for name in head.names}, len(head.names)
    for column in columns:
        for place, label in enumerate(column.labels):
            is_number = label.number is not None and 0 <= label.number < count
            if _plain(label.name) not in names and not is_number:
                return f" {column.cell(place)} has the first label that is no class, '{label.name}'."
    return ""
