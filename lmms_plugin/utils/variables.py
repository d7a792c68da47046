"""Environment variables of this package.

Those that name local copies of datasets are `PREFIX` and the dataset's name: see `lmms_plugin.tasks.sources.origins`.
"""

PREFIX = "LMMS_PLUGIN_"

CACHE = f"{PREFIX}CACHE"
"""The folder of unfinished calibrations; set to nothing, none is kept."""
