"""What a study writes of its cells, as schemas: files on a disk may say anything, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lmms_plugin.utils.files import expect_inside, read_json
from lmms_plugin.utils.readable import problem

_Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_Name = Annotated[str, AfterValidator(expect_inside)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Account(BaseModel):
    # Newer versions may say more, and texts are no numbers.
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class StoredAxes(_Account):
    """The axes of a cell, as `grid.CellAxes`; files of other versions may lack some."""

    model: str | None = None
    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    components: str | None = None
    calibration: str | None = None
    seed: int | None = None


class About(_Account):
    """`cell.json`: what was asked."""

    id: str = ""
    model: str = ""
    model_args: dict[str, str | int | float | bool | None] = {}
    axes: StoredAxes = StoredAxes()
    tasks: list[str] = []
    limit: float | None = Field(None, allow_inf_nan=False)
    batch_size: int | str = 1
    processes: int = 1
    command: list[str] = []
    versions: dict[str, str | None] = {}


class Done(_Account):
    """`done.json`: that a cell is finished, and with which files."""

    seconds: _Seconds
    files: dict[_Name, _Digest]
    finished: str = ""


class FailureAccount(_Account):
    """`failed.json`: why a cell failed."""

    problem: str = ""
    returncode: int | None = None
    tail: str | list[str] = ""


class Module(_Account):
    """One layer in an account of quantization."""

    name: str
    relative_error: float | None = None


class Experts(_Account):
    """How many tokens the experts of one layer were sent."""

    name: str
    tokens: list[Annotated[int, Field(ge=0)]]


class Quantized(_Account):
    """`quant_report.json`: what quantization did."""

    bits_per_weight: float | None = None
    bytes_after: float | None = None
    seconds: float | None = None
    modules: list[Module] | None = None
    experts: list[Experts] | None = None


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
