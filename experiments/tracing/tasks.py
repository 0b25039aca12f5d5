"""Tasks with a clean and a corrupt prompt of as many tokens, an answer, and a wrong one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import interp
from experiments.tracing.facts import CAPITALS
from interp.batch import Batch
from interp.data import indirect_objects
from interp.data.prompts import NAMES

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True, slots=True)
class Item:
    clean: str
    corrupt: str
    answer: str
    wrong: str


def objects(seed: int = 0) -> Iterator[Item]:
    """Indirect objects; corrupt: three other names in the three places (Wang et al. 2022, p_ABC)."""
    source = random.Random(seed)
    for p in indirect_objects(2000, seed=seed):
        io, subject = p.labels["io"], p.labels["subject"]
        a, b, c = source.sample([n for n in NAMES if n not in (io, subject)], 3)
        head, _, tail = p.text.rpartition(subject)
        changed = head.replace(io, "\0").replace(subject, b).replace("\0", a) + c + tail
        yield Item(p.text, changed, f" {io}", f" {subject}")


def repetition(seed: int = 0) -> Iterator[Item]:
    """A list of names said again; corrupt: its last name is another one the first time."""
    source = random.Random(seed)
    while True:
        *names, other = source.sample(NAMES, 6)
        again = ", ".join(names[:4])
        yield Item(f"{', '.join(names)}. {again},", f"{again}, {other}. {again},", f" {names[4]}", f" {other}")


def capitals(seed: int = 0) -> Iterator[Item]:
    """The capital of a country; corrupt: of another one."""
    source = random.Random(seed)
    seen = set()
    while True:
        (one, city), (two, wrong) = source.sample(sorted(CAPITALS.items()), 2)
        if (one, two) not in seen and " " not in city + wrong:
            seen.add((one, two))
            form = "The capital city of {} is"
            yield Item(form.format(one), form.format(two), f" {city}", f" {wrong}")


def days(seed: int = 0) -> Iterator[Item]:
    """The day after three; corrupt: three other days."""
    source = random.Random(seed)
    forms = ("{}, {}, {},", "The days are {}, {}, {},", "We met on {}, {}, {},", "Open on {}, {}, {},", "{} {} {}")
    for form in forms:
        for first in range(7):
            other = (first + source.randrange(1, 7)) % 7
            rows = [[DAYS[(start + i) % 7] for i in range(4)] for start in (first, other)]
            yield Item(*(form.format(*row) for row in rows), f" {rows[0][3]}", f" {rows[1][3]}")


TASKS = {"indirect object": objects, "repetition": repetition, "capitals": capitals, "days": days}


def items(lens: interp.Lens, task: str, count: int) -> tuple[list[Item], float]:
    """The first items whose runs correspond, whose answers are one token each, and that the model gets right.

    Returns:
        The items, and the share of those that fit which it gets right (the answer beats the wrong one).
    """
    tokenizer, found, tried = lens.processor, [], 0
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for item in TASKS[task]():
        answers = [ids(item.answer), ids(item.wrong)]
        if (
            len(ids(item.clean)) != len(ids(item.corrupt))
            or any(len(a) != 1 for a in answers)
            or answers[0] == answers[1]
        ):
            continue
        logits = lens.run(lens.prepare(item.clean), "logits@last").logits[0, -1]
        tried += 1
        if logits[answers[0][0]] > logits[answers[1][0]]:
            found.append(item)
        if len(found) == count:
            break
    return found, len(found) / tried


def batches(lens: interp.Lens, found: list[Item]) -> tuple[Batch, Batch, dict[str, list[str]]]:
    """Both runs, and the answers."""
    runs = [lens.prepare([getattr(i, name) for i in found], padding_side="left") for name in ("clean", "corrupt")]
    return runs[0], runs[1], {"answers": [i.answer for i in found], "wrong": [i.wrong for i in found]}
