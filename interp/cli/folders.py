"""What run folders share: the record in run.json, whether it is of the same run, and how a run is replaced."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import FileError, SettingsError
from interp.files import read_json, replacing, write_text

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True)
class Kind:
    """The run folders of one command.

    Attributes:
        format: what their record calls itself.
        command: the command.
        needed: keys that a record has.
        files: the command's own files, beside run.json.
        folders: its own folders.
    """

    format: str
    command: str
    needed: frozenset[str]
    files: tuple[str, ...]
    folders: tuple[str, ...]

    def read(self, path: Path) -> dict[str, Any]:
        """The record of a run folder.

        Raises:
            FileError: there is none, or it is another command's or damaged.
        """
        if not (path / "run.json").is_file():
            raise FileError(f"{path} is no run folder: it holds no run.json. `{self.command} --out {path}` makes one.")
        record = read_json(path / "run.json")
        if not isinstance(record, dict) or record.get("format") != self.format or not self.needed <= set(record):
            raise FileError(f"{path / 'run.json'} is damaged, or no record of `{self.command}`.")
        return record

    def open(self, path: Path, asked: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any]:
        """The record of a run that is begun or taken up.

        Args:
            path: the folder.
            asked: what decides what the numbers mean; keys of checksums end in `_sha256`, and may be new in a run that
                is taken up.
            overwrite: remove the run that is there (files of other names stay).

        Returns:
            The record that is there, brought up to date; without a run there, its first entries.

        Raises:
            FileError: the folder holds something else than such a run, or its record is damaged.
            SettingsError: it holds a run with other settings or files; the first that differs is named.
        """
        asked = json.loads(json.dumps(asked))
        record: dict[str, Any] = {}
        if (path / "run.json").is_file():
            record = self.read(path)
            if overwrite:
                self._remove(path)
                record = {}
            else:
                _compare(path, record["fingerprint"], asked)
        elif path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise FileError(f"{path} is no run folder and not empty; give another --out.")
        asked = {**record.get("fingerprint", {}), **asked}
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return {**record, "format": self.format, "version": 1, "hash": digest, "fingerprint": asked}

    def _remove(self, path: Path) -> None:
        # The record goes first: a folder without it is taken for nothing that could be resumed.
        for name in ("run.json", *self.files):
            (path / name).unlink(missing_ok=True)
        for name in self.folders:
            shutil.rmtree(path / name, ignore_errors=True)


def _compare(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    # A file that the methods so far did not need may come with those that do.
    new = {key for key in asked if key.endswith("_sha256") and key not in there}
    different = [key for key in asked if key not in new and there.get(key) != asked[key]]
    if not different:
        return
    key = different[0]
    what = (
        f"other {key.removesuffix('_sha256')}"
        if key.endswith("_sha256")
        else f"other settings: {key} is {there.get(key)!r} there, asked is {asked[key]!r}"
    )
    more = f" (and {', '.join(different[1:])})" if len(different) > 1 else ""
    raise SettingsError(f"{path} holds a run with {what}{more}. Give another --out, or --overwrite to replace it.")


def format_of(path: str | os.PathLike[str]) -> str | None:
    """What the record of a run folder calls itself; None where there is none."""
    file = Path(path) / "run.json"
    record = read_json(file) if file.is_file() else None
    return record.get("format") if isinstance(record, dict) else None


def write_settings(path: Path, settings: Mapping[str, Any], command: str) -> None:
    """Write `settings.yaml`, with which a command repeats the run."""
    import yaml

    head = f"# What this run was asked. To repeat it: {command} --config settings.yaml --out ANOTHER_FOLDER\n"
    write_text(path / "settings.yaml", head + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def write_figures(folder: Path, figures: "Mapping[str, go.Figure]") -> None:
    """One .html for each figure by its name; all draw with the script beside them, without a network."""
    from plotly.offline import get_plotlyjs

    write_text(folder / "plotly.min.js", get_plotlyjs())
    for name, figure in figures.items():
        with replacing(folder / f"{name}.html") as temporary:
            figure.write_html(temporary, include_plotlyjs="directory", include_mathjax=False)
