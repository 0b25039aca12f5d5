"""A caption with its object words marked, right ones and hallucinated ones, as pieces of text or as HTML."""

import html
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from interp.evaluation.vocabulary import Mention

Mark = Literal["", "right", "wrong"]
STYLES = {
    "right": "background:#2f7bc033;border-bottom:2px solid #2f7bc0;padding:0 2px",
    "wrong": "background:#d4652f33;border-bottom:3px double #d4652f;padding:0 2px;font-weight:600",
}


class Piece(NamedTuple):
    """A stretch of a caption: `right` names an object that is there, `wrong` one that is not, `""` none."""

    text: str
    mark: Mark


def pieces(caption: str, mentions: Sequence[Mention], objects: Collection[str]) -> list[Piece]:
    """A caption cut at its mentions; the pieces together are the caption.

    Args:
        caption: the text.
        mentions: from `Vocabulary.mentions` of that text.
        objects: the classes that are in the image.
    """
    found, at = [], 0
    for mention in mentions:
        found.append(Piece(caption[at : mention.start], ""))
        found.append(Piece(caption[mention.start : mention.end], "right" if mention.name in objects else "wrong"))
        at = mention.end
    return [piece for piece in [*found, Piece(caption[at:], "")] if piece.text]


def marked(caption: str, mentions: Sequence[Mention], objects: Collection[str]) -> str:
    """A caption as HTML for a notebook, with its object words marked and all its text escaped.

    Right words are underlined in blue; hallucinated ones are red-orange, bold, with a double line.

    Args:
        caption: the text.
        mentions: from `Vocabulary.mentions` of that text.
        objects: the classes that are in the image.
    """
    return "".join(
        f"<span style='{STYLES[piece.mark]}' title='{'in the image' if piece.mark == 'right' else 'not in the image'}'>"
        f"{html.escape(piece.text)}</span>"
        if piece.mark
        else html.escape(piece.text)
        for piece in pieces(caption, mentions, objects)
    )
