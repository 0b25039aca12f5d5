"""Generated sentences with subject-verb agreement, an attractor between subject and verb."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

SUBJECTS = (
    ("key", "keys"),
    ("book", "books"),
    ("teacher", "teachers"),
    ("picture", "pictures"),
    ("dog", "dogs"),
    ("car", "cars"),
    ("student", "students"),
    ("letter", "letters"),
    ("friend", "friends"),
    ("house", "houses"),
)
LINKS = ("near", "behind", "next to", "in front of", "with")
OTHERS = (
    ("cabinet", "cabinets"),
    ("table", "tables"),
    ("window", "windows"),
    ("tree", "trees"),
    ("child", "children"),
    ("door", "doors"),
)
ADJECTIVES = ("", "old ", "small ", "red ")


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence up to its verb, and which form the verb has to take."""

    text: str
    subject: str
    plural: bool
    attracted: bool

    @property
    def answer(self) -> str:
        """The right form."""
        return " are" if self.plural else " is"

    @property
    def wrong(self) -> str:
        """The other form."""
        return " is" if self.plural else " are"


def sentences(n: int, seed: int = 0) -> list[Sentence]:
    """Different sentences; half of the subjects plural, half of the attractors of the other number."""
    every = list(product(SUBJECTS, LINKS, OTHERS, ADJECTIVES, (False, True), (False, True)))
    random.Random(seed).shuffle(every)
    found: list[Sentence] = []
    for noun, link, other, adjective, plural, attracted in every[:n]:
        second = other[plural != attracted]
        found.append(Sentence(f"The {adjective}{noun[plural]} {link} the {second}", noun[plural], plural, attracted))
    return found
