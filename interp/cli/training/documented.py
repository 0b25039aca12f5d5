"""Settings of the command line made from a dataclass of the library, so that nothing is described twice."""

import re
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

from interp.cli.fields import setting


def settings_of(cls: type, *, without: Iterable[str] = ()) -> list[tuple[str, type, Any]]:
    """A field for each field of `cls` that has a default: its type, default and choices, and the docstring's words.

    Args:
        cls: a dataclass whose docstring has a section `Attributes:`.
        without: names to leave out.
    """
    described, hints = _described(cls), typing.get_type_hints(cls)
    left = set(without)
    rows = [row for row in fields(cls) if row.name not in left and row.default is not MISSING]
    return [(row.name, *_field(row, hints[row.name], described[row.name])) for row in rows]


def _field(row: Field, hint: Any, text: str) -> tuple[type, Any]:
    choices: tuple[Any, ...] = ()
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    kinds = [part for part in parts if part is not type(None)]
    literal = [part for part in kinds if typing.get_origin(part) is typing.Literal]
    if literal:
        choices, kinds = typing.get_args(literal[0]), [str]
    kind = tuple if typing.get_origin(kinds[0]) is tuple else kinds[0]
    return kind, setting(row.default, text, kind=kind, choices=[c for c in choices if c is not None], named=True)


def _described(cls: type) -> dict[str, str]:
    """What the docstring says of each attribute, in one line without the marks of code."""
    text = (cls.__doc__ or "").partition("Attributes:")[2].partition("Raises:")[0]
    entries = re.findall(r"^ {4,8}(\w+): (.+?)(?=^ {4,8}\w+: |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return {name: " ".join(said.split()).rstrip(".").replace("`", "") for name, said in entries}
