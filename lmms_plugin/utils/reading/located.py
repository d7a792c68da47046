"""YAML values with their places in the file, so that an error can name the line."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from lmms_plugin.utils.reading.problems import refusal
from lmms_plugin.utils.reading.validation import Problem

T = TypeVar("T")


MOST_BYTES, MOST_VALUES, MOST_DEEP = 4 << 20, 100_000, 100
"""Bounds of a file that people write, and of its size with aliases expanded."""
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, repr=False)
class Entry:
    """One value of a YAML file.

    Attributes:
        node: Node as the YAML library composed it.
        file: Name of the file.
    """

    node: yaml.Node
    file: str

    @property
    def where(self) -> str:
        """File, line and column, counted from 1."""
        mark = self.node.start_mark
        return f"{self.file}:{mark.line + 1}:{mark.column + 1}"

    def wrong(self, expected: str, got: str | None = None) -> ValueError:
        """Return the error that says what was expected here and what came instead."""
        return ValueError(f"{self.where}: expected {expected}, got {self.shown if got is None else got:.200}")

    @property
    def shown(self) -> str:
        """Format the value for a message."""
        if isinstance(self.node, yaml.ScalarNode):
            return f"{self.plain()!r:.200}"
        return "a list" if isinstance(self.node, yaml.SequenceNode) else "a mapping"

    def plain(self) -> Any:
        """Return the value without its place.

        Raises:
            ValueError: YAML cannot construct a plain value, for example because of an unknown tag.
        """
        return _constructed(self.node, self.file)

    def at(self, loc: Sequence[str | int], *, name: bool = False) -> Entry:
        """Return the value that names and positions lead to, or the last one on the way.

        Args:
            loc: Names and positions.
            name: Whether to return the last name in place of its value.
        """
        node = self.node
        for left, part in zip(range(len(loc))[::-1], loc, strict=True):
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in node.value if pair[0].value == str(part)), (node, node))
                node = found[0] if name and not left else found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                node = node.value[part]
        return Entry(node, self.file)

    def validated(self, kind: type[T], *, opened: bool = False, **context: Any) -> T:
        """Validate the value as a model.

        Args:
            kind: `Schema`, or a dataclass that `validation.validated` decorates.
            opened: Whether the model reads entries itself.
            **context: Context of its validators.

        Raises:
            ValueError: The value is invalid; every problem is a line that says where, what was expected and what came.
        """
        try:
            made: T = kind.__pydantic_validator__.validate_python(self if opened else self.plain(), context=context)  # type: ignore[attr-defined]
        except ValidationError as error:
            raise self.refused(Problem.all_of(error, kind, positions=False)) from error
        return made

    def refused(self, problems: Iterable[Problem], told: str = "") -> ValueError:
        """Return the error for problems of the value, in the order of the file.

        Args:
            problems: Problems; of two at one place, the first is told first.
            told: Text between the place and the problem.
        """
        found = [(self.at(problem.loc, name=problem.of_name), problem) for problem in problems]
        ordered = sorted(found, key=lambda one: one[0].node.start_mark.index)
        return refusal(f"{place.where}: {told}{problem.text}" for place, problem in ordered)

    @property
    def is_mapping(self) -> bool:
        """Return whether the value is a mapping."""
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_list(self) -> bool:
        """Return whether the value is a list."""
        return isinstance(self.node, yaml.SequenceNode)

    def fields(self) -> dict[Any, Entry]:
        """Return the values of a mapping by name."""
        return {_constructed(key, self.file): Entry(value, self.file) for key, value in self.node.value}

    def items(self) -> list[Entry]:
        """Return the values of a list; a single value counts as a list of one."""
        return [Entry(node, self.file) for node in self.node.value] if self.is_list else [self]

    def __repr__(self) -> str:
        """Format the value for a message."""
        return self.shown


def load(file: Path) -> Entry:
    """Read a YAML file.

    Raises:
        FileNotFoundError: The file does not exist.
        IsADirectoryError: It is a folder.
        ValueError: The file is empty, too large, not YAML or not UTF-8, a name occurs twice, or a value does not fit
            its type; says where.
    """
    if file.is_dir():
        raise IsADirectoryError(f"expected a YAML file, got the folder {file}")
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file}: expected at most {MOST_BYTES} bytes of YAML, got {file.stat().st_size}")
    text = text_of(file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _not_yaml(error, str(file)) from error
    except RecursionError as error:
        raise ValueError(f"{file}: expected YAML, got lists or mappings nested too deep") from error
    if node is None:
        raise ValueError(f"{file}:1:1: expected a mapping, got an empty file")
    _expect_bounded(node, str(file), {}, 0)
    _merge(node, str(file), set())
    return Entry(node, str(file))


def text_of(file: Path) -> str:
    """Read the text of a file in UTF-8.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file has another encoding; names it.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, got {error.reason} at byte {error.start}") from error


