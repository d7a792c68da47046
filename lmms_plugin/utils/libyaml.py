"""Libyaml's parser in the place of PyYAML's own, which takes four seconds of processor time for lmms-eval's tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import yaml

_REGISTERED = ("yaml_constructors", "yaml_multi_constructors", "yaml_implicit_resolvers", "yaml_path_resolvers")


def full_load(stream: Any) -> Any:
    """Return what `yaml.full_load` does, constructors included that were added to its loader; the same errors, too."""
    loader: Any = yaml.CFullLoader(stream)
    for name in _REGISTERED:
        setattr(loader, name, getattr(yaml.FullLoader, name))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


@contextmanager
def parsing() -> Iterator[None]:
    """Have `yaml.full_load` parse by libyaml, if PyYAML was built with it, as its wheels are."""
    if not yaml.__with_libyaml__:
        yield
        return
    with patch.object(yaml, "full_load", full_load):
        yield
