"""Validation of reports by dms_report.schema.json."""

import json
from importlib.resources import files

from jsonschema import Draft202012Validator

SCHEMA = json.loads(files("hf_dms.report").joinpath("dms_report.schema.json").read_text(encoding="utf-8"))
Draft202012Validator.check_schema(SCHEMA)


def mistakes(report):
    """The errors of a report, in words; empty if it conforms."""
    errors = Draft202012Validator(SCHEMA).iter_errors(report)
    return [f"{error.json_path}: {error.message}" for error in errors]