def _expect_bounded(node: yaml.Node, file: str, sizes: dict[int, int], depth: int) -> int:
    """Refuse a value whose expanded aliases would take excessive time or memory.

    Args:
        node: Node of the file.
        file: Name of the file.
        sizes: Id of a node → number of values it stands for; 0 for one that is being counted.
        depth: Depth of the node.

    Returns:
        Number of values the node stands for.
    """
    if id(node) in sizes and sizes[id(node)]:
        return sizes[id(node)]
    if id(node) in sizes:
        raise Entry(node, file).wrong("a value that does not hold itself")
    if depth > MOST_DEEP:
        raise Entry(node, file).wrong(f"lists and mappings nested at most {MOST_DEEP} deep")
    sizes[id(node)] = 0
    size = 1
    if isinstance(node, yaml.ScalarNode):
        _constructed(node, file)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_expect_bounded(one, file, sizes, depth + 1) for one in node.value)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise Entry(key, file).wrong("a name")
            size += sum(_expect_bounded(one, file, sizes, depth + 1) for one in (key, value))
    if size > MOST_VALUES:
        raise Entry(node, file).wrong(f"at most {MOST_VALUES} values, aliases written out", "more")
    sizes[id(node)] = size
    return size


def _constructed(node: yaml.Node, file: str) -> Any:
    """Return the plain value of a node.

    Raises:
        ValueError: YAML cannot construct one; says where.
    """
    # Merged entries are in the mappings already; the key itself is a name like any other.
    if node.tag == _MERGE:
        return "<<"
    try:
        return yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise _not_yaml(error, file) from error
    # The constructors of `!!bool x`, `!!int ""` and `!!timestamp x` raise arbitrary errors.
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        got = f"{node.value!r:.60}" if isinstance(node, yaml.ScalarNode) else None
        raise Entry(node, file).wrong(f"a value of the type {tag}", got or f"what is none ({error})") from error


def _merge(node: yaml.Node, file: str, seen: set[int]) -> None:
    """Add to mappings the entries that they merge by `<<`, except those that they override."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _merge(one, file, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    found: dict[tuple[str, Hashable], tuple[yaml.Node, yaml.Node]] = {}
    taken: list[tuple[yaml.Node, yaml.Node]] = []
    for key, value in node.value:
        _merge(value, file, seen)
        name = _name(key, file)
        if name in found:
            raise Entry(key, file).wrong("every name once", f"{key.value!r} twice")
        found[name] = key, value
        if key.tag == _MERGE:
            taken = [pair for one in _merged(value, file) for pair in one.value]
    # Among several merged mappings, the first one counts.
    for key, value in taken:
        found.setdefault(_name(key, file), (key, value))
    node.value = [pair for name, pair in found.items() if name[0] != _MERGE]


def _merged(value: yaml.Node, file: str) -> list[yaml.MappingNode]:
    several = value.value if isinstance(value, yaml.SequenceNode) else [value]
    for one in several:
        if not isinstance(one, yaml.MappingNode):
            raise Entry(one, file).wrong("a mapping to take over, or a list of mappings")
    return list(several)


def _name(key: yaml.Node, file: str) -> tuple[str, Hashable]:
    """Return the identity of a name: `yes` and `true` are equal."""
    return key.tag, _constructed(key, file)


def _not_yaml(error: Exception, file: str) -> ValueError:
    mark = getattr(error, "problem_mark", None)
    where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark is not None else file
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    return ValueError(f"{where}: expected YAML: {problem}")
