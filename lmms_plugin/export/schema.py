"""The published JSON schemas of Every Eval Ever, which every export is validated against."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

VERSION = "0.3.0"
AGGREGATE, INSTANCE = "eval.schema.json", "instance_level_eval.schema.json"


def expect_aggregate(content: Any, where: object) -> None:
    """Check the record of a run.

    Raises:
        ValueError: If it is not valid, or of another version of the schema; says where it is not.
    """
    _expect(AGGREGATE, [content], where)


def expect_instances(rows: Iterable[Any], where: object) -> None:
    """Check the records of single documents.

    Raises:
        ValueError: If one is not valid, or of another version of the schema; says which and where it is not.
    """
    _expect(INSTANCE, rows, where)


def _expect(name: str, contents: Iterable[Any], where: object) -> None:
    validator = _validator(name)
    for number, content in enumerate(contents, start=1):
        place = f"{where}, record {number}" if name == INSTANCE else str(where)
        version = content.get("schema_version") if isinstance(content, Mapping) else None
        # The schema itself takes any text for its version.
        if version != VERSION:
            raise ValueError(f"{place}: expected schema_version {VERSION}, got {version!r}")
        error = next(validator.iter_errors(content), None)
        if error is not None:
            path = "/".join(map(str, error.absolute_path)) or "the record"
            raise ValueError(f"{place}: {path} is not valid in Every Eval Ever {VERSION}: {error.message[:300]}")


@cache
def _validator(name: str) -> Validator:
    from jsonschema import Draft7Validator

    content = json.loads((files("lmms_plugin.export") / "schemas" / name).read_text(encoding="utf-8"))
    if content["version"] != VERSION:
        raise ValueError(f"expected version {VERSION} of {name}, got {content['version']}")
    Draft7Validator.check_schema(content)
    return Draft7Validator(content)
