"""The README.md of a pruned model: a model card for the Hub, made from the content of `dms_report.json`.

Its metadata follow huggingface_hub's schema. Like the report, it shows only the last part of local paths, `.../name`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from ..config import SEARCH, DMSConfig
from ..tasks.registry import TASKS, task_of_class
from .numbers import METRICS, columns_of, heading, loading_lines, network_of, notes, report_table, sizes_table

LOCAL = ".../"  # replaces all but the last part of a local path in a report
INHERITED = ("language", "license", "license_name", "license_link")  # copied from the base model's card
DMS = "[hf_dms](https://arxiv.org/abs/2405.07194) (Differentiable Model Scaling)"


def model_card(report: dict[str, Any], name: str, base: dict[str, Any] | None = None) -> str:
    """The README.md of a model pruned by a recipe, or cut from files by a plan.

    Args:
        report: the content of `dms_report.json`.
        name: name of the pruned model: its repository, or the last part of its folder.
        base: metadata of the dense model's own card, see `base_metadata`.
    """
    text = f"""---
{card_data(report, name, base or {}).to_yaml()}
---

# {name}

{_origin(report)}

{report_table(report)}
{_protocol(report)}{"".join(f"{chr(10)}{note}{chr(10)}" for note in notes(report))}
## Load it

```python
{loading_lines(report["model_class"], name)}
```

## Sizes, per layer of the {network_of(report.get("recipe"))}

{sizes_table(report["sizes"])}

`dms_report.json` says how it was made; `report.html` shows it all, offline.
"""
    return str(ModelCard(text))


def _origin(report: dict[str, Any]) -> str:
    source = f"`{source_of(report)}`"
    if "recipe" not in report:
        return (
            f"{source} cut with {DMS} by the plan of a finished search, `dms_plan.json`; layout {report['layout']}. "
            "Every tensor was read back and equals the slice of its source. "
            "Nothing was trained or measured after the cut."
        )
    config = DMSConfig(**report["recipe"]["dms"])
    if "original" in report:
        return _found(report, config)
    random = " Its weights were random when the search began." if heading(report, "dense") == "random" else ""
    if config.strategy != SEARCH:
        return (
            f"{source} made smaller with [hf_dms](https://arxiv.org/abs/2405.07194): {config.target:g} of its "
            f"{config.resource} ({config.resource_scope}) kept, layout {config.layout}, its units chosen by "
            f"`{config.strategy}`, without a search."
        )
    return (
        f"{source} made smaller with {DMS}: {config.target:g} of its {config.resource} ({config.resource_scope}) kept, "
        f"layout {config.layout}, pipeline `{config.pipeline}`.{random}"
    )


def _found(report: dict[str, Any], config: DMSConfig) -> str:
    """The first paragraph for a network that was found in a supernet."""
    larger = report["recipe"]["model"]["supernet"]
    trained = {"fresh": "fresh weights", "searched": "the weights of the search"}
    state = "that was trained first" if report["recipe"]["finetune"] else "of random weights"
    begun = trained[report["recipe"]["recover"]["weights"] or "fresh"]
    return (
        f"A network like `{source_of(report)}`, found with {DMS}: its widths and depths were searched in a supernet "
        f"{state}, {larger['width']:g} times as wide and {larger['depth']:g} times as deep, for at most "
        f"{report['original']['target']:.4g} of the original's {config.resource} ({config.resource_scope}); layout "
        f"{config.layout}, pipeline `{config.pipeline}`."
        + (f" It was then trained from {begun}." if "recovered" in report else "")
    )


def _protocol(report: dict[str, Any]) -> str:
    """The line about what quality was measured on; empty for a cut by a plan, which measures nothing."""
    if "recipe" not in report:
        return ""
    task = TASKS[report["recipe"]["model"]["task"]]
    words = METRICS[task.metric][0]
    words = words.capitalize() if words.islower() else words
    return f"\n{words}: {report['protocol']} of `{evaluated_on(report['recipe']['data'])}`.\n"


# ---- metadata --------------------------------------------------------------------------------------------------------
def card_data(report: dict[str, Any], name: str, base: dict[str, Any]) -> ModelCardData:
    """The metadata of the card. The Hub shows its evaluation results as model-index.

    Args:
        report: the content of `dms_report.json`.
        name: name of the pruned model.
        base: metadata of the dense model's own card.
    """
    recipe = report.get("recipe")
    given = {"license": _model(report)["license"]} if _model(report).get("license") else {}
    task = TASKS[recipe["model"]["task"]] if recipe else task_of_class(report["model_class"])
    results = _evaluation(report) if recipe else []
    return ModelCardData(
        base_model=_base_model(report, base),
        library_name="transformers",
        pipeline_tag=task.name if task else None,
        tags=["dms", "pruned"],
        datasets=_datasets(base, recipe["data"]["path"] if recipe else None) or None,
        model_name=name if results else None,
        eval_results=results or None,
        **{key: base[key] for key in INHERITED if key in base and not (given and key.startswith("license"))},
        **given,
    )


def _base_model(report: dict[str, Any], base: dict[str, Any]) -> str | list[str] | None:
    """The dense model's id on the Hub: from the recipe, its path, or the card or config in its folder."""
    path = _model(report)["path"]
    if "recipe" in report and report["recipe"]["dms"]["pipeline"] == "np":
        return None  # nothing of its weights is in the result
    return _model(report).get("base") or (path if is_hub_id(path) else base.get("base_model"))


