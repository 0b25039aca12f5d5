"""Prompts whose next word is a country, a month, a number or a first name, and the words of these concepts.

The model has to know the answer: `known` keeps the prompts that it answers right, with the answer as its most likely
token, and no more than asked for of each concept and half. The words of a concept fall into two halves, so that heads
can be ranked with words and prompts of the one and measured on prompts of the other.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import interp
from interp.inputs import tokenizer_of

_CAPITALS = """Paris France Berlin Germany Tokyo Japan Beijing China Rome Italy Madrid Spain Ottawa Canada Brasilia
Brazil Delhi India Moscow Russia Athens Greece Cairo Egypt Lisbon Portugal Warsaw Poland Vienna Austria Budapest
Hungary Dublin Ireland Oslo Norway Stockholm Sweden Copenhagen Denmark Helsinki Finland Ankara Turkey Tehran Iran
Baghdad Iraq Damascus Syria Canberra Australia Havana Cuba Lima Peru Santiago Chile Bogota Colombia Nairobi Kenya
Hanoi Vietnam Bangkok Thailand Jakarta Indonesia Kiev Ukraine Brussels Belgium Bern Switzerland Caracas Venezuela
Islamabad Pakistan Kabul Afghanistan Kathmandu Nepal Jerusalem Israel Tripoli Libya Accra Ghana Lagos Nigeria Mumbai
India Shanghai China Munich Germany Milan Italy Barcelona Spain Toronto Canada Osaka Japan Lyon France Sydney
Australia Dhaka Bangladesh Bucharest Romania Sofia Bulgaria Quito Ecuador"""

_PEOPLE = """Einstein Albert Newton Isaac Darwin Charles Lincoln Abraham Washington George Shakespeare William Obama
Barack Trump Donald Reagan Ronald Kennedy John Nixon Richard Churchill Winston Thatcher Margaret Hitler Adolf Stalin
Joseph Lenin Vladimir Marx Karl Picasso Pablo Dickens Charles Austen Jane Hemingway Ernest Twain Mark Orwell George
Edison Thomas Jefferson Thomas Bach Johann Beethoven Ludwig Chopin Frederic Galilei Galileo Tesla Nikola Hawking
Stephen Curie Marie Faraday Michael Maxwell James Heisenberg Werner Planck Max Turing Alan Jackson Michael Lennon
John Dylan Bob Madison James Adams John Columbus Christopher Polo Marco Luther Martin Kant Immanuel Nietzsche
Friedrich Kepler Johannes King Martin Mandela Nelson Armstrong Neil Poe Edgar Whitman Walt Dickinson Emily Wilde
Oscar Joyce James Woolf Virginia Disney Walt Ford Henry Hitchcock Alfred Tolstoy Leo Chekhov Anton Monet Claude
Matisse Henri Warhol Andy Messi Lionel Pasteur Louis Mendel Gregor Linnaeus Carl Hume David Locke John Hobbes Thomas
Bacon Francis Smith Adam Wright Frank"""

_MONTHS = "January February March April May June July August September October November December".split()
_NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()

TEMPLATES: dict[str, tuple[str, ...]] = {
    "countries": (
        "Rome is the capital of Italy. {} is the capital of",
        "The embassy in {}, the capital of",
        "{} is a large city located in the country of",
    ),
    "months": (
        "After {} comes the month of",
        "The meetings are in {}, {} and",
        "The months of the year are, in order, {}, {},",
        "Between {} and the end of",
        "The work began in {} and ended in",
    ),
    "numbers": (
        "{}, {}, {},",
        "She counted: {}, {},",
        "Count slowly from {} to {} to",
        "There were {} or {} or",
    ),
    "first names": (
        "Newton's first name is Isaac. {}'s first name is",
        "The full name of {} is",
        "My favourite is {}. His or her first name was",
    ),
}
CONCEPTS = tuple(TEMPLATES)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the word that has to follow.

    Attributes:
        concept: one of `CONCEPTS`.
        text: the prompt.
        word: the answer; the token is this word with a space in front.
        half: 0 or 1, the half of the concept's words that the answer is in.
    """

    concept: str
    text: str
    word: str
    half: int

    @property
    def answer(self) -> str:
        """The answer as it follows the prompt."""
        return f" {self.word}"


def halves(lens: interp.Lens, concept: str, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """The words of a concept that are single tokens behind a space, shuffled and cut into two halves."""
    words = sorted({word for _, word in _facts(concept, 1)})
    words = [word for word in words if _single(lens, word)]
    random.Random(seed).shuffle(words)
    return words[::2], words[1::2]


def questions(lens: interp.Lens, concept: str, *, seed: int = 0) -> list[Question]:
    """Every prompt of a concept whose answer is a single token and does not stand in the prompt, shuffled."""
    split = halves(lens, concept, seed=seed)
    found = []
    for template in TEMPLATES[concept]:
        for given, word in _facts(concept, template.count("{}")):
            text = template.format(*given)
            if _single(lens, word) and f" {word}" not in f" {text}":
                found.append(Question(concept, text, word, int(word in split[1])))
    random.Random(seed).shuffle(found)
    return found


def known(lens: interp.Lens, asked: list[Question], *, each: int, batch_size: int = 32) -> list[Question]:
    """The first `each` questions of each half that the model answers right."""
    right = []
    ordered = sorted(asked, key=lambda q: len(q.text))
    for first in range(0, len(ordered), batch_size):
        some = ordered[first : first + batch_size]
        logits = lens.run(lens.prepare([q.text for q in some]), "logits@last").logits[:, -1]
        tokenizer = tokenizer_of(lens.processor)
        right += [q for q, i in zip(some, logits.argmax(-1).tolist(), strict=True) if tokenizer.decode([i]) == q.answer]
    kept = [q for q in asked if q in right]
    return [q for half in (0, 1) for q in [x for x in kept if x.half == half][:each]]


def _facts(concept: str, blanks: int) -> list[tuple[list[str], str]]:
    """What fills a template with so many blanks, and the word that follows."""
    if concept == "months":
        return [([_MONTHS[(i + j) % 12] for j in range(blanks)], _MONTHS[(i + blanks) % 12]) for i in range(12)]
    if concept == "numbers":
        return [(_NUMBERS[i : i + blanks], _NUMBERS[i + blanks]) for i in range(len(_NUMBERS) - blanks)]
    names = (_CAPITALS if concept == "countries" else _PEOPLE).split()
    return [([given], word) for given, word in zip(names[::2], names[1::2], strict=True)]


def _single(lens: interp.Lens, word: str) -> bool:
    return len(tokenizer_of(lens.processor)(f" {word}", add_special_tokens=False)["input_ids"]) == 1
