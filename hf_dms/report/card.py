"""The README.md of a pruned model: a model card that the Hub reads, made from the report.

Its metadata are huggingface_hub's own. Of somebody's machine it tells no more than the last part of a path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from ..config import DMSConfig
from ..tasks.task import TASKS
from .numbers import loading_lines, sizes_table, table

INHERITED = ("language", "license", "license_name", "license_link")  # of the base model's card, as they are there


def model_card(report: dict[str, Any], name: str, base: dict[str, Any] | None = None) -> str:
    """The README.md of a pruned model.

    Args:
        report: the content of `dms_report.json`.
        name: of the pruned model: its repository, or the last part of its folder.
        base: metadata of the dense model's own card, see `base_metadata`.
    """
    recipe = report["recipe"]
    config, task = DMSConfig(**recipe["dms"]), TASKS[recipe["model"]["task"]]
    text = f"""---
{card_data(report, name, base or {}).to_yaml()}
---

# {name}

`{shown(recipe["model"]["path"])}` made smaller with [hf_dms](https://arxiv.org/abs/2405.07194) (Differentiable Model
Scaling): {config.target:g} of its {config.resource} ({config.resource_scope}) kept, layout {config.layout}, pipeline
`{config.pipeline}`.

{table(report)}

{task.metric.capitalize()}: {report["protocol"]} of `{shown(evaluated_on(recipe["data"]))}`.

## Load it

```python
{loading_lines(task.model_class, task.processor_class, report["model_class"], name)}
```

## Sizes, per layer of the dense model

{sizes_table(report["sizes"])}

The recipe, versions and seed are in `dms_report.json`; `report.html` shows it all, offline.
"""
    return str(ModelCard(text))


def card_data(report: dict[str, Any], name: str, base: dict[str, Any]) -> ModelCardData:
    """The metadata of the card; its evaluation results become the Hub's model-index.

    Args:
        report: the content of `dms_report.json`.
        name: of the pruned model.
        base: metadata of the dense model's own card.
    """
    model, data = report["recipe"]["model"], report["recipe"]["data"]
    datasets = base.get("datasets") or []
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    if is_hub_id(data["path"]) and data["path"] not in datasets:
        datasets.append(data["path"])
    return ModelCardData(
        base_model=model["path"] if is_hub_id(model["path"]) else None,
        library_name="transformers",
        pipeline_tag=TASKS[model["task"]].name,
        tags=["dms", "pruned"],
        datasets=datasets or None,
        model_name=name,
        eval_results=[_evaluation(report)],
        **{key: base[key] for key in INHERITED if key in base},
    )


def _evaluation(report: dict[str, Any]) -> EvalResult:
    task, data = TASKS[report["recipe"]["model"]["task"]], report["recipe"]["data"]
    measured = next(report[name] for name in ("recovered", "repaired", "pruned") if name in report)
    return EvalResult(
        task_type=task.name,
        dataset_type=shown(evaluated_on(data)),
        dataset_name=f"{shown(evaluated_on(data))}, {report['protocol']}",
        dataset_config=data["name"],
        metric_type=task.metric,
        metric_name=f"held-out {task.metric}",
        metric_value=measured[task.metric],
    )


def evaluated_on(data: dict[str, Any]) -> str:
    """The held-out file of a recipe's `data` section, or the dataset whose split or share it is."""
    held_out = data["held_out"]
    return held_out if isinstance(held_out, str) and Path(held_out).exists() else data["path"]


def base_metadata(path: str, revision: str | None = None) -> dict[str, Any]:
    """The metadata of the dense model's own card; empty where there is none that can be read now.

    Args:
        path: its folder or Hub id.
        revision: branch, tag or commit on the Hub.
    """
    try:
        card = hf_hub_download(path, "README.md", revision=revision) if is_hub_id(path) else Path(path) / "README.md"
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, no network, or not valid: none of them stops a run
        return {}


def is_hub_id(path: str) -> bool:
    """Whether a model or dataset is meant on the Hub: a valid id, and nothing here has that name."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not Path(path).exists()


def shown(path: str) -> str:
    """A Hub id as it is, a path by its last part."""
    return path if is_hub_id(path) else Path(path).resolve().name
