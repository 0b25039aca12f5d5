"""`corpus`: one function for every kind of corpus."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from interp.data.corpora.corpus import Corpus, TextCorpus
from interp.data.corpora.files import Documents, FileCorpus
from interp.data.corpora.hub import HubCorpus
from interp.data.corpora.pictures import PictureCorpus, SceneCorpus
from interp.errors import InputError, SettingsError

HUB = "hf:"


def corpus(
    source: str | os.PathLike[str] | Sequence[str] | Any,
    *,
    column: str | None = None,
    documents: Documents | None = None,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    images: str | os.PathLike[str] | None = None,
    n: int | None = None,
    seed: int | None = None,
) -> Corpus:
    """A corpus from whatever holds the documents.

    Args:
        source: a list of texts; a text, `.jsonl` or `.parquet` file; a folder of such files; `hf:NAME` for a data set
            of the Hugging Face hub; a data set of the `datasets` library; `scenes`; or a corpus, which is returned.
        column: the column of tables and data sets with the text; None for `text`.
        documents: how text files are cut: `paragraphs`, `lines` or `files` (see `FileCorpus`).
        split: of a data set (None: `train`) or of the scenes (None: `train`).
        config: of a data set.
        revision: of a data set.
        images: a folder with pictures: `source` is then a prompt file, whose paths are relative to it.
        n: how many scenes (None: 10,000).
        seed: of the order of documents; None to keep the source's own.

    Raises:
        FileError: it is not there or cannot be read.
        InputError: it is empty, or has no such column.
        SettingsError: an option that this kind of source does not have.
        MissingPackageError: `hf:` without the `datasets` library.
    """
    given = {"column": column, "documents": documents, "split": split, "config": config, "revision": revision, "n": n}
    given |= {"images": images, "seed": seed}

    def only(what: str, *allowed: str) -> dict[str, Any]:
        strange = [k for k, v in given.items() if v is not None and k not in allowed]
        if strange:
            raise SettingsError(
                f"{', '.join(strange)} cannot be chosen for {what}; only {', '.join(allowed) or 'none'}."
            )
        return {k: given[k] for k in allowed if given[k] is not None}

    if isinstance(source, Corpus):
        only("a corpus that is made already")
        return source
    if images is not None:
        only("pictures with prompts", "images", "seed")
        if not isinstance(source, (str, os.PathLike)):
            raise InputError("with images= the source is the path of a prompt file.")
        return PictureCorpus(images, prompts=source, seed=seed)
    if isinstance(source, str) and source == "scenes":
        return SceneCorpus(**only("the scenes", "split", "n", "seed"))
    if isinstance(source, str) and source.startswith(HUB):
        return HubCorpus(
            source.removeprefix(HUB), **only("a data set of the hub", "column", "split", "config", "revision", "seed")
        )
    if isinstance(source, (str, os.PathLike)):
        return FileCorpus(source, **only("files", "column", "documents", "seed"))
    if hasattr(source, "column_names"):
        return HubCorpus(source, **only("a data set at hand", "column", "seed"))
    if isinstance(source, Sequence):
        return TextCorpus(source, **only("a list of texts", "seed"))
    raise InputError(f"a corpus cannot be made from a {type(source).__name__}: give texts, a path, or hf:NAME.")
