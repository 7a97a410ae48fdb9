"""`hf-dms prune --plan`: a dense checkpoint cut from its files by the plan of a finished search.

Nothing is trained or measured here; the report says what was cut and how that was proved.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from .checkpoint import check_writable, new_folder
from .layouts import kept_units
from .modeling_dms import auto_class_of
from .recipe import ModelConfig, OutputConfig
from .report import REPORT, table, versions
from .streaming import StreamedCut, prepare_cut, write_cut

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
        report = _report(job, counts, model) | {"seconds": round(time.time() - started)}
        (temporary / REPORT).write_text(json.dumps(report, indent=2) + "\n")
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
        raise ValueError(f"model.path: no model can be read from '{model.path}'. {reason}") from error


def _report(job: StreamedCut, counts: dict[str, int], model: ModelConfig) -> dict[str, Any]:
    layers = kept_units(job.plan, job.bound.depth, None, job.bound.num_layers).tolist()
    sizes = {
        name: [units if len(rows) == 1 or layer in layers else 0 for layer, units in enumerate(rows)]
        for name, rows in job.plan.sizes.items()
    }
    report: dict[str, Any] = {"dense": {"num_params": counts["dense"]}, "pruned": {"num_params": counts["pruned"]}}
    if job.layout == "padded":
        report["dense"]["kept_num_params"], report["pruned"]["kept_num_params"] = counts["dense"], counts["kept"]
    return report | {
        "sizes": sizes,
        "layout": job.layout,
        "model": {"path": model.path, "revision": model.revision},
        "model_class": type(job.pruned).__name__,
        "proof": "tensors",  # read back, each equals the slice of its source; no forward pass was run
        "left_out": job.left_out,
        "versions": versions(),
    }


def _card(job: StreamedCut, report: dict[str, Any], name: str) -> str:
    """The README.md of the result."""
    auto, per_layer = auto_class_of(type(job.dense)), report["model_class"].startswith("Dms")
    extra = ", trust_remote_code=True)  # or `import hf_dms` first" if per_layer else ")"
    sizes = "\n".join(f"| {dim} | {', '.join(map(str, values))} |" for dim, values in report["sizes"].items())
    return f"""---
library_name: transformers
tags:
- dms
- pruned
---

# {name}

`{report["model"]["path"]}` cut with [hf_dms](https://arxiv.org/abs/2405.07194) (Differentiable Model Scaling)
by the plan of a finished search, `dms_plan.json`; layout {job.layout}. Every tensor was read back and equals the slice
of its source. Nothing was trained or measured after the cut.

{table(report)}

## Load it

```python
from transformers import {auto}
model = {auto}.from_pretrained("{name}"{extra}
```

## Sizes, per layer of the dense model

| dim | units kept |
|---|---|
{sizes}
"""
