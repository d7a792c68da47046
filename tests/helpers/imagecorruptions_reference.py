"""The imagecorruptions package (Michaelis et al.) as an independent implementation, made to run on current libraries.

Version 1.1.2 imports pkg_resources (gone from setuptools 82), passes `multichannel` to scikit-image (removed) and uses
np.float_ (removed in numpy 2). The three are supplied from outside; none of its arithmetic is touched.
"""

import importlib
import sys
import types
import warnings
from pathlib import Path

import numpy as np


class _NumpyWithOldNames:
    float_ = np.float64

    def __getattr__(self, name):
        return getattr(np, name)


def _resource_filename(module, path):
    return str(Path(sys.modules[module].__file__).parent / path)


def load():
    """The patched module `imagecorruptions.corruptions`; ImportError if the package is not installed."""
    import skimage.filters

    present = sys.modules.get("pkg_resources")
    sys.modules["pkg_resources"] = types.SimpleNamespace(resource_filename=_resource_filename)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # scipy.ndimage.interpolation, until SciPy 2
            module = importlib.import_module("imagecorruptions.corruptions")
    finally:
        sys.modules["pkg_resources"] = present
        if present is None:
            del sys.modules["pkg_resources"]

    def gaussian(image, sigma, multichannel=False, **options):
        return skimage.filters.gaussian(image, sigma, channel_axis=-1 if multichannel else None, **options)

    module.np, module.gaussian = _NumpyWithOldNames(), gaussian
    return module


def corrupt(module, image, name, severity, seed):
    """`image` (PIL, RGB) corrupted by the package, (h, w, 3) uint8; its randomness is numpy's global state."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        return np.uint8(getattr(module, name)(image, severity))
    finally:
        np.random.set_state(state)  # noqa: NPY002
