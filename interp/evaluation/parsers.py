"""Yes or no, read out of an answer: robustly, as POPE's original code does it, and as MME's does."""

import re
from typing import Literal

from interp.errors import InputError

Parsed = Literal["yes", "no"] | None

_YES, _NO = r"(?:yes|yeah|yep|yup)", r"(?:no|nope|nah)"
_BOTH = re.compile(rf"\b{_YES}\b\s*(?:or|and|/)\s*\b{_NO}\b|\b{_NO}\b\s*(?:or|and|/)\s*\b{_YES}\b")
_FIRST = re.compile(rf"\W*(?:(?:the )?answer(?: is)?\W+)?(?:(?P<yes>{_YES})|(?P<no>{_NO}))\b")
_VERBS = r"(?:know|tell|say|determine|decide|judge|confirm|answer|be (?:sure|certain|determined))"
_UNSURE = re.compile(
    r"\b(?:(?:do|does|did|can|could|am|is)(?:n't| ?not)|unable to|hard to|difficult to|impossible to) "
    rf"(?:\w+ly )?{_VERBS}\b"
    r"|\b(?:not|n't) (?:\w+ly )?(?:sure|certain|clear|possible|visible enough)\b"
    r"|\b(?:unsure|uncertain|unclear|unknown)\b"
    r"|\bno (?:idea|clue|way (?:to|of)|information)\b"
)
_NEGATED = re.compile(r"\b(?:not|none|neither|cannot|without|absent)\b|n't\b")
_STATED = re.compile(r"\W*(?:there(?:'s| is| are)|it is|they are|it's)\b")


def parse_answer(text: str) -> Parsed:
    """Yes, no, or None where the answer is neither.

    In this order: an answer that starts with a yes or no word is that ("No, there is not"; but not "no idea" or "yes or
    no"); one that says it is unsure is None ("I do not know"); one that holds yes or no words of one kind is that; one
    that is negated is no ("there isn't one", "I cannot see a dog"); one that states is yes ("There is a dog"). Case,
    punctuation and line breaks do not matter.

    Raises:
        InputError: it is no text.
    """
    plain = " ".join(_text(text).lower().replace("\u2019", "'").split())
    if _BOTH.search(plain):
        return None
    first = _FIRST.match(plain)
    if first is not None and not re.match(r"\W*no (?:idea|clue|way (?:to|of)|information)\b", plain):
        return "yes" if first["yes"] else "no"
    if _UNSURE.search(plain):
        return None
    yes, no = (bool(re.search(rf"\b{word}\b", plain)) for word in (_YES, _NO))
    if yes or no:
        return None if yes and no else ("yes" if yes else "no")
    if _NEGATED.search(plain):
        return "no"
    return "yes" if _STATED.match(plain) else None


def parse_answer_compat(text: str) -> Literal["yes", "no"]:
    """Yes or no as POPE's original `evaluate.py` reads it (arXiv 2305.10355).

    The text up to the first full stop, without commas, cut at blanks only; "No", "not" or "no" among the parts makes it
    no, and anything else is yes: "No\\n", "No!", "Not" and the empty answer too. "I do not know" is no.

    Raises:
        InputError: it is no text.
    """
    parts = _text(text).split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(parts) else "yes"


def parse_answer_mme(text: str) -> Parsed:
    """Yes, no or None as MME reads it: from the first four characters in lower case, "yes" before "no".

    Raises:
        InputError: it is no text.
    """
    start = _text(text).lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def _text(text: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"an answer is text, found {text!r} ({type(text).__name__}).")
    return text
