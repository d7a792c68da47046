"""What the package says of itself, here and installed."""

from importlib.metadata import metadata

import yaml
from helpers.environments import ROOT

import lmms_plugin


def test_citation_and_package_say_the_same():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    installed = metadata("lmms-plugin")
    assert citation["version"] == installed["Version"] == lmms_plugin.__version__
    assert citation["license"] == installed["License-Expression"] == "Apache-2.0"


def test_the_licence_is_installed_with_the_package():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert metadata("lmms-plugin").get_all("License-File") == ["LICENSE"]
