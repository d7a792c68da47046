"""The tables of the documentation that repeat what the code says.

`python tests/helpers/documented_tables.py` writes them anew.

A table stands in its page between the comments `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from lmms_plugin.analysis.reproduction.published import PublishedGrounding
from lmms_plugin.arguments import ModelArguments
from lmms_plugin.cli.screens.plan_screen import plan_screen
from lmms_plugin.protocol.dialects import DIALECTS, Dialect, Frame
from lmms_plugin.quant_backends import backend_class, names
from lmms_plugin.quant_backends.backend import Backend, CalibratedBackend, WholeModelBackend
from lmms_plugin.quant_backends.formats.entries import FORMATS
from lmms_plugin.quant_backends.layers.input_rounding import input_formats
from lmms_plugin.quant_backends.plans.plan import UNTOUCHED_BITS
from lmms_plugin.study.file import reading
from lmms_plugin.study.run import planning
from lmms_plugin.tasks.captions import captioning
from lmms_plugin.tasks.grounding import natural, refcocoplus
from lmms_plugin.tasks.grounding.expressions import REFCOCOPLUS
from lmms_plugin.tasks.grounding.referring import ReferringSet
from lmms_plugin.tasks.retrieval import matching
from lmms_plugin.tasks.sources.origins import DatasetOrigin
from lmms_plugin.tasks.vqa import datasets as vqa_sources
from lmms_plugin.vlm.served.llamacpp.gguf_options import GgufOptions
from lmms_plugin.vlm.served.options import ServedOptions

DOCS = Path(__file__).parents[2] / "docs"
_FORMAT = re.compile(r"\{.*?\}")


def attributes(kind: type) -> dict[str, str]:
    """What the `Attributes:` sections of a class and its bases say of each name, in one line."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(vars(base).get("__doc__") or "").partition("\nAttributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def arguments() -> str:
    """What `--model_args` takes for every model."""
    said = attributes(ModelArguments)
    rows = ((f"`{one.name}`", _default(one), said[one.name]) for one in fields(ModelArguments) if one.name != "options")
    return table(("argument", "default", "meaning"), rows)


def served() -> str:
    """What `--model_args` takes for served models besides."""
    return _of_options(ServedOptions)


def gguf() -> str:
    """What `--model_args` takes for GGUF files besides."""
    return _of_options(GgufOptions)


def _of_options(kind: type) -> str:
    said = attributes(kind)
    cells = {one.name: "" if one.default is MISSING else _default(one) for one in fields(kind)}
    rows = ((f"`{name}`", default, said[name]) for name, default in cells.items())
    return table(("argument", "default", "meaning"), rows)


def methods() -> str:
    """The methods, what they can do, and their options."""
    rows = []
    for name in names():
        kind = backend_class(name)
        options = ", ".join(f"`{option.name}`" for option in fields(kind))
        rows.append((f"`quant_{name}`", (kind.__doc__ or "").partition("\n")[0], _bits(kind), _looks(kind), options))
    return table(("name", "what", "bits", "calibrated", "options"), rows)


def options() -> str:
    """The options of the methods."""
    rows = []
    for name in names():
        kind = backend_class(name)
        said = attributes(kind)
        rows += [(f"`{name}`", f"`{one.name}`", _default(one), said[one.name]) for one in fields(kind)]
    return table(("method", "option", "default", "meaning"), rows)


def formats() -> str:
    """The formats of weights and inputs."""
    rows = []
    for one in FORMATS.values():
        height, width = ("all" if size is None else str(size) for size in one.block)
        block = "`group_size`" if one.element.integer else f"{height} x {width}"
        scale = {"own": "the layer's dtype", "e8m0": "power of two (E8M0)", "e4m3": "E4M3"}.get(one.scale, one.scale)
        total = ", and one float32 for the tensor" if one.global_scale else ""
        asymmetric = "" if one.symmetric else "; a zero point of 8 bits"
        largest = f"{one.element.largest:g}"
        inputs = "yes" if one.name in input_formats() else "no"
        bits = f"{one.bits_per_weight(4096, 128 if one.element.integer else 4096):.4g}"
        rows.append(
            (f"`{one.name}`", largest, block, f"{scale}, rounded {one.rounding}{total}{asymmetric}", bits, inputs)
        )
    head = ("format", "largest element", "rows x columns of a block", "scale", "bits per weight", "inputs")
    return table(head, rows)


def datasets() -> str:
    """Where each dataset comes from, and which columns are read."""
    sets: list[DatasetOrigin] = [
        REFCOCOPLUS,
        *natural.SETS.values(),
        *captioning.SETS.values(),
        *matching.SETS.values(),
        *vqa_sources.SOURCES.values(),
    ]
    splits: dict[str, list[str]] = {REFCOCOPLUS.variable: list(refcocoplus.SPLITS)}
    for one in sets:
        known = splits.setdefault(one.variable, [])
        known += [] if one.split in known else [one.split]
    rows = []
    for variable, of in splits.items():
        one = next(one for one in sets if one.variable == variable)
        rows.append((one.title, f"`{one.hub_id}`" if one.hub_id else "none", ", ".join(of), f"`{variable}`"))
    return table(("dataset", "repository on the hub", "splits", "variable of a local copy"), rows)


