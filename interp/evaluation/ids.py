"""Ids of images and questions: always text, unique, and the same on both sides."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from interp.errors import InputError

_T = TypeVar("_T")


def text_id(value: Any, what: str = "an image id") -> str:
    """An id as text.

    Raises:
        InputError: it is neither text nor a whole number, or empty.
    """
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise InputError(f"{what} is text or a whole number, found {value!r}.")
    return str(value)


def by_id(given: Mapping[Any, _T], what: str) -> dict[str, _T]:
    """A mapping with its ids as text.

    Raises:
        InputError: it is no mapping, empty, or two ids are the same as text.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{what} are a mapping from ids, found {type(given).__name__}.")
    if not given:
        raise InputError(f"no {what} were given.")
    found = {text_id(key): value for key, value in given.items()}
    if len(found) < len(given):
        raise InputError(f"two ids of the {what} are the same as text, such as 1 and '1'.")
    return found


def same_ids(
    have: Collection[str], want: Collection[str], *, what: str, of: str, subset: bool = False, hint: str = ""
) -> None:
    """Whether two sets of ids are the same.

    Args:
        have: ids of the things to be scored.
        want: ids that they must have.
        what: what is scored, in the plural.
        of: what they belong to, in the plural.
        subset: let `want` hold more.
        hint: what to do where some are missing.

    Raises:
        InputError: an id is not known, or one is missing.
    """
    want_set, have_set = set(want), set(have)
    strange = [one for one in have if one not in want_set]
    if strange:
        raise InputError(
            f"{len(strange)} of {len(have_set)} {what} belong to no known {of}: {_some(strange)}. "
            f"Known: {_some(list(want))} ({len(want_set)} in all)."
        )
    missing = [] if subset else [one for one in want if one not in have_set]
    if missing:
        raise InputError(f"{len(missing)} of {len(want_set)} {of} have no {what}: {_some(missing)}.{hint}")


def _some(ids: Iterable[str], most: int = 3) -> str:
    shown = list(ids)
    return ", ".join(repr(one) for one in shown[:most]) + (", ..." if len(shown) > most else "")
