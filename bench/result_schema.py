"""The schema of result files, schema.json, and reading them by it.

schema.json is JSON Schema; `check` knows the words of it that are used there.
"""

import json
import math
from pathlib import Path

SCHEMA = json.loads(Path(__file__).with_name("schema.json").read_text())
ROW = tuple(SCHEMA["$defs"]["row"]["properties"])
TYPES = {
    "object": dict, "array": (list, tuple), "string": str, "number": (int, float), "integer": int,
    "boolean": bool, "null": type(None),
}  # fmt: skip


def read(path):
    """The content of a result file. Raises ValueError: the file, and what is wrong in it."""
    try:
        content = json.loads(Path(path).read_text(), parse_constant=_no_constant)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{path}: is not JSON ({error}); was its run cut off?") from error
    try:
        check(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return content


def _no_constant(name):
    raise ValueError(f"{name} is not a number of JSON")


def check(value, schema=SCHEMA, field=""):
    """Raise ValueError, naming the field, unless value is what schema wants."""
    if reference := schema.get("$ref"):
        schema = SCHEMA["$defs"][reference.rpartition("/")[2]]
    where = field or "the file"
    if "const" in schema and value != schema["const"]:
        raise ValueError(f"{where} must be {schema['const']}, got {value!r}")
    if "enum" in schema and value not in schema["enum"]:
        raise ValueError(f"{where} must be one of {_list(schema['enum'])}, got {value!r}")
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        raise ValueError(f"{where} must be {' or '.join(kinds)}, got {_short(value)}")
    if isinstance(value, dict):
        _check_object(value, schema, field)
    elif isinstance(value, (list, tuple)):
        if len(value) < schema.get("minItems", 0) or len(value) > schema.get("maxItems", math.inf):
            raise ValueError(f"{where} must have {schema['minItems']} items, got {len(value)}")
        for n, item in enumerate(value):
            check(item, schema.get("items", {}), f"{field}[{n}]")


def _check_object(value, schema, field):
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    for name in schema.get("required", ()):
        # The version first: a file of another one lacks much else
        if name not in value:
            raise ValueError(f"{_join(field, name)} is missing")
        if name == "schema":
            check(value[name], properties[name], name)
    for name, item in value.items():
        if name not in properties and others is False:
            raise ValueError(f"{_join(field, name)} is not a field of schema 2")
        check(item, properties.get(name, others), _join(field, name))


def _is(value, kind):
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, TYPES[kind])


def _join(field, name):
    return f"{field}.{name}" if field else name


def _list(values):
    return ", ".join(json.dumps(v) for v in values)


def _short(value):
    text = json.dumps(value) if not isinstance(value, float) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
