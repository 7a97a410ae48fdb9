"""`hf-dms prune --plan`: a dense checkpoint cut from its files by the plan of a finished search.

Nothing is trained or measured here. The report tells what was cut and how it was checked.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..checkpoint.folders import check_writable, new_folder
from ..checkpoint.stream import StreamedCut, prepare_cut, write_cut
from ..errors import HfDmsError
from ..measure.versions import versions
from ..report.card import base_metadata, model_card
from ..report.numbers import REPORT, as_written, report_table, shape, to_json
from ..report.page import PAGE, render
from ..report.report import Measured, Report
from .sections import ModelConfig, OutputConfig

PROCESSOR_FILES = (  # what tokenizers and image processors of transformers write
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "spiece*"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json"),
)


def cut_by_plan(plan: str, model: ModelConfig, output: OutputConfig, share: float | None = None) -> dict[str, Any]:
    """Cut the files of a dense checkpoint by a plan, tensor by tensor, on the CPU.

    Args:
        plan: `dms_plan.json` or its folder; with `share`, `dms_plans.json` or its folder.
        model: the dense model, `path` and `revision`.
        output: the folder of the result.
        share: for a plan that the search passed: the share of the dense resource that it keeps.

    Returns:
        The content of `dms_report.json`.

    Raises:
        ValueError: the plan, the model or the output folder is not usable. Nothing has been written.
    """
    check_writable(output.path, output.overwrite, [model.path])
    started = time.time()
    folder = _local(model)
    # Everything that can be wrong is found here, before a folder is made.
    job = prepare_cut(folder, plan, share)
    if job.left_out:
        print(f"Left out, as {type(job.dense).__name__} has no such parameters: {', '.join(job.left_out)}", flush=True)
    with new_folder(output.path, output.overwrite) as temporary:
        counts = write_cut(job, folder, temporary)
        for pattern in PROCESSOR_FILES:
            for file in filter(Path.is_file, folder.glob(pattern)):
                shutil.copyfile(file, temporary / file.name)
        report = as_written(_report(job, counts, model, round(time.time() - started)))
        (temporary / REPORT).write_text(to_json(report), encoding="utf-8")
        name = Path(output.path).name
        page = render(report, job.pruned.config.to_dict(), name)
        (temporary / PAGE).write_text(page, encoding="utf-8")
        card = model_card(report, name, base_metadata(model.path, model.revision))
        (temporary / "README.md").write_text(card, encoding="utf-8")
    print(report_table(report))
    return report


def _local(model: ModelConfig) -> Path:
    """The folder of a model, downloaded if it is a Hub id."""
    if Path(model.path).is_dir():
        return Path(model.path)
    # Not from folders inside the repository (`*/*`): they often hold the model in other formats, such as ONNX.
    wanted = ["*.safetensors", "*.json", *PROCESSOR_FILES]
    try:
        return Path(
            snapshot_download(model.path, revision=model.revision, allow_patterns=wanted, ignore_patterns="*/*")
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HfDmsError(f"model.path: no model can be read from '{model.path}'. {reason}") from error


def _report(job: StreamedCut, counts: dict[str, int], model: ModelConfig, seconds: int) -> Report:
    dense, pruned = Measured(num_params=counts["dense"]), Measured(num_params=counts["pruned"])
    if job.layout == "padded":
        dense["kept_num_params"], pruned["kept_num_params"] = counts["dense"], counts["kept"]
    return Report(
        dense=dense,
        pruned=pruned,
        **shape(job.plan, job.bound),
        layout=job.layout,
        model={"path": model.path, "revision": model.revision},
        model_class=type(job.pruned).__name__,
        proof="tensors",  # each tensor was read back and equals the slice of its source; no forward pass was run
        left_out=job.left_out,
        versions=versions(),
        seconds=seconds,
    )
