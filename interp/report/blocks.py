"""What a report is made of: sections of blocks, and the provenance of the numbers."""

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PACKAGES = ("interp", "torch", "transformers", "safetensors", "numpy", "pandas", "plotly")


@dataclass(frozen=True, slots=True)
class Text:
    """Plain paragraphs: no markup is understood; an empty line starts a new paragraph."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A pandas frame, sortable in the page; its index is not shown.

    Attributes:
        frame: the rows.
        caption: plain text above the table.
        max_rows: at most this many rows are written; the page says so when some were left out.
    """

    frame: "pd.DataFrame"
    caption: str = ""
    max_rows: int = 500


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """A plotly figure with a caption in plain text below it."""

    figure: "go.Figure"
    caption: str = ""


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Names and values side by side; mappings and lists within are written as json."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Prompts:
    """A numbered list of texts, with their white space as it is.

    Attributes:
        texts: the texts.
        caption: plain text above the list.
        max_texts: at most this many are written; the page says so when some were left out.
    """

    texts: Sequence[str]
    caption: str = ""
    max_texts: int = 200


@dataclass(frozen=True, slots=True)
class Picture:
    """An image with a text beside it.

    Attributes:
        png: the image as the bytes of a PNG file.
        title: plain text above the text.
        text: the text in pieces, each with its mark: `right` or `wrong` to set it off, or `""`.
    """

    png: bytes
    title: str
    text: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Pictures:
    """Images, one below the other, each with a text in which some words are marked.

    Attributes:
        items: the images.
        caption: plain text above them.
    """

    items: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Scale:
    """What colours mean.

    Attributes:
        colours: `#rrggbb`, from the lowest value to the highest, evenly apart.
        low: what is written at the lowest.
        high: what is written at the highest.
    """

    colours: Sequence[str]
    low: str
    high: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A coloured text, below a picture where there is one; several stand side by side.

    Attributes:
        title: plain text above.
        chips: the text in pieces: what is written, what the mouse shows, the colour behind it and its own (`#rrggbb`).
        scale: what the colours mean.
        png: a picture as the bytes of a PNG file, or nothing.
        png_scale: what the picture's colours mean.
        note: plain text below.
    """

    title: str
    chips: Sequence[tuple[str, str, str, str]] = ()
    scale: Scale | None = None
    png: bytes = b""
    png_scale: Scale | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Panels:
    """Coloured texts and pictures side by side, to be compared.

    Attributes:
        items: what stands side by side.
        caption: plain text above them.
    """

    items: Sequence[Panel]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Folded:
    """Something that is shown when its title is clicked, or chosen and entered with the keyboard.

    Attributes:
        title: plain text that is always shown.
        blocks: what is folded away; no figures, which have no size to be drawn in until they are shown.

    Raises:
        InputError: there is a figure or something that is no block inside.
    """

    title: str
    blocks: "Sequence[Text | Table | KeyValues | Prompts]"

    def __post_init__(self):
        for block in self.blocks:
            if not isinstance(block, Text | Table | KeyValues | Prompts):
                raise InputError(
                    f"{self.title!r} folds a {type(block).__name__}; it can fold Text, Table, KeyValues, Prompts."
                )


Block = Text | Table | Figure | KeyValues | Prompts | Pictures | Panels | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of a report, listed in its table of contents.

    Raises:
        InputError: the title is empty, or something among the blocks is not a block.
    """

    title: str
    blocks: Sequence[Block]

    def __post_init__(self):
        if not self.title.strip():
            raise InputError("a section needs a title: the table of contents lists it.")
        for block in self.blocks:
            if not isinstance(block, Block):
                known = "Text, Table, Figure, KeyValues, Prompts, Pictures, Panels, Folded"
                raise InputError(f"section {self.title!r} holds a {type(block).__name__}; its blocks are {known}.")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the numbers of a report came from.

    Attributes:
        settings: everything that was chosen for the run.
        seed: the seed of its random choices; None where there were none.
        command: the command line; empty where it was no command.
        date: when it was made, ISO 8601.
        hardware: what it ran on.
        versions: packages and their versions.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    command: str = ""
    date: str = ""
    hardware: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls, settings: Mapping[str, Any], *, seed: int | None = None, command: str | None = None) -> "Provenance":
        """The provenance of numbers made in this process, now: versions, hardware and date are looked up.

        Args:
            settings: everything that was chosen for the run.
            seed: the seed of its random choices.
            command: the command line; None takes the one of this process, with its program's name only.
        """
        if command is None:
            command = shlex.join([Path(sys.argv[0] or "python").name, *sys.argv[1:]])
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(settings, seed, command, date, _hardware(), _versions())


def _versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # names the CUDA build, which the package's metadata may leave out
    return found


def _hardware() -> str:
    import torch

    cores = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return "; ".join([cores, *(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))])
