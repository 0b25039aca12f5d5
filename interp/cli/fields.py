"""How a command's settings are declared, checked, read from yaml and written as a template; the same for all."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

from interp.errors import FileError, SettingsError, unknown

_S = TypeVar("_S")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a list of names"}


def setting(
    default: Any,
    help: str,
    *,
    kind: type | None = None,
    choices: Iterable[str] = (),
    least: float | None = None,
    below: float | None = None,
    one: str = "",
    named: bool = False,
) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: its value where nothing is said.
        help: what it is, in one line.
        kind: its type; that of the default, or text where this is None.
        choices: all values that are allowed; for a tuple, of its members.
        least: the smallest number allowed.
        below: the number that it must stay below.
        one: what a member of a tuple is called in errors.
        named: whether the help names the choices already.
    """
    kind = kind or (str if default is None else type(default))
    about = {"help": help, "kind": kind, "choices": tuple(choices), "least": least, "below": below}
    return field(default=default, metadata={**about, "one": one, "named": named})


def check(settings: Any) -> None:
    """Every field's type, choices and range.

    Raises:
        UnknownNameError: a value does not exist.
        SettingsError: a value is of the wrong type or outside its range.
    """
    for row in fields(settings):
        value = getattr(settings, row.name)
        if value is not None or row.default is not None:
            _check(row.name, value, row.default, row.metadata)


def _check(name: str, value: Any, default: Any, about: Mapping[str, Any]) -> None:
    kind = about["kind"]
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (kind in (int, float) and isinstance(value, bool)):
        raise SettingsError(f"{name} is {_WORDS[kind]}, found {value!r}.")
    if kind is tuple:
        _check_names(name, value, default, about)
    elif about["choices"] and value != default and value not in about["choices"]:
        raise unknown(name, value, about["choices"])
    if about["least"] is not None and value < about["least"]:
        raise SettingsError(f"{name} must be at least {about['least']}, found {value}.")
    if about["below"] is not None and not value < about["below"]:
        raise SettingsError(f"{name} must be below {about['below']}, found {value}.")


def _check_names(name: str, value: tuple[Any, ...], default: Any, about: Mapping[str, Any]) -> None:
    if not all(isinstance(v, str) for v in value):
        raise SettingsError(f"{name} is a list of names, found {value!r}.")
    for one in value:
        if about["choices"] and one not in about["choices"]:
            raise unknown(about["one"] or name, one, about["choices"])
    if value != default and (not value or len(set(value)) < len(value)):
        raise SettingsError(f"{name} are one or more names, each once; found {', '.join(value) or 'none'}.")


def check_taken(settings: Any, chosen: Iterable[str], options: Mapping[str, Iterable[str]]) -> None:
    """Whether something was chosen that nothing here takes.

    Args:
        settings: what was chosen.
        chosen: the methods.
        options: for every method the settings that it takes; those of no method are for all.

    Raises:
        SettingsError: a setting differs from its default, and belongs to other methods alone.
    """
    takers: dict[str, list[str]] = {}
    for method, names in options.items():
        for name in names:
            takers.setdefault(name, []).append(method)
    chosen = list(chosen)
    for row in fields(settings):
        changed = getattr(settings, row.name) != row.default
        if changed and row.name in takers and not set(takers[row.name]) & set(chosen):
            raise SettingsError(
                f"{row.name} is an option of {', '.join(takers[row.name])}, not of {', '.join(chosen)}."
            )


def merged(cls: type[_S], layers: Iterable[Mapping[str, Any]]) -> _S:
    """Settings from several mappings, later ones over earlier ones; None in a later one leaves the earlier.

    Raises:
        UnknownNameError: a key is no setting; the nearest are named.
    """
    kinds = {row.name: row.metadata["kind"] for row in fields(cls)}  # pyright: ignore[reportArgumentType]
    found: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key not in kinds:
                raise unknown("setting", key, kinds)
            if value is not None or key not in found:
                found[key] = tuple(value) if kinds[key] is tuple and isinstance(value, list) else value
    return cls(**found)


def help_of(cls: type, name: str) -> str:
    """What a setting is, in one line, with its choices and default."""
    row = next(row for row in fields(cls) if row.name == name)
    about = row.metadata
    rest = f" ({'|'.join(about['choices'])})" if about["choices"] and not about["named"] else ""
    shown = str(row.default).lower() if about["kind"] is bool else str(row.default).removesuffix(".")
    default = "" if row.default in (None, "", ()) or about["kind"] is tuple else f" Default: {shown}."
    return f"{about['help'][0].upper()}{about['help'][1:]}{rest}.{default}"


def template(cls: type, head: str, shown: Mapping[str, Any], *, without: Iterable[str] = ()) -> str:
    """A commented config with the defaults.

    Args:
        cls: the settings.
        head: its first line.
        shown: values in place of defaults.
        without: settings that are left out.
    """
    import yaml

    lines = [f"# {head}"]
    for row in fields(cls):
        if row.name in without:
            continue
        value = shown.get(row.name, row.default)
        value = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
        choices = () if row.metadata["named"] else row.metadata["choices"]
        extra = f": {' | '.join(choices)}" if choices else ""
        lines += ["", f"# {row.metadata['help']}{extra}", f"{row.name}: {text}"]
    return "\n".join(lines) + "\n"


def read_config(path: str | os.PathLike[str], cls: type, files: Iterable[str]) -> dict[str, Any]:
    """The settings in a yaml file.

    Args:
        path: the file.
        cls: the settings that it is for.
        files: settings that are names of files; relative ones are taken relative to the config.

    Raises:
        FileError: the file is missing or not UTF-8.
        SettingsError: it is not yaml, holds a key twice, or is no mapping.
        UnknownNameError: a key is no setting.
    """
    found = read_yaml(path)
    known = [row.name for row in fields(cls)]
    for key in found:
        if key not in known:
            raise unknown("setting", key, known, where=str(path))
    for key in files:
        if isinstance(found.get(key), str):
            found[key] = str(Path(path).parent / found[key])
    return found


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a config holds, whatever it is for.

    Raises:
        FileError: the file is missing or not UTF-8.
        SettingsError: it is not yaml, holds a key twice, or is no mapping.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot read the config {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FileError(f"the config {path} is not UTF-8.") from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"the config {path} is not yaml: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"the config {path} must hold settings as `name: value`; `interp init` writes one.")
    seen = re.findall(r"^([A-Za-z_]\w*)\s*:", text, flags=re.MULTILINE)
    twice = [key for key in seen if seen.count(key) > 1]
    if twice:
        raise SettingsError(f"the config {path} holds {twice[0]!r} twice; each setting may stand once.")
    return found
