"""As much of JSON Schema as dms_report.schema.json needs."""

import json
from pathlib import Path

SCHEMA = json.loads((Path(__file__).parents[2] / "hf_dms" / "report" / "dms_report.schema.json").read_text())
KINDS = {
    **{"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)},
    **{"integer": int, "number": (int, float)},
}
KNOWN = {
    *("$schema", "$defs", "$ref", "title", "description", "type", "required", "oneOf", "properties"),
    *("additionalProperties", "items", "const", "enum", "minimum"),
}


def mistakes(value, schema=SCHEMA, place="report"):
    """What is wrong with a value, in words; nothing if it conforms."""
    assert set(schema) <= KNOWN, f"{place}: this validator does not know {set(schema) - KNOWN}"
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    found = []
    types = schema.get("type", list(KINDS))
    types = [types] if isinstance(types, str) else types
    if not any(isinstance(value, KINDS[kind]) and isinstance(value, bool) <= (kind == "boolean") for kind in types):
        return [f"{place} is {value!r}, expected {types}"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{place} is {value!r}, expected {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{place} is {value!r}, expected one of {schema['enum']}")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{place} is {value}, expected at least {schema['minimum']}")
    if "oneOf" in schema and sum(not mistakes(value, option, place) for option in schema["oneOf"]) != 1:
        found.append(f"{place} is not exactly one of {schema['oneOf']}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += mistakes(item, schema.get("items", {}), f"{place}[{index}]")
    if isinstance(value, dict):
        found += [f"{place} lacks {key}" for key in schema.get("required", []) if key not in value]
        more = schema.get("additionalProperties", {})
        for key, inner in value.items():
            known = schema.get("properties", {}).get(key, more)
            found += mistakes(inner, known, f"{place}.{key}") if known is not False else [f"{place}.{key} is unknown"]
    return found
