"""Where converted models are kept: converted once, under a lock, into place by one rename, and checked on use."""

import importlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interp.errors import FileError
from interp.models.catalogue import PackagedModel, row
from interp.models.hashing import sha256
from interp.models.install import source_files
from interp.models.writing import WEIGHTS, write_json

MARKER = "interp.json"


def cache_root() -> Path:
    """The folder that holds everything interp caches: `$INTERP_CACHE`, or the platform's cache folder."""
    chosen = os.environ.get("INTERP_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "interp"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "interp" / "cache"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "interp"


def place(name: str) -> Path:
    """The folder in the cache that belongs to a packaged model, whether it is there yet or not.

    Raises:
        UnknownNameError: no packaged model has this name.
    """
    return cache_root() / "models" / row(name).name


def folder(name: str) -> Path:
    """The transformers folder of a packaged model, converted first if it is not there yet.

    A folder that is there is checked cheaply: every file present, with the size it was written with.

    Raises:
        UnknownNameError: no packaged model has this name.
        MissingPackageError: it has to be converted and its package is not installed.
        FileError: a file of the converted folder is missing or truncated, or a source file is not the one expected.
    """
    model, target = row(name), place(name)
    if _is_current(model, target):
        _check_sizes(model, target)
        return target
    return convert(name)


def convert(name: str, *, force: bool = False) -> Path:
    """Convert a packaged model into the cache and return its folder.

    The sources' sha256 are checked first. The folder is written beside its final place and renamed, so it is there
    whole or not at all; other processes that want the same model wait. With nothing to do, nothing is done unless
    `force` is set.

    Raises:
        UnknownNameError: no packaged model has this name.
        MissingPackageError: its package is not installed.
        FileError: a source file has another sha256 than the one that was checked.
    """
    model, target = row(name), place(name)
    with _locked(target):
        if not force and _is_current(model, target):
            _check_sizes(model, target)
            return target
        sources = source_files(model)
        _check_sources(model, sources)
        with _replacing(target) as fresh:
            importlib.import_module(f"interp.models.{model.converter}").convert(sources, fresh)
            write_json(fresh / MARKER, _marker(model, fresh))
    return target


def verify(name: str) -> Path:
    """Check a converted model in full (the sha256 of every file) and return its folder.

    Raises:
        UnknownNameError: no packaged model has this name.
        FileError: it is not converted yet, was converted by another version of interp, or a file differs.
    """
    model, target = row(name), place(name)
    if not _is_current(model, target):
        state = (
            "was converted from other sources or by another version of interp" if target.exists() else "is not there"
        )
        raise FileError(f"The converted folder of {name!r} ({target}) {state}. Run: interp models convert {name}")
    _check_sizes(model, target)
    for file, expected in _read_marker(target)["files"].items():
        found = sha256(target / file)
        if found != expected["sha256"]:
            raise FileError(
                f"{target / file} has sha256 {found}, but {expected['sha256']} was written. "
                f"{_how_to_mend(model, target)}"
            )
    return target


def _marker(model: PackagedModel, written: Path) -> dict[str, Any]:
    files = {p.relative_to(written).as_posix(): p for p in sorted(written.rglob("*")) if p.is_file()}
    if WEIGHTS not in files:
        raise FileError(
            f"The converter {model.converter!r} wrote no {WEIGHTS} for {model.name!r}; this is a fault in interp."
        )
    return {
        "model": model.name,
        **_provenance(model),
        "files": {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()},
    }


def _provenance(model: PackagedModel) -> dict[str, Any]:
    return {
        "converter": model.converter,
        "converter_version": model.converter_version,
        "sources": {file.path: file.sha256 for file in model.files},
    }


def _read_marker(target: Path) -> dict[str, Any]:
    try:
        content = json.loads((target / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("files"), dict) else {}


def _is_current(model: PackagedModel, target: Path) -> bool:
    marker = _read_marker(target)
    return bool(marker) and all(marker.get(key) == value for key, value in _provenance(model).items())


def _check_sizes(model: PackagedModel, target: Path) -> None:
    for file, expected in _read_marker(target)["files"].items():
        path = target / file
        found = path.stat().st_size if path.is_file() else None
        if found != expected["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes, but {expected['bytes']} were written"
            raise FileError(f"{path} {state}. {_how_to_mend(model, target)}")


def _how_to_mend(model: PackagedModel, target: Path) -> str:
    return f"Delete the folder {target}, or run: interp models convert {model.name} --force"


def _check_sources(model: PackagedModel, sources: dict[str, Path]) -> None:
    for file in model.files:
        found = sha256(sources[file.name])
        if found != file.sha256:
            raise FileError(
                f"{sources[file.name]} has sha256 {found}, but the file checked for {model.name!r} has {file.sha256}; "
                f"it was not converted. Reinstall {model.package} {model.version}".rstrip()
                + "."
            )


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        yield


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Give a fresh folder to fill; on success it takes the place of `target`, on any exception it is removed."""
    fresh = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    old = fresh.with_name(f"{fresh.name}-old")
    fresh.mkdir()
    try:
        yield fresh
        if target.exists():
            os.replace(target, old)
        os.replace(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
