"""Yes/no questions about images, and how POPE makes them: random, popular and adversarial negatives.

Source: Li, Du, Zhou, Wang, Zhao, Wen, "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023,
arXiv 2305.10355; AoiDragon/POPE. Where it departs: choices are seeded, ties keep the order in which objects first
appear, and the article is changed where it stands, not in every word with an "a" (the code would ask after the
"imange").
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from interp.errors import InputError, SettingsError, unknown
from interp.evaluation.ids import by_id

Negatives = Literal["random", "popular", "adversarial"]
SPLITS: tuple[Negatives, ...] = ("random", "popular", "adversarial")
TEMPLATE = "is there a {name} in the image ?"
_ARTICLE = re.compile(r"\b([Aa])n?(?=\s+\{name\})")


@dataclass(frozen=True, slots=True)
class Question:
    """A question that is answered with yes or no.

    Attributes:
        id: what it is called; no two questions of a set share one.
        image: id of its image.
        text: what is asked.
        answer: the truth, `yes` or `no`.
        kind: what it belongs to: the kind of negatives of POPE, the task of MME.
        object: the object that is asked after; empty where there is none.

    Raises:
        InputError: a field is no text, empty (but for `object`), the kind is `all`, or the answer is neither yes nor
            no.
    """

    id: str
    image: str
    text: str
    answer: Literal["yes", "no"]
    kind: str
    object: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "image", "text", "kind", "object"):
            value = getattr(self, name)
            if not isinstance(value, str) or (name != "object" and not value.strip()):
                raise InputError(f"the {name} of a question is text that is not empty, found {value!r}.")
        if self.kind == "all":
            raise InputError(
                f"question {self.id!r} cannot be of the kind 'all': that is the name of all kinds together."
            )
        if self.answer not in ("yes", "no"):
            raise InputError(f"the answer of question {self.id!r} is 'yes' or 'no', found {self.answer!r}.")


def pope_questions(
    objects: Mapping[Any, Collection[str]],
    *,
    split: Negatives = "random",
    classes: Iterable[str] | None = None,
    per_image: int = 3,
    seed: int = 0,
    minimum: int = 3,
    template: str = TEMPLATE,
) -> list[Question]:
    """POPE's questions: for each image some objects that are there, each followed by one that is not.

    Asked after are the first `per_image` objects of each image (of a set, in alphabetical order). What is not there is
    chosen so: `random`, any absent class; `popular`, the absent class that is in most images; `adversarial`, the absent
    class that is most often in one image with the object just asked after. Where no popular or co-occurring class is
    left, a random one is taken. No object is asked after twice in an image. Frequencies are those of the images that
    are used.

    Args:
        objects: the classes that are in each image, by image id.
        split: the kind of negatives.
        classes: all classes that may be asked after; None takes those that are in some image used, as POPE does.
        per_image: how many present objects of an image are asked after (fewer where it has fewer).
        seed: seed of the random choices.
        minimum: images with fewer objects are left out.
        template: the question, with `{name}`; an "a" or "an" just before it is fitted to the name.

    Returns:
        Questions with ids `random-1`, `random-2`, ..., kind `split`.

    Raises:
        UnknownNameError: there is no such split, or an object is none of `classes`.
        SettingsError: a count lies outside its range, or the template has no `{name}`.
        InputError: no image has enough objects, or an image leaves too few classes that are absent.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if per_image < 1 or minimum < 1 or seed < 0:
        raise SettingsError(f"per_image and minimum are from 1 and seed from 0, found {per_image}, {minimum}, {seed}.")
    if template.count("{name}") != 1:
        raise SettingsError(f"the template holds {{name}} once, found {template!r}.")
    listed = {image: _listed(image, there) for image, there in by_id(objects, "objects").items()}
    used = {image: there for image, there in listed.items() if len(there) >= minimum}
    if not used:
        most = max(map(len, listed.values()))
        raise InputError(f"no image has the {minimum} objects that are needed (minimum); the most are {most}.")
    frequency = Counter(name for there in used.values() for name in there)
    universe = list(frequency) if classes is None else list(dict.fromkeys(classes))
    for image, there in used.items():
        for name in there:
            if name not in universe:
                raise unknown("object", name, universe, f"the classes, asked for image {image!r}")
    popular = [name for name, _ in frequency.most_common()]
    company = _company(used.values())
    random = np.random.default_rng(seed)
    found: list[Question] = []
    for image, there in used.items():
        asked = set(there)
        for present in there[:per_image]:
            order = {"random": [], "popular": popular, "adversarial": company[present]}[split]
            absent = next((name for name in order if name not in asked), None)
            if absent is None:
                left = [name for name in universe if name not in asked]
                if not left:
                    need = len(there) + min(per_image, len(there))
                    raise InputError(
                        f"image {image!r} has {len(there)} objects of {len(universe)} classes: {need} classes are "
                        "needed to ask after as many absent ones. Give more classes, or lower per_image."
                    )
                absent = left[int(random.integers(len(left)))]
            asked.add(absent)
            for name, answer in ((present, "yes"), (absent, "no")):
                one = f"{split}-{len(found) + 1}"
                found.append(Question(one, image, ask(template, name), answer, split, name))  # pyright: ignore[reportArgumentType]
    return found


def ask(template: str, name: str) -> str:
    """The template with a name in it; an "a" or "an" that stands just before `{name}` is fitted to the name."""
    article = r"\1n" if name[:1].lower() in "aeiou" else r"\1"
    return _ARTICLE.sub(article, template).replace("{name}", name)


def check_questions(questions: Iterable[Question]) -> dict[str, Question]:
    """Questions by id.

    Raises:
        InputError: there are none, something is no question, or two share an id.
    """
    found: dict[str, Question] = {}
    for one in questions:
        if not isinstance(one, Question):
            raise InputError(f"a question is a Question, found {type(one).__name__}.")
        if one.id in found:
            raise InputError(f"two questions have the id {one.id!r}.")
        found[one.id] = one
    if not found:
        raise InputError("no questions were given.")
    return found


def _listed(image: str, there: Collection[str]) -> list[str]:
    if isinstance(there, str) or not isinstance(there, Collection):
        raise InputError(f"the objects of image {image!r} are a collection of names, found {there!r}.")
    return list(dict.fromkeys(there)) if isinstance(there, Sequence) else sorted(there)


def _company(images: Collection[list[str]]) -> dict[str, list[str]]:
    """For each object the others that share images with it, the most frequent first."""
    pairs: dict[str, Counter[str]] = {name: Counter() for there in images for name in there}
    for there in images:
        for name in there:
            pairs[name].update(other for other in there if other != name)
    return {name: [other for other, _ in count.most_common()] for name, count in pairs.items()}
