"""A result on disk and its checks: the base class, the registry, save and load, finite tensors, json settings."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from interp.errors import FileError, InputError, NonFiniteError, SettingsError
from interp.files import read_json, read_tensors, replacing, save_tensors, sha256, write_json

FORMAT, VERSION = "interp.scores", 1
_registry: "dict[str, type[Scores]]" = {}
_S = TypeVar("_S", bound="type[Scores]")
_R = TypeVar("_R", bound="Scores")


def register(cls: _S) -> _S:
    """Make a result class known to [`load`][interp.scores.load] by its name; use as a class decorator."""
    known = _registry.get(cls.__name__, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # equal when a module is reloaded
        raise SettingsError(f"a result class named {cls.__name__!r} is registered already, by {known.__module__}.")
    _registry[cls.__name__] = cls
    return cls


class Scores:
    """What every result type shares: saving, loading and comparing.

    A subclass is decorated with [`register`][interp.scores.register] and gives `_tensors` and `_fields`, which
    together hold everything, and `_restore`, which builds the result from them again.
    """

    __slots__ = ()
    TENSOR_FILE: ClassVar[str] = "scores.safetensors"
    JSON_FILE: ClassVar[str] = "scores.json"

    def _tensors(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def _fields(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> "Scores":
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `scores.safetensors` and `scores.json` into the folder `path`; what lay there before is replaced.

        Either both files are written or both old ones stay.

        Raises:
            FileError: the folder cannot be written.
        """
        folder = Path(path)
        with replacing(folder / self.JSON_FILE) as document, replacing(folder / self.TENSOR_FILE) as tensors:
            save_tensors(tensors, self._tensors())
            head = {"format": FORMAT, "version": VERSION, "class": type(self).__name__, "sha256": sha256(tensors)}
            write_json(document, head | {"fields": self._fields()})
        return folder

    @classmethod
    def load(cls: type[_R], path: str | os.PathLike[str]) -> _R:
        """Read a result of this class from the folder that `save` wrote.

        Raises:
            FileError: files are missing or damaged, hold another class, or come from a newer version of interp.
        """
        found = _read_head(path)
        if found["class"] != cls.__name__:
            raise FileError(
                f"{path} holds {found['class']}, not {cls.__name__}; interp.scores.load reads any result type."
            )
        return cast(_R, _read_body(cls, path, found))

    def equals(self, other: object) -> bool:
        """Whether two results hold the same numbers (NaN equal to NaN), dtypes and settings."""
        if not isinstance(other, Scores) or type(self) is not type(other) or self._fields() != other._fields():
            return False
        mine, theirs = self._tensors(), other._tensors()
        return mine.keys() == theirs.keys() and all(
            tensor.dtype == theirs[name].dtype and np.array_equal(tensor, theirs[name], equal_nan=True)
            for name, tensor in mine.items()
        )


def load(path: str | os.PathLike[str]) -> Any:
    """Read a result of any registered type from the folder that its `save` wrote.

    Raises:
        FileError: files are missing or damaged, of an unknown type, or from a newer version of interp.
    """
    found = _read_head(path)
    if found["class"] not in _registry:
        known = ", ".join(sorted(_registry))
        raise FileError(f"{path} holds a result of type {found['class']!r}, which is not known here. Known: {known}.")
    return _read_body(_registry[found["class"]], path, found)


def _read_head(path: str | os.PathLike[str]) -> dict[str, Any]:
    found = read_json(Path(path) / Scores.JSON_FILE)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FileError(f"{path} does not hold interp results: {Scores.JSON_FILE} is not of the format {FORMAT!r}.")
    if not isinstance(found.get("version"), int) or not isinstance(found.get("class"), str):
        raise FileError(f"{path} is damaged: {Scores.JSON_FILE} lacks its version or class.")
    if found["version"] > VERSION:
        raise FileError(
            f"{path} has version {found['version']} of the results format, this interp reads up to {VERSION}."
        )
    return found


def _read_body(cls: type[Scores], path: str | os.PathLike[str], found: dict[str, Any]) -> Scores:
    tensors = Path(path) / Scores.TENSOR_FILE
    if tensors.is_file() and sha256(tensors) != found.get("sha256"):
        raise FileError(f"{path} is damaged: {tensors.name} is not the file that {Scores.JSON_FILE} was written with.")
    try:
        return cls._restore(read_tensors(tensors), dict(found["fields"]))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise FileError(f"{path} is damaged: it does not make a {cls.__name__} ({error!r}).") from error


def checked(name: str, tensor: Tensor, sizes: Mapping[str, int], valid: Tensor | None = None) -> Tensor:
    """A tensor of a result, on the CPU, in float32 (float64 where it came so), with every number finite.

    Args:
        name: what the tensor is called in errors.
        tensor: floats.
        sizes: its axes by name and length, such as `{"layer": 30, "head": 9}`.
        valid: a mask over the last axes; where it is False the result is NaN, whatever stood there.

    Raises:
        InputError: the shape is another, or the numbers are not floats.
        NonFiniteError: NaN or infinity where `valid` is True; the message gives the first place by axis.
    """
    if list(tensor.shape) != list(sizes.values()) or not tensor.is_floating_point():
        wanted = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise InputError(f"{name} must be floats [{wanted}], found {describe(tensor)}.")
    kept = tensor.detach().cpu()
    kept = kept.clone() if kept.dtype in (torch.float32, torch.float64) else kept.float()
    bad = ~kept.isfinite()
    bad = bad if valid is None else bad & valid
    if bad.any():
        place = tuple(int(i) for i in bad.nonzero()[0])
        where = ", ".join(f"{axis} {index}" for axis, index in zip(sizes, place, strict=True))
        raise NonFiniteError(f"{name} is {kept[place].item()} at {where} (first of {int(bad.sum())} such places).")
    return kept if valid is None else kept.masked_fill(~valid, math.nan)


def jsonable(value: Any, where: str) -> Any:
    """The value as json gives it back (tuples as lists), or a SettingsError naming the first thing it cannot hold."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SettingsError(f"{where} has the key {key!r}: json knows only text as keys.")
        return {key: jsonable(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item, f"{where}[{i}]") for i, item in enumerate(value)]
    plain = value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
    if not plain:
        raise SettingsError(f"{where} is {value!r} ({type(value).__name__}), which json cannot hold; write it as text.")
    return json.loads(json.dumps(value))


def describe(tensor: Tensor) -> str:
    """The dtype and shape of a tensor in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
