"""Schemas of files that programs wrote, since a file on a disk may hold anything, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lmms_plugin.utils.files import read_json
from lmms_plugin.utils.reading.readable import problem


class Account(BaseModel):
    """Schema of a file that a program wrote."""

    # Newer versions may add fields, and texts are not numbers.
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


def read(path: Path, schema: type[BaseModel]) -> dict[str, Any]:
    """Read and validate such a file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged or invalid; names the file and the entry.
    """
    content = read_json(path)
    expect(content, schema, path)
    return content


def expect(content: Mapping[str, Any], schema: type[BaseModel], where: object) -> None:
    """Validate the content of such a file.

    Raises:
        ValueError: The content is invalid; names the first invalid entry, in one line.
    """
    try:
        schema.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{where} is damaged: {problem(error)}") from error
