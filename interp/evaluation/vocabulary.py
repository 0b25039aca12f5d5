"""Which words name which class: synonyms, words that belong together, and the mentions found in a text.

Source of the procedure: Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156, and
its code (LisaAnne/Hallucination): lower-case, split into words, make them singular, join pairs of words ("hot dog";
"baby bird" counts as bird, "passenger train" as train, "toilet seat" as toilet), drop "seat" from a text that also
holds "toilet", and look what is left up in the table of synonyms.

Where it departs: the code makes every word singular by a library that is no longer kept and spoils some ("glass" to
"glas"); here the plural forms of the table's own words are recognised, and no other word is touched. Two entries of the
original file that a stray space makes unreachable ("motor bike", "cheesecake") and one in mixed case ("iPhone") count
here.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from interp.errors import FileError, InputError, unknown
from interp.evaluation.words import Word, plurals, words
from interp.files import read_json, write_json

COCO_FILE = Path(__file__).with_name("coco_vocabulary.json")


class Mention(NamedTuple):
    """A word of a text that names a class.

    Attributes:
        name: the class.
        word: the word or words as the table holds them (singular, lower case).
        start: where it stands: `text[start:end]`.
        end: the character after its last.
    """

    name: str
    word: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Vocabulary:
    """Classes, the words that name them, and the rules for words that belong together.

    Made by `Vocabulary.of`, `Vocabulary.coco` or `Vocabulary.read`. Two vocabularies are equal when their tables are.

    Attributes:
        classes: for each class its words; its own name is always among them. Words may be several ("fire hydrant"):
            these are joined wherever they follow each other.
        joined: further words that are joined, and what they then count as; "home plate" counts as itself, which names
            no class, so neither half is looked up.
        dropped: pairs (if, drop): a text that holds the first word loses every occurrence of the second.
        name: what it is called in results.

    Raises:
        InputError: no classes, an empty word, or a word that names two classes.
    """

    classes: Mapping[str, Sequence[str]]
    joined: Mapping[str, str] = field(default_factory=dict)
    dropped: Sequence[tuple[str, str]] = ()
    name: str = "vocabulary"
    _class_of: Mapping[str, str] = field(init=False)
    _singular: Mapping[str, str] = field(init=False)
    _runs: Mapping[tuple[str, ...], str] = field(init=False)
    _longest: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.classes:
            raise InputError("a vocabulary needs at least one class.")
        table = {name: tuple(dict.fromkeys([_plain(name), *map(_plain, of)])) for name, of in self.classes.items()}
        class_of: dict[str, str] = {}
        for name, synonyms in table.items():
            for word in synonyms:
                if word in class_of:
                    raise InputError(f"the word {word!r} names two classes, {class_of[word]!r} and {name!r}; take one.")
                class_of[word] = name
        joined = {_plain(key): _plain(value) for key, value in self.joined.items()}
        for key in joined:
            if " " not in key:
                raise InputError(f"joined words are two or more, found {key!r}.")
        runs = {tuple(word.split()): word for word in class_of if " " in word}
        runs |= {tuple(key.split()): value for key, value in joined.items()}
        known = dict.fromkeys(part for word in [*class_of, *joined, *joined.values()] for part in word.split())
        set_ = object.__setattr__
        set_(self, "classes", MappingProxyType(table))
        set_(self, "joined", MappingProxyType(joined))
        set_(self, "dropped", tuple((_plain(a), _plain(b)) for a, b in self.dropped))
        set_(self, "_class_of", MappingProxyType(class_of))
        set_(self, "_singular", MappingProxyType({form: word for word in reversed(known) for form in plurals(word)}))
        set_(self, "_runs", MappingProxyType(runs))
        set_(self, "_longest", max(map(len, runs), default=1))

    @classmethod
    def of(cls, names: Iterable[str], *, name: str = "closed") -> "Vocabulary":
        """A closed vocabulary: each name is its own class; plural forms are recognised.

        Raises:
            InputError: no names, an empty one, or one given twice.
        """
        if isinstance(names, str):
            raise InputError(f"give a list of names, found the text {names!r}.")
        given = list(names)
        for one in given:
            if given.count(one) > 1:
                raise InputError(f"the class {one!r} is given twice.")
        return cls(dict.fromkeys(given, ()), name=name)

    @classmethod
    def coco(cls) -> "Vocabulary":
        """The 80 classes of COCO with the synonyms and rules of CHAIR.

        The table is that of LisaAnne/Hallucination (BSD 2-Clause; see `coco_vocabulary.LICENSE.txt` beside it). It
        counts "orange" the colour as a fruit and "bow" as a tie; numbers are comparable only with the same table
        (`hash`).
        """
        return _coco()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """A vocabulary from a file: `.json` as `write` makes it, or `.txt` in the form of CHAIR's synonyms.

        In a text file each line is a class and its synonyms, separated by commas. The rules that its code adds for
        COCO ("hot dog", "baby bird", "toilet seat") apply where the vocabulary has the words. As in that code, words of
        three or more parts ("stove top oven") never match as a whole; they are left out.

        Raises:
            FileError: the file is missing, not UTF-8 or not of this form.
            InputError: a word names two classes, or the file holds none.
        """
        path = Path(path)
        if path.suffix == ".json":
            return _of_json(read_json(path), path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise FileError(f"{path} is not UTF-8.") from error
        table: dict[str, list[str]] = {}
        for number, line in enumerate(lines, 1):
            row = [" ".join(word.split()).lower() for word in line.split(",")]
            if not line.strip():
                continue
            if not all(row) or row[0] in table:
                what = "an empty word" if row[0] not in table else f"the class {row[0]!r} for the second time"
                raise InputError(f"{path}, line {number}: {what}; each line is one class: name, synonym, synonym.")
            table[row[0]] = [word for word in row[1:] if word.count(" ") < 2]
        if not table:
            raise InputError(f"{path} holds no classes; each line is one: name, synonym, synonym.")
        rules = _coco_file()
        return cls(table, rules["joined"], [(a, b) for a, b in rules["dropped"]], name=path.stem)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the table as json, for `read`.

        Raises:
            FileError: the file cannot be written.
        """
        write_json(path, {"name": self.name, **self._table()})

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, in the order of the table."""
        return tuple(self.classes)

    @property
    def hash(self) -> str:
        """The sha256 of the table (classes, synonyms and rules; not the name): copies of CHAIR's list differ."""
        text = json.dumps(self._table(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def mentions(self, text: str) -> list[Mention]:
        """Every word of a text that names a class, in order, repetitions included.

        Raises:
            InputError: it is no text.
        """
        if not isinstance(text, str):
            raise InputError(f"a caption is text, found {text!r} ({type(text).__name__}).")
        units = self._units(words(text))
        there = {word for word, *_ in units}
        gone = {drop for if_, drop in self.dropped if if_ in there}
        return [
            Mention(self._class_of[word], word, start, end)
            for word, start, end in units
            if word in self._class_of and word not in gone
        ]

    def class_of(self, word: str) -> str:
        """The class that a word names, such as a category of an annotation file.

        Raises:
            UnknownNameError: it names none.
        """
        plain = " ".join(str(word).lower().split())
        found = self._class_of.get(plain) or self._class_of.get(self._singular.get(plain, ""))
        if found is None:
            raise unknown("object", word, self.names, f"the vocabulary {self.name!r}")
        return found

    def __contains__(self, name: object) -> bool:
        """Whether a name is a class."""
        return name in self.classes

    def __iter__(self) -> Iterator[str]:
        """The classes."""
        return iter(self.classes)

    def __len__(self) -> int:
        """The number of classes."""
        return len(self.classes)

    def __eq__(self, other: object) -> bool:
        """Whether the tables are the same."""
        return isinstance(other, Vocabulary) and self._table() == other._table()

    def __hash__(self) -> int:
        """A hash that fits equality."""
        return hash(self.hash)

    def __repr__(self) -> str:
        """Sizes and the start of the hash."""
        return f"Vocabulary({self.name}: {len(self)} classes, {len(self._class_of)} words, {self.hash[:12]})"

    def _units(self, found: list[Word]) -> list[Word]:
        """Words in the singular, joined where they belong together; the longest run wins."""
        single = [word._replace(text=self._one(word.text)) for word in found]
        units, i = [], 0
        while i < len(single):
            size = min(self._longest, len(single) - i)
            while size > 1 and tuple(word.text for word in single[i : i + size]) not in self._runs:
                size -= 1
            run = single[i : i + size]
            text = run[0].text if size == 1 else self._runs[tuple(word.text for word in run)]
            units.append(Word(text, run[0].start, run[-1].end))
            i += size
        return units

    def _one(self, word: str) -> str:
        return word if word in self._class_of else self._singular.get(word, word)

    def _table(self) -> dict[str, Any]:
        classes = {name: sorted(set(synonyms) - {_plain(name)}) for name, synonyms in self.classes.items()}
        return {"classes": classes, "joined": dict(sorted(self.joined.items())), "dropped": sorted(self.dropped)}


def _plain(word: Any) -> str:
    if not isinstance(word, str) or not word.strip():
        raise InputError(f"a word of a vocabulary is text that is not empty, found {word!r}.")
    return " ".join(word.lower().split())


def _coco_file() -> Any:
    return read_json(COCO_FILE)


@lru_cache(maxsize=1)
def _coco() -> Vocabulary:
    return _of_json(_coco_file(), COCO_FILE)


def _of_json(found: Any, path: Path) -> Vocabulary:
    needed = {"classes": dict, "joined": dict, "dropped": list}
    if not isinstance(found, dict) or any(not isinstance(found.get(key), kind) for key, kind in needed.items()):
        raise FileError(f"{path} is no vocabulary: it needs classes, joined (both name to value) and dropped (a list).")
    pairs = found["dropped"]
    lists = found["classes"].values()
    if not all(isinstance(of, list) for of in lists) or any(not isinstance(p, list) or len(p) != 2 for p in pairs):
        raise FileError(f"{path} is no vocabulary: classes hold lists of words, and dropped holds pairs of words.")
    return Vocabulary(found["classes"], found["joined"], [(a, b) for a, b in pairs], name=found.get("name", path.stem))
