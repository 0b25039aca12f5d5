"""Words of a caption with their places, plural forms, and how much of a text repeats itself."""

import re
from collections.abc import Iterator
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+(?:[-_/'\u2019][^\W_]+)*")
_POSSESSIVE = re.compile(r"['\u2019]s$")

_SAME = frozenset("sheep fish deer moose bison aircraft watercraft waterfowl cattle offspring scissors skis".split())
_IRREGULAR = {
    **{"person": ("people", "persons"), "child": ("children",), "ox": ("oxen",), "mouse": ("mice",)},
    **{"goose": ("geese",), "foot": ("feet",), "tooth": ("teeth",), "die": ("dice", "dies"), "louse": ("lice",)},
    **{"human": ("humans",), "german": ("germans",), "cactus": ("cacti", "cactuses")},
}
_IRREGULAR_ENDS = {"man": "men", "child": "children", "person": "people", "mouse": "mice"}
_VES = frozenset("knife wife life calf half elf self shelf wolf leaf loaf thief sheaf hoof scarf dwarf".split())
_OES = frozenset("potato tomato hero echo torpedo".split())
_OS_OR_OES = frozenset("mango buffalo mosquito volcano tornado cargo halo zero flamingo banjo".split())


class Word(NamedTuple):
    """A word of a text: in lower case, and the characters `text[start:end]` where it stands."""

    text: str
    start: int
    end: int


def words(text: str) -> list[Word]:
    """The words of a text in order, in lower case, without punctuation.

    Words with a hyphen, a slash or an apostrophe inside stay whole ("hot-dog" is one word), as in NLTK's tokeniser,
    which CHAIR uses; a final "'s" is cut off.
    """
    found = []
    for match in _WORD.finditer(text):
        word = _POSSESSIVE.sub("", match[0])
        found.append(Word(word.lower(), match.start(), match.start() + len(word)))
    return found


def plurals(word: str) -> tuple[str, ...]:
    """The plural forms of an English noun in lower case; several where usage is divided.

    Regular endings, the usual irregular nouns and their compounds ("policemen"). A noun that is its own plural has
    none.
    """
    if word in _SAME:
        return ()
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for end, plural in _IRREGULAR_ENDS.items():
        if word.endswith(end):
            return (word.removesuffix(end) + plural,)
    stem = next((w for w in _VES if word.endswith(w)), None)
    if stem is not None:
        ves = word.removesuffix("fe" if stem.endswith("fe") else "f") + "ves"
        return (ves, word + "s") if stem in ("scarf", "dwarf", "hoof") else (ves,)
    if re.search(r"[^aeiou]y$", word):
        return (word[:-1] + "ies",)
    if word in ("bus", "gas"):
        return (word + "es", word + "ses")
    if re.search(r"(?:s|x|z|ch|sh)$", word):
        return (word + "es",)
    if word in _OES:
        return (word + "es",)
    return (word + "s", word + "es") if word in _OS_OR_OES else (word + "s",)


def grams(items: list[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every run of `n` neighbours."""
    return (tuple(items[i : i + n]) for i in range(len(items) - n + 1))
