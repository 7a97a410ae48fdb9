"""Rows of the benchmarks whose tables RESULTS.md shows line by line: `tables/SCRIPT.jsonl`, a line of JSON for each."""

import os
from pathlib import Path
from typing import Any

import torch

from hf_dms.experiment.rows import append_row, provenance


def add_row(script: str, cells: dict[str, Any], device: str = "cpu") -> None:
    """Append a row to a table, with what produced it and the machine's load over the last minute, and print it.

    Args:
        script: the path of the script, `__file__`; its name is the table's.
        cells: what the row says, by column.
        device: the type of the device that was measured.
    """
    row = {"cells": cells, "load": round(os.getloadavg()[0], 1)} | provenance(torch.device(device))
    append_row(Path(__file__).with_name("tables") / f"{Path(script).stem}.jsonl", row)
    print(" | ".join(f"{column}: {value}" for column, value in cells.items()), flush=True)
