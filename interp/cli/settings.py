"""The settings of `interp heads`: one frozen dataclass, checked in one place, read from yaml and from options."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli import fields
from interp.cli.fields import setting
from interp.errors import FileError, InputError, SettingsError, unknown

if TYPE_CHECKING:
    from interp.data import Prompt

METHODS = ("direct_effect", "importance", "ablation", "patterns")
KINDS = ("induction", "previous", "duplicate", "first", "local")
UNHASHED = ("methods", "prompts", "device", "batch_size", "top")
"""What does not change the meaning of a number: it may differ when a run is taken up again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsSettings:
    """Everything that is chosen for a run of `interp heads`.

    Raises:
        UnknownNameError: a method or an option's value does not exist.
        SettingsError: a value is of the wrong type or outside its range, or settings contradict each other.
    """

    model: str = setting("", "a packaged model (`interp models`), a folder, or a hub id")
    methods: tuple[str, ...] = setting(
        (), f"what to compute: {', '.join(METHODS)}", choices=METHODS, one="method", named=True
    )
    prompts: str | None = setting(
        None, "prompt file, .jsonl or .csv: text, and answer and wrong (in a settings file: relative to it)"
    )
    patterns_on: str = setting(
        "auto",
        "inputs of `patterns`: the prompts, or random tokens repeated; auto takes the prompts where there are any",
        choices=("auto", "prompts", "repeated"),
    )
    repeat_rows: int = setting(8, "how many rows of repeated random tokens", least=1)
    repeat_length: int = setting(32, "how many tokens each row repeats", least=2)
    score: str = setting(
        "induction", f"which pattern score ranks the heads: {', '.join(KINDS)}", choices=KINDS, named=True
    )
    window: int = setting(4, "width of the pattern score `local`, the query itself included", least=1)
    mode: str = setting("zero", "what ablation puts in a head's place", choices=("zero", "mean"))
    ablation_prompts: int = setting(0, "ablate on the first so many prompts only; 0 for all", least=0)
    normalize: str = setting("none", "divide importance by an L2 norm", choices=("none", "layer", "global"))
    absolute: str = setting("example", "where importance takes the absolute value", choices=("example", "token"))
    share: bool = setting(False, "give direct_effect as a share of the logit difference instead of in logits")
    seed: int = setting(0, "seed of every random choice", least=0)
    dtype: str | None = setting(None, "float32, float16, bfloat16 or auto; null for the model's default")
    device: str | None = setting(None, "cpu, cuda, cuda:1 or auto; null for the GPU where there is one")
    batch_size: int = setting(16, "prompts in one run of the model (ablation: up to four times as many)", least=1)
    top: int = setting(20, "how many heads the rankings list", least=1)

    def __post_init__(self) -> None:
        fields.check(self)
        if not self.model:
            raise SettingsError("no model is named: give a packaged model (see `interp models`), a folder or a hub id.")
        if not self.methods:
            raise SettingsError(
                f"no method is named: give --method, one of {', '.join(METHODS)} (several may be given)."
            )
        needing = [m for m in self.methods if m != "patterns" or self.patterns_on == "prompts"]
        if self.prompts is None and needing:
            raise SettingsError(f"{', '.join(needing)} need prompts: give --prompts FILE (.jsonl or .csv).")

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> "HeadsSettings":
        """Settings from several mappings, later ones over earlier ones; None in a later one leaves the earlier.

        Raises:
            UnknownNameError: a key is no setting; the nearest are named.
        """
        return fields.merged(cls, layers)

    @property
    def repeated(self) -> bool:
        """Whether `patterns` reads repeated random tokens instead of the prompts."""
        return self.patterns_on == "repeated" or (self.patterns_on == "auto" and self.prompts is None)

    def hashed(self) -> dict[str, Any]:
        """The settings that decide what the numbers mean."""
        kept = {key: value for key, value in asdict(self).items() if key not in UNHASHED}
        return kept | {"patterns_on": "repeated" if self.repeated else "prompts"}

    def check_prompts(self, prompts: Sequence["Prompt"]) -> None:
        """Whether the prompts carry what the methods need.

        Raises:
            InputError: some prompts have an answer (or a wrong one) and others not, or direct_effect finds none.
        """
        from interp.cli.prompts import check_answers

        check_answers(prompts, self.prompts)
        if prompts and prompts[0].answer is None and "direct_effect" in self.methods:
            raise InputError(
                f"direct_effect needs the field 'answer' in every prompt of {self.prompts} (a next token such as "
                "' Mary'), and 'wrong' for a logit difference; none is there."
            )


def help_of(name: str) -> str:
    """What a setting is, in one line, with its choices and default."""
    return fields.help_of(HeadsSettings, name)


def template() -> str:
    """A commented config with the defaults, and the demo's model and prompts in place of what has none."""
    head = "Settings of `interp heads --config`. Options on the command line win over this file."
    shown = {"model": "smollm2-135m", "methods": ["direct_effect", "importance"], "prompts": "prompts.jsonl"}
    return fields.template(HeadsSettings, head, shown)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a yaml file; a relative `prompts` is taken relative to the file.

    Raises:
        FileError, SettingsError, UnknownNameError: as `interp.cli.fields.read_config`.
    """
    return fields.read_config(path, HeadsSettings, ("prompts",))


def check_model(name: str) -> None:
    """Whether a model's name can be one, and its package or folder is there; no weights are read.

    Raises:
        UnknownNameError, MissingPackageError, FileError: as loading it would.
    """
    from interp.models import CATALOGUE, row
    from interp.models.install import source_files

    if name in CATALOGUE:
        source_files(row(name))
        return
    if Path(name).expanduser().is_dir():
        if not (Path(name).expanduser() / "config.json").is_file():
            raise FileError(f"The folder {name} holds no config.json, so it is not a transformers model.")
        return
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise unknown("model", name, CATALOGUE)
