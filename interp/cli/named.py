"""Names that are given on the command line: a model that can be loaded, methods with commas between."""

import re
from collections.abc import Iterable
from pathlib import Path

from interp.errors import FileError, unknown


def named_methods(given: Iterable[str]) -> tuple[str, ...]:
    """Methods as they are named on the command line: several options, or commas between; `-` is as good as `_`."""
    return tuple(part.strip().replace("-", "_") for text in given for part in text.split(","))


def check_model(name: str) -> None:
    """Whether a model's name can be one, and its package or folder is there; no weights are read.

    Raises:
        UnknownNameError, MissingPackageError, FileError: as loading it would.
    """
    from interp.models import CATALOGUE, row
    from interp.models.install import source_files

    if name in CATALOGUE:
        source_files(row(name))
        return
    if Path(name).expanduser().is_dir():
        if not (Path(name).expanduser() / "config.json").is_file():
            raise FileError(f"The folder {name} holds no config.json, so it is not a transformers model.")
        return
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise unknown("model", name, CATALOGUE)
