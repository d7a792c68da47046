"""Accounts that programs write of what they did, as schemas: files on a disk may say anything, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lmms_plugin.utils.files import read_json
from lmms_plugin.utils.reading.readable import problem


class Account(BaseModel):
    """What a file says."""

    # Newer versions may say more, and texts are no numbers.
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


def read(path: Path, schema: type[BaseModel]) -> dict[str, Any]:
    """Read one of these files.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or says what it cannot say; names the file and the entry.
    """
    content = read_json(path)
    expect(content, schema, path)
    return content


def expect(content: Mapping[str, Any], schema: type[BaseModel], where: object) -> None:
    """Check what a file says.

    Raises:
        ValueError: It says what it cannot say; names the first such entry, in one line.
    """
    try:
        schema.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{where} is damaged: {problem(error)}") from error
