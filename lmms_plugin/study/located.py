"""YAML whose values know where they stand, so that an error about one points at its line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


def near(word: str, known: Iterable[str]) -> str:
    """The known name that a word was probably meant to be, as the end of a message; empty where there is none."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


@dataclass(frozen=True)
class Entry:
    """One value of a YAML file.

    Attributes:
        node: Of the file, as the YAML library composed it.
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
        """The error that says what was expected here and what stands here instead."""
        return ValueError(f"{self.where}: expected {expected}, got {self.shown if got is None else got}")

    @property
    def shown(self) -> str:
        """The value as a message shows it."""
        if isinstance(self.node, yaml.ScalarNode):
            return repr(self.plain())
        return "a list" if isinstance(self.node, yaml.SequenceNode) else "a mapping"

    def plain(self) -> Any:
        """The value without its place.

        Raises:
            ValueError: If YAML cannot make a plain value of it, such as an unknown tag.
        """
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_document(self.node)
        except yaml.YAMLError as error:
            raise _not_yaml(error, self.file) from error

    @property
    def is_mapping(self) -> bool:
        """Whether it has named values."""
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_list(self) -> bool:
        """Whether it is a list."""
        return isinstance(self.node, yaml.SequenceNode)

    def fields(self, known: Collection[str] | None, required: Collection[str] = ()) -> dict[str, Entry]:
        """The values of a mapping by name.

        Args:
            known: Names that it may have; None for any.
            required: Names that it must have.

        Raises:
            ValueError: If it is no mapping, or a name is unknown or missing.
        """
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong(f"a mapping with {', '.join(known)}" if known else "a mapping")
        found: dict[str, Entry] = {}
        for key_node, value_node in self.node.value:
            key = Entry(key_node, self.file)
            name = key.text()
            if known is not None and name not in known:
                raise key.wrong(f"one of {', '.join(known)}", f"{name!r}{near(name, known)}")
            found[name] = Entry(value_node, self.file)
        missing = [name for name in required if name not in found]
        if missing:
            raise self.wrong(f"{missing[0]!r} to be given", f"{', '.join(found) or 'nothing'} alone")
        return found

    def items(self) -> list[Entry]:
        """The values of a list; a single value counts as a list of one.

        Raises:
            ValueError: If the list is empty.
        """
        if not isinstance(self.node, yaml.SequenceNode):
            return [self]
        if not self.node.value:
            raise self.wrong("at least one value", "an empty list")
        return [Entry(node, self.file) for node in self.node.value]

    def scalar(self) -> Hashable:
        """A single value: text, number, truth value or nothing."""
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.wrong("a single value")
        value: Hashable = self.plain()
        return value

    def text(self) -> str:
        """A text."""
        value = self.scalar()
        if not isinstance(value, str) or not value:
            raise self.wrong("a text")
        return value

    def whole(self, least: int) -> int:
        """A whole number that is not below `least`."""
        value = self.scalar()
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(f"a whole number from {least}")
        return value

    def one_of(self, known: Collection[str], what: str) -> str:
        """One of some names."""
        name = self.text()
        if name not in known:
            raise self.wrong(f"{what} ({', '.join(known)})", f"{name!r}{near(name, known)}")
        return name


def load(file: Path) -> Entry:
    """Read a YAML file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is empty or no YAML, or a name is there twice; says where.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if node is None:
            raise ValueError(f"{file}:1:1: expected a mapping, got an empty file")
        _merge(node, str(file), set())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _not_yaml(error, str(file)) from error
    return Entry(node, str(file))


def _merge(node: yaml.Node, file: str, seen: set[int]) -> None:
    """Put what mappings take over by `<<` into them, wherever they do not say otherwise themselves."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _merge(one, file, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    names: set[tuple[str, str]] = set()
    for key, value in node.value:
        _merge(value, file, seen)
        if _name(key) in names:
            raise Entry(key, file).wrong("every name once", f"{key.value!r} twice")
        names.add(_name(key))
    yaml.SafeLoader("").flatten_mapping(node)
    node.value = list({_name(key): (key, value) for key, value in node.value}.values())


def _name(key: yaml.Node) -> tuple[str, str]:
    return key.tag, str(key.value)


def _not_yaml(error: Exception, file: str) -> ValueError:
    mark = getattr(error, "problem_mark", None)
    where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark is not None else file
    return ValueError(f"{where}: expected YAML: {getattr(error, 'problem', None) or error}")
