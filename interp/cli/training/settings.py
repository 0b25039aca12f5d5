"""The settings of `interp train`: of the run, of training, of the dictionary; flat, and checked in one place.

Those of SAEs and transcoders are here, those of a Lorsa in `lorsa_settings`.
"""

import math
import os
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

from interp.cli import fields as declared
from interp.cli.fields import setting
from interp.cli.training.documented import settings_of
from interp.dictionaries.config import DictionaryConfig
from interp.dictionaries.registry import names
from interp.dictionaries.training.log import WRITERS
from interp.dictionaries.training.settings import TrainSettings
from interp.errors import SettingsError, unknown

SITES = {"sae": ("resid_post", None), "transcoder": ("resid_mid", "mlp_out")}
"""The site that is read, and that which is to be reconstructed, where none are named."""

UNHASHED = ("device", "log_every", "checkpoint_every", "keep", "log_to", "data", "images", "store")
"""What may differ when a run is taken up again; the data count by content."""

_LISTED = ("architecture", "k", "layer", "init")
"""Settings of which several are trained on the same activations, with commas between."""

OF_TRAINING = settings_of(TrainSettings)
_OF_DICTIONARY = settings_of(
    DictionaryConfig, without=("architecture", "k", "d_out", "dtype", "seed", "reshape_activations")
)
_OF_DATA = ("column", "documents", "split", "images")
_OF_STREAM = ("context", "packed", "special", "separator", "drop_first")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What is chosen for a run of every kind beside the settings of training."""

    model: str = setting("", "a packaged model (`interp models`), a folder, or a hub id")
    layer: str = setting("", "which layer, or several with commas between, each with dictionaries of its own")
    tower: str | None = setting(None, "which tower of the model; null for the main one")
    data: str | None = setting(
        None, "a text, .jsonl or .parquet file, a folder of such files, hf:NAME for a hub data set, or scenes"
    )
    column: str | None = setting(None, "column of tables that holds the text; null for text")
    documents: str | None = setting(
        None, "how text files are cut into documents: paragraphs, lines or files; null for the kind of file's own"
    )
    split: str | None = setting(None, "split of a data set; null for train")
    images: str | None = setting(None, "folder of pictures: data is then a prompt file with their names")
    context: int = setting(256, "tokens of a context", least=2)
    packed: bool = setting(True, "fill contexts with one document after the other")
    special: str = setting("tokenizer", "what stands around each context", choices=("tokenizer", "bos", "none"))
    separator: str = setting("eos", "what follows each document of packed contexts", choices=("eos", "bos", "none"))
    tokens_used: str = setting("all", "which tokens are trained on", choices=("all", "text", "image"))
    drop_first: bool = setting(True, "leave out the first position of each context, an attention sink in many models")
    tokens: int = setting(1_000_000, "tokens to train on; data that have fewer are gone through again", least=1)
    store: str | None = setting(
        None,
        "folder in which activations are kept once, to be replayed; made, or gone on with, where it is not complete",
    )
    store_dtype: str = setting("float16", "what they are kept in", choices=("float16", "bfloat16", "float32"))
    log_to: tuple[str, ...] = setting((), "where the log goes as well: tensorboard, wandb", kind=tuple)
    seed: int = setting(0, "seed of every random choice", least=0)
    device: str | None = setting(None, "cpu, cuda, cuda:1 or auto; null for the GPU where there is one")

    def __post_init__(self) -> None:
        declared.check(self)
        if not self.model:
            raise SettingsError("no model is named: give a packaged model (see `interp models`), a folder or a hub id.")
        if not self.layer:
            raise SettingsError("no layer is named: give --layer, one or several with commas between.")
        if self.data is None:
            raise SettingsError("no data are named: give --data, a file, a folder, hf:NAME or scenes.")
        for name in self.log_to:
            if name not in WRITERS:
                raise unknown("writer", name, WRITERS)
        self.layers()
        self.training()

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> "Any":
        """Settings from several mappings, later ones over earlier ones; None in a later one leaves the earlier.

        Raises:
            UnknownNameError: a key is no setting; the nearest are named.
        """
        floats = {row.name for row in fields(cls) if row.metadata["kind"] is float}
        return declared.merged(cls, [{k: _listed(k, v, floats) for k, v in layer.items()} for layer in layers])

    def layers(self) -> list[int]:
        """The layers by number.

        Raises:
            SettingsError: they are written in another way.
        """
        return numbers("layer", self.layer, int)

    @property
    def steps(self) -> int:
        """How many steps there are."""
        raise NotImplementedError

    @property
    def per_step(self) -> str:
        """What is trained on in one step, in words."""
        raise NotImplementedError

    def training(self) -> TrainSettings:
        """The settings of training."""
        return TrainSettings.of({"steps": self.steps, **{name: getattr(self, name) for name, _, _ in OF_TRAINING}})

    def data_options(self) -> dict[str, Any]:
        """The options of the corpus."""
        return {name: getattr(self, name) for name in _OF_DATA} | {"seed": self.seed}

    def stream_options(self) -> dict[str, Any]:
        """The options of the stream of activations."""
        return {**{name: getattr(self, name) for name in _OF_STREAM}, "tokens": self.tokens_used, "epochs": None}

    def hashed(self) -> dict[str, Any]:
        """The settings that decide what comes out."""
        return {key: value for key, value in asdict(self).items() if key not in UNHASHED}


@dataclass(frozen=True, kw_only=True)
class Run(Shared):
    """What is chosen for a run of `interp train sae|transcoder` beside those of training and of the dictionary."""

    site: str | None = setting(None, "where activations are read; null for resid_post (sae), resid_mid (transcoder)")
    target_site: str | None = setting(None, "what a transcoder is to reconstruct, of the same layer; null for mlp_out")
    contexts: int = setting(8, "contexts in one pass of the model", least=1)
    batch_size: int = setting(4096, "tokens in one step, over all processes", least=1)
    buffer: int = setting(65_536, "tokens that are mixed, over all processes", least=1)
    architecture: str = setting("topk", f"one or several of {', '.join(names())}")
    k: str = setting("32", "active latents of a token, or several numbers with commas between (top-k kinds)")
    d_sae: int | None = setting(None, "number of latents; null for expansion times the width", kind=int, least=1)
    expansion: int = setting(16, "latents for each dimension that is read", least=1)
    dtype: str | None = setting(None, "of the model: float32, float16, bfloat16 or auto; null for its own")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size > self.buffer and self.store is None:
            raise SettingsError(f"a step takes {self.batch_size} tokens, more than the buffer of {self.buffer} holds.")
        for settings in self.dictionaries(4096):  # the real width is known when the model is there
            DictionaryConfig.of(settings)

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return math.ceil(self.tokens / self.batch_size)

    @property
    def per_step(self) -> str:
        """What is trained on in one step, in words."""
        return f"{self.batch_size:,} tokens"

    def sites(self, kind: str) -> tuple[str, str | None]:
        """The site that is read, and that which is reconstructed.

        Raises:
            SettingsError: an SAE has no other target than what it reads.
        """
        if kind == "sae" and self.target_site is not None:
            raise SettingsError("target_site is for transcoders: an SAE reconstructs what it reads.")
        site, target = SITES[kind]
        return self.site or site, self.target_site or target

    def reads(self, kind: str) -> list[tuple[str, str | None]]:
        """What is read, and reconstructed, of each layer."""
        before = f"{self.tower}:" if self.tower else ""
        return [
            (f"{before}{site}.{layer}", None if target is None else f"{before}{target}.{layer}")
            for layer in self.layers()
            for site, target in [self.sites(kind)]
        ]

    def dictionaries(self, width: int) -> list[dict[str, Any]]:
        """The settings of each dictionary of a layer.

        Args:
            width: of what is read.
        """
        d_sae = self.d_sae or self.expansion * width
        shared = {name: getattr(self, name) for name, _, _ in _OF_DICTIONARY}
        shared |= {"matryoshka_widths": tuple(numbers("matryoshka_widths", w, int)[0] for w in self.matryoshka_widths)}  # pyright: ignore[reportAttributeAccessIssue]
        shared |= {"d_in": width, "d_sae": d_sae, "seed": self.seed}
        out = []
        for architecture in [part.strip() for part in self.architecture.split(",")]:
            sized = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
            ks = numbers("k", self.k, float) if architecture in sized else [None]
            out += [{**shared, "architecture": architecture, **({} if k is None else {"k": k})} for k in ks]
        return out


TrainRunSettings: Any = make_dataclass(
    "TrainRunSettings", [*OF_TRAINING, *_OF_DICTIONARY], bases=(Run,), frozen=True, kw_only=True
)
"""Everything that is chosen for a run of `interp train sae|transcoder`."""


def _listed(key: str, value: Any, floats: Container[str]) -> Any:
    """Lists of a yaml file as the options write them; numbers of `layer` and `k` as text."""
    if key in _LISTED and not isinstance(value, str) and value is not None:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, list):
        return tuple(map(str, value))
    return float(value) if type(value) is int and key in floats else value


def numbers(name: str, text: str, kind: type) -> list[Any]:
    """Numbers with commas between.

    Raises:
        SettingsError: they are none, or one stands there twice.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise SettingsError(f"{name} is a number, or several with commas between; found {text!r}.") from error
    if len(set(found)) < len(found):
        raise SettingsError(f"{name} names one twice: {text!r}.")
    return [int(n) if n == int(n) else n for n in found]


def template(cls: type, command: str) -> str:
    """A commented config with the defaults, and a model, a layer and data in place of what has none."""
    head = f"Settings of `interp train {command} --config`. Options on the command line win over this file."
    shown = {"model": "smollm2-135m", "layer": "10", "data": "texts"}
    return declared.template(cls, head, shown)


def read_config(path: str | os.PathLike[str], cls: type) -> dict[str, Any]:
    """The settings in a yaml file; a relative path of `data`, `images` or `store` is taken relative to the file.

    Raises:
        FileError, SettingsError, UnknownNameError: as `interp.cli.fields.read_config`.
    """
    found = declared.read_config(path, cls, ("images", "store"))
    data = found.get("data")
    if isinstance(data, str) and data != "scenes" and not data.startswith("hf:"):
        found["data"] = str(Path(path).parent / data)
    return found
