"""What mkdocs builds beside the files of `docs/`: the home page and the pages of the API.

The home page is README.md, so that its links are checked as all others are. The API has a page for every public module
of the *installed* package, in which the folders `tasks` and `quant_backends` lie where they are imported from. Modules
are read as text and never imported.
"""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import ConfigurationError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

PACKAGE = "lmms_plugin"
README = Path(__file__).resolve().parent.parent / "README.md"
OVERVIEW = """\
# API

Every public module, from the docstrings. Names that begin with an underscore are left out.

| module | what |
|---|---|
"""


class Module(NamedTuple):
    """A public module.

    Attributes:
        name: Dotted.
        package: Dotted name of the sub-package under which the menu shows it; the package itself for its own modules.
        summary: First line of its docstring.
    """

    name: str
    package: str
    summary: str

    @property
    def page(self) -> str:
        """Where its page lies in the site."""
        return f"api/{self.name}.md"


# mkdocstrings reads its configuration at the same event.
@event_priority(100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Tell mkdocstrings where the package lies, and add its modules to the menu."""
    folder = installed()
    handlers: dict[str, Any] = config.plugins["mkdocstrings"].config.handlers
    handlers["python"]["paths"] = [str(folder.parent)]
    found = list(modules(folder))
    packages = dict.fromkeys(module.package for module in found)
    menu = [{name: [{one.name: one.page} for one in found if one.package == name]} for name in packages]
    config.nav = [*(config.nav or ()), {"API": ["api/index.md", *menu]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    found = list(modules(installed()))
    rows = (f"| [`{one.name}`]({one.name}.md) | {one.summary} |\n" for one in found)
    home = README.read_text(encoding="utf-8").replace("](docs/", "](")
    made = {"index.md": home, "api/index.md": OVERVIEW + "".join(rows)}
    made |= {one.page: f"::: {one.name}\n" for one in found}
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to README.md lead to the home page."""
    return markdown.replace("](../README.md", "](index.md")


def installed() -> Path:
    """Return the folder of the installed package.

    Raises:
        ConfigurationError: Only the checkout's folder is found, which lacks two of its sub-packages.
    """
    found = importlib.util.find_spec(PACKAGE)
    folder = Path(found.origin).parent if found and found.origin else None
    if folder is None or not (folder / "quant_backends").is_dir():
        raise ConfigurationError(f"expected {PACKAGE} to be installed, got {folder}: build the site by `make docs`")
    return folder


def modules(folder: Path) -> Iterator[Module]:
    """Yield all public modules of the package in a folder, each package before what is in it."""
    files = {
        file.relative_to(folder.parent).with_suffix("").parts: file
        for file in folder.rglob("*.py")
        if file.name != "__init__.py"
    }
    files |= {file.relative_to(folder.parent).parts[:-1]: file for file in folder.rglob("__init__.py")}
    for parts, file in sorted(files.items()):
        if not any(part.startswith("_") for part in parts):
            inside = len(parts) > 2 or file.name == "__init__.py"
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            yield Module(".".join(parts), ".".join(parts[:2]) if inside else PACKAGE, docstring.partition("\n")[0])
