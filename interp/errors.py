"""The package's own errors: what was asked, what was found, what to do.

Every error derives from [`InterpError`][interp.errors.InterpError] and also from the built-in exception
that a caller would expect (`ValueError`, `ImportError`, ...), so ordinary `except` clauses keep working.
"""

import difflib
from collections.abc import Iterable


class InterpError(Exception):
    """Base class of every error that interp raises on purpose."""


class UnknownNameError(InterpError, ValueError):
    """A model, site, layer, head, tower, option or position was named that does not exist."""


class InputError(InterpError, ValueError):
    """Prompts, images, tensors or a prompt file cannot be used as given."""


class SettingsError(InterpError, ValueError):
    """Options contradict each other or lie outside their range."""


class EditError(InterpError, ValueError):
    """An edit does not fit the site that it was made for (shape, dtype, NaN, wrong kind of site)."""


class UnsupportedError(InterpError, NotImplementedError):
    """The model, tower or back end cannot give what was asked; the message names it and says why."""


class AnatomyError(InterpError, RuntimeError):
    """A model's parts could not be found, or failed their proof; the message holds the numbers that failed."""


class HookError(InterpError, RuntimeError):
    """A hook that should have fired never did, or fired on something of an unexpected form."""


class NonFiniteError(InterpError, ArithmeticError):
    """A NaN or an infinity stands in a result; the message gives its first place."""


class MissingPackageError(InterpError, ImportError):
    """A package that is needed for this is not installed; the message holds the command that installs it."""


class RemoteError(InterpError, ConnectionError):
    """A model was not run where its weights are; the message holds what the other library or NDIF says."""


class FileError(InterpError, OSError):
    """A file is missing, damaged, or not what it claims to be."""


def unknown(kind: str, asked: object, allowed: Iterable[object], where: str = "") -> UnknownNameError:
    """An [`UnknownNameError`][interp.errors.UnknownNameError] that names the nearest allowed names."""
    names = [str(a) for a in allowed]
    near = difflib.get_close_matches(str(asked), names, n=3)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    place = f" in {where}" if where else ""
    return UnknownNameError(f"{kind} {asked!r} does not exist{place}.{hint} Known: {', '.join(names) or 'none'}.")
