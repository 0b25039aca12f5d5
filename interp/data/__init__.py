"""Prompt sets (files, and generators of the field's standard ones), and corpora of text and pictures."""

from interp.data.corpora import (
    Corpus,
    Document,
    FileCorpus,
    HubCorpus,
    PictureCorpus,
    SceneCorpus,
    TextCorpus,
    corpus,
)
from interp.data.prompts import Prompt, indirect_objects, read_prompts, repeated_tokens

__all__ = [
    "Corpus",
    "Document",
    "FileCorpus",
    "HubCorpus",
    "PictureCorpus",
    "Prompt",
    "SceneCorpus",
    "TextCorpus",
    "corpus",
    "indirect_objects",
    "read_prompts",
    "repeated_tokens",
]
