"""A source that already is a transformers folder: its files are copied as they are."""

import shutil
from collections.abc import Mapping
from pathlib import Path


def convert(sources: Mapping[str, Path], target: Path) -> None:
    """Copy the source files into the folder `target` (plain copies, no links)."""
    for name, path in sources.items():
        shutil.copyfile(path, target / name)