def columns() -> str:
    """Columns of the datasets of referring expressions."""
    found: dict[str, ReferringSet] = {REFCOCOPLUS.variable: REFCOCOPLUS}
    for one in natural.SETS.values():
        found.setdefault(one.variable, one)
    rows = []
    for one in found.values():
        declared = (f"`{name}`: {what}" for name, what in one.schema().items() if name != "image")
        rows.append((one.title, "; ".join(declared), ", ".join(f"`{tag}`" for tag in one.tags)))
    return table(("dataset", "columns beside `image`", "labels that go to the log, where the copy has them"), rows)


def plan() -> str:
    """What `study plan` prints of the demo's study on a machine without GPUs."""
    found = planning.plan(reading.read(DOCS.parent / "studies" / "zero_shot_vs_ptq.yaml"), gpus=0)
    return f"```\n{plan_screen(found)}\n```\n"


def published() -> str:
    """Published accuracies of grounding, with the names that `reproduce` knows the models by."""
    rows = []
    for one in PublishedGrounding.known().models.values():
        splits: dict[str, list[str]] = {}
        for task, score in one.scores.items():
            dataset, split = task.rsplit("_", 1)
            splits.setdefault(dataset, []).append(f"{split} {_percent(score.value)}")
        numbers = "; ".join(f"`{dataset}`: {', '.join(found)}" for dataset, found in splits.items())
        sources = "; ".join(dict.fromkeys(score.source for score in one.scores.values()))
        rows.append((one.name, ", ".join(f"`{id_}`" for id_ in one.checkpoints), numbers, sources))
    return table(("model", "checkpoints", "Acc@0.5", "source"), rows)


def dialects() -> str:
    """How every family is asked for a box, and how it writes one."""
    head = ("dialect", "`model_type`", "question", "box", "full scale", "frame", "source")
    return table(head, map(_dialect, DIALECTS.values()))


def _dialect(one: Dialect) -> tuple[str, ...]:
    asked = " ".join(one.prompt.replace("{{", "{").replace("}}", "}").split())
    box = one.box.format(**{name: one.number.replace(_FORMAT.search(one.number)[0], name) for name in one.fields})
    types = ", ".join(f"`{name}`" for name in one.model_types)
    scale = "its sides" if one.frame is Frame.RESIZED else f"{one.scale:g}"
    question = f"`` {asked} ``" if "`" in asked else f"`{asked}`"
    generic = DIALECTS["fractions"]
    question = "as `fractions`" if one.prompt == generic.prompt and one is not generic else question
    return f"`{one.name}`", types, question, f"`{box}`", scale, one.frame.value, one.source


TABLES: Mapping[str, tuple[str, Callable[[], str]]] = {
    "dialects": ("dialects.md", dialects),
    "arguments": ("model_arguments.md", arguments),
    "served": ("served.md", served),
    "gguf": ("gguf.md", gguf),
    "methods": ("quantizers.md", methods),
    "options": ("quantizers.md", options),
    "formats": ("formats.md", formats),
    "plan": ("studies.md", plan),
    "datasets": ("tasks.md", datasets),
    "columns": ("tasks.md", columns),
    "published": ("tasks.md", published),
}
"""Name of a table -> its page, and what makes it."""


def written(name: str) -> str:
    """The table as it stands in its page."""
    page, _ = TABLES[name]
    (found,) = re.findall(_between(name), (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def write() -> None:
    """Write all tables into their pages."""
    for name, (page, make) in TABLES.items():
        text, new = (DOCS / page).read_text(encoding="utf-8"), f"<!-- {name} -->\n{make()}<!-- /{name} -->"
        (DOCS / page).write_text(
            re.sub(_between(name), lambda _, new=new: new, text, flags=re.DOTALL), encoding="utf-8"
        )


def _between(name: str) -> str:
    return rf"<!-- {name} -->\n(.*?)<!-- /{name} -->"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}".removesuffix("0")


def _default(one: Any) -> str:
    value = one.default_factory() if one.default is MISSING else one.default
    return "" if value is None else f"`{value}`"


def _bits(kind: type[Backend]) -> str:
    if kind.default_bits == UNTOUCHED_BITS:
        return "the checkpoint's"
    runs: list[list[int]] = []
    for bits in sorted(kind.bits):
        if runs and bits == runs[-1][-1] + 1:
            runs[-1].append(bits)
        else:
            runs.append([bits])
    return ", ".join(f"{run[0]}\N{EN DASH}{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _looks(kind: type[Backend]) -> str:
    return "yes" if issubclass(kind, CalibratedBackend | WholeModelBackend) else "no"


if __name__ == "__main__":
    write()
