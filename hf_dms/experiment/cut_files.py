"""`hf-dms prune --plan`: a dense checkpoint cut from its files by the plan of a finished search.

Nothing is trained or measured here; the report says what was cut and how that was proved.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, snapshot_download

from ..checkpoint.folders import check_writable, new_folder
from ..checkpoint.stream import StreamedCut, prepare_cut, write_cut
from ..cut.modeling_dms import auto_class_of
from ..errors import HfDmsError
from ..report.card import is_hub_id, shown
from ..report.numbers import REPORT, as_written, loading_lines, shape, sizes_table, table, to_json, versions
from ..report.page import PAGE, render
from .sections import ModelConfig, OutputConfig

PROCESSOR_FILES = (  # what tokenizers and image processors of transformers write
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "spiece*"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json"),
)


def cut_by_plan(plan: str, model: ModelConfig, output: OutputConfig) -> dict[str, Any]:
    """Cut the files of a dense checkpoint by a plan, tensor by tensor, on the CPU.

    Args:
        plan: `dms_plan.json`, or the folder that it is in.
        model: the dense model, `path` and `revision`.
        output: where the result goes.

    Returns:
        The content of `dms_report.json`.

    Raises:
        ValueError: something is wrong with the plan, the model or the output; nothing has been written.
    """
    check_writable(output.path, output.overwrite)
    started = time.time()
    folder = _local(model)
    job = prepare_cut(folder, plan)
    if job.left_out:
        print(f"Left out, as {type(job.dense).__name__} has no such parameters: {', '.join(job.left_out)}", flush=True)
    with new_folder(output.path, output.overwrite) as temporary:
        counts = write_cut(job, folder, temporary)
        for pattern in PROCESSOR_FILES:
            for file in filter(Path.is_file, folder.glob(pattern)):
                shutil.copyfile(file, temporary / file.name)
        report = as_written(_report(job, counts, model) | {"seconds": round(time.time() - started)})
        (temporary / REPORT).write_text(to_json(report))
        page = render(report, job.pruned.config.to_dict(), Path(output.path).name)
        (temporary / PAGE).write_text(page, encoding="utf-8")
        (temporary / "README.md").write_text(_card(job, report, Path(output.path).name))
    print(table(report))
    return report


def _local(model: ModelConfig) -> Path:
    """The folder of a model, downloaded if it is a Hub id."""
    if Path(model.path).is_dir():
        return Path(model.path)
    wanted = ["*.safetensors", "*.json", *PROCESSOR_FILES]
    try:
        return Path(
            snapshot_download(model.path, revision=model.revision, allow_patterns=wanted, ignore_patterns="*/*")
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HfDmsError(f"model.path: no model can be read from '{model.path}'. {reason}") from error


def _report(job: StreamedCut, counts: dict[str, int], model: ModelConfig) -> dict[str, Any]:
    report: dict[str, Any] = {"dense": {"num_params": counts["dense"]}, "pruned": {"num_params": counts["pruned"]}}
    if job.layout == "padded":
        report["dense"]["kept_num_params"], report["pruned"]["kept_num_params"] = counts["dense"], counts["kept"]
    return report | {
        **shape(job.plan, job.bound),
        "layout": job.layout,
        "model": {"path": model.path, "revision": model.revision},
        "model_class": type(job.pruned).__name__,
        "proof": "tensors",  # read back, each equals the slice of its source; no forward pass was run
        "left_out": job.left_out,
        "versions": versions(),
    }


def _card(job: StreamedCut, report: dict[str, Any], name: str) -> str:
    """The README.md of the result."""
    auto, path = str(auto_class_of(type(job.dense))), report["model"]["path"]
    metadata = ModelCardData(
        base_model=path if is_hub_id(path) else None, library_name="transformers", tags=["dms", "pruned"]
    )
    return f"""---
{metadata.to_yaml()}
---

# {name}

`{shown(path)}` cut with [hf_dms](https://arxiv.org/abs/2405.07194) (Differentiable Model Scaling)
by the plan of a finished search, `dms_plan.json`; layout {job.layout}. Every tensor was read back and equals the slice
of its source. Nothing was trained or measured after the cut.

{table(report)}

## Load it

```python
{loading_lines(auto, None, report["model_class"], name)}
```

## Sizes, per layer of the dense model

{sizes_table(report["sizes"])}
"""
