"""The settings of `interp evaluate sae`: one frozen dataclass, checked in one place."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interp.cli import fields
from interp.cli.fields import setting
from interp.errors import SettingsError

ABLATIONS = ("zero", "mean")
UNHASHED = ("device", "path", "data", "images")
"""What may differ when a run is asked for again; files count by content."""

_OF_DATA = ("column", "documents", "split", "images", "seed")
_OF_STREAM = ("context", "packed", "special", "separator", "tokens", "drop_first")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeSettings:
    """Everything that is chosen for a run of `interp evaluate sae`.

    Raises:
        UnknownNameError: an option's value does not exist.
        SettingsError: a value is of the wrong type or outside its range, or something needed is missing.
    """

    path: str = setting("", "folder of a dictionary: an SAE or transcoder of interp or SAELens, or a Lorsa")
    model: str | None = setting(
        None, "a packaged model (`interp models`), a folder, or a hub id; null for the one in the file"
    )
    data: str | None = setting(
        None, "text it was not trained on: a text, .jsonl or .parquet file, a folder of such files, hf:NAME, or scenes"
    )
    column: str | None = setting(None, "column of tables that holds the text; null for text")
    documents: str | None = setting(
        None, "how text files are cut into documents: paragraphs, lines or files; null for the kind of file's own"
    )
    split: str | None = setting(None, "split of a data set; null for train (of scenes: test)")
    images: str | None = setting(None, "folder of pictures: data is then a prompt file with their names")
    read: str | None = setting(None, "what it reads, such as resid_post.10; null for what the file says")
    target: str | None = setting(None, "what a transcoder stands for, such as mlp_out.8; null for what the file says")
    ablation: tuple[str, ...] = setting(
        ABLATIONS, "what losses are compared with; none gives fidelity alone", choices=(*ABLATIONS, "none")
    )
    contexts: int = setting(64, "how many contexts", least=1)
    batch_size: int = setting(8, "contexts in one run of the model", least=1)
    context: int = setting(256, "tokens of a context, at most those that a Lorsa knows", least=2)
    packed: bool = setting(True, "fill contexts with one document after the other")
    special: str = setting("tokenizer", "what stands around each context", choices=("tokenizer", "bos", "none"))
    separator: str = setting("eos", "what follows each document of packed contexts", choices=("eos", "bos", "none"))
    tokens: str = setting("all", "which tokens it was trained on", choices=("all", "text", "image"))
    drop_first: bool = setting(True, "leave the first position of each context out, and as it is")
    everywhere: bool = setting(False, "replace special tokens and first positions too")
    resamples: int = setting(1000, "how often contexts are drawn anew for the intervals", least=1)
    seed: int = setting(0, "seed of the order of the data and of the intervals", least=0)
    dtype: str | None = setting(None, "of the model: float32, float16, bfloat16 or auto; null for its own")
    device: str | None = setting(None, "cpu, cuda, cuda:1 or auto; null for the GPU where there is one")

    def __post_init__(self) -> None:
        fields.check(self)
        if not self.path:
            raise SettingsError("no dictionary is named: give the folder of one.")
        if self.data is None:
            raise SettingsError("no data are named: give --data, a file, a folder, hf:NAME or scenes.")
        if "none" in self.ablation and len(self.ablation) > 1:
            raise SettingsError(
                f"ablation is none, or some of {', '.join(ABLATIONS)}: found {', '.join(self.ablation)}."
            )

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> "SaeSettings":
        """Settings from several mappings, later ones over earlier ones; None in a later one leaves the earlier.

        Raises:
            UnknownNameError: a key is no setting; the nearest are named.
        """
        return fields.merged(cls, layers)

    def data_options(self) -> dict[str, Any]:
        """The options of the corpus."""
        found = {name: getattr(self, name) for name in _OF_DATA}
        if self.data == "scenes" and self.split is None:
            found["split"] = "test"
        return found

    def options(self) -> dict[str, Any]:
        """The options of `interp.dictionaries.evaluate`."""
        own = {name: getattr(self, name) for name in (*_OF_STREAM, "contexts", "everywhere", "resamples", "seed")}
        ablation = () if self.ablation == ("none",) else self.ablation
        return {**own, "batch": self.batch_size, "ablation": ablation, "read": self.read, "target": self.target}

    def hashed(self) -> dict[str, Any]:
        """The settings that decide what comes out."""
        return {key: value for key, value in asdict(self).items() if key not in UNHASHED}


def help_of(name: str) -> str:
    """What a setting is, in one line, with its choices and default."""
    return fields.help_of(SaeSettings, name)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a yaml file; relative paths in it are taken relative to the file.

    Raises:
        FileError, SettingsError, UnknownNameError: as `interp.cli.fields.read_config`.
    """
    found = fields.read_config(path, SaeSettings, ("path", "images"))
    data = found.get("data")
    if isinstance(data, str) and data != "scenes" and not data.startswith("hf:"):
        found["data"] = str(Path(path).parent / data)
    return found