def _datasets(base: dict[str, Any], path: str | None) -> list[str]:
    """The datasets of the dense model's card, and the dataset of the recipe."""
    datasets = base.get("datasets") or []
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    return [*datasets, path] if path and is_hub_id(path) and path not in datasets else datasets


def _evaluation(report: dict[str, Any]) -> list[EvalResult]:
    """The score of the last model of a recipe; empty if it is not a finite number."""
    data, task = report["recipe"]["data"], TASKS[report["recipe"]["model"]["task"]]
    value = report[columns_of(report)[-1]][task.metric]
    if value is None:
        return []
    result = EvalResult(
        task_type=task.name,
        dataset_type=evaluated_on(data),
        dataset_name=f"{evaluated_on(data)}, {report['protocol']}",
        dataset_config=data["name"],
        metric_type=task.metric,
        metric_name=f"held-out {METRICS[task.metric][0]}",
        metric_value=value,
    )
    return [result]


def evaluated_on(data: dict[str, Any]) -> str:
    """The held-out file of a recipe's `data` section, or the dataset whose split or share it is."""
    held_out = data["held_out"]
    is_file = isinstance(held_out, str) and held_out.startswith(LOCAL)
    return (held_out if is_file else data["path"]).removeprefix(LOCAL)


def _model(report: dict[str, Any]) -> dict[str, Any]:
    return report["recipe"]["model"] if "recipe" in report else report["model"]


def source_of(report: dict[str, Any]) -> str:
    """The dense model's id, or the last part of its folder."""
    return _model(report)["path"].removeprefix(LOCAL)


def base_metadata(path: str, revision: str | None = None) -> dict[str, Any]:
    """The metadata of the dense model's own card; empty if there is no card that can be read.

    If the config in a local folder names the Hub model that it is a copy of, that becomes `base_model`.

    Args:
        path: folder or Hub id of the dense model.
        revision: branch, tag or commit on the Hub.
    """
    try:
        card = hf_hub_download(path, "README.md", revision=revision) if is_hub_id(path) else Path(path) / "README.md"
        found = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, no network or invalid: a card is not worth failing for
        found = {}
    # The Hub shows a model below its base only if the card names it.
    copied = _copy_of(Path(path))
    return found if copied is None else found | {"base_model": copied}


def _copy_of(folder: Path) -> str | None:
    """The Hub id in the config of a folder, which transformers writes there when a Hub model is saved; or None."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) and "/" in name and is_hub_id(name) else None


def is_hub_id(path: str) -> bool:
    """Whether a path means a model or dataset on the Hub: it is a valid id, and no local file has that name."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not Path(path).exists()
