"""Architectures by name. A third party adds its own with `register`.

An architecture is a stateless object; its parameters are those of the dictionary that it is given, under the names that
SAELens uses (`W_enc`, `b_enc`, `W_dec`, `b_dec`, `threshold`, ...).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

from interp.errors import SettingsError, unknown

if TYPE_CHECKING:
    from interp.dictionaries.base import Architecture

_OWN = {
    "standard": "standard:Standard",
    "gated": "gated:Gated",
    "topk": "topk:TopK",
    "abstopk": "abstopk:AbsTopK",
    "batchtopk": "batchtopk:BatchTopK",
    "jumprelu": "jumprelu:JumpReLU",
    "matryoshka_batchtopk": "matryoshka:MatryoshkaBatchTopK",
}
_KNOWN: dict[str, Architecture] = {}


def register(name: str, kind: Architecture) -> None:
    """Make an architecture known under a name, for `SAE(architecture=name)` and for files.

    Raises:
        SettingsError: the name is taken.
    """
    if name in _OWN or name in _KNOWN:
        raise SettingsError(f"an architecture named {name!r} is registered already; choose another name.")
    _KNOWN[name] = kind


def architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        UnknownNameError: there is none; the message names the nearest.
    """
    if name not in _KNOWN and name in _OWN:
        module, own = _OWN[name].split(":")
        _KNOWN[name] = getattr(import_module(f"interp.dictionaries.{module}"), own)()
    if name not in _KNOWN:
        raise unknown("architecture", name, names())
    return _KNOWN[name]


def names() -> Iterator[str]:
    """All names, ours first."""
    yield from dict.fromkeys([*_OWN, *_KNOWN])
