"""The settings of `interp heads`: one frozen dataclass, checked in one place, read from yaml and from options."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import FileError, InputError, SettingsError, unknown

if TYPE_CHECKING:
    from interp.data import Prompt

METHODS = ("direct_effect", "importance", "ablation", "patterns")
KINDS = ("induction", "previous", "duplicate", "first", "local")
UNHASHED = ("methods", "prompts", "device", "batch_size", "top")
"""What does not change the meaning of a number: it may differ when a run is taken up again."""


def _row(default: Any, help: str, *, choices: tuple[str, ...] = (), least: int | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsSettings:
    """Everything that is chosen for a run of `interp heads`.

    Raises:
        UnknownNameError: a method or an option's value does not exist.
        SettingsError: a value is of the wrong type or outside its range, or settings contradict each other.
    """

    model: str = _row("", "a packaged model (`interp models`), a folder, or a hub id")
    methods: tuple[str, ...] = _row((), f"what to compute: {', '.join(METHODS)}", choices=METHODS)
    prompts: str | None = _row(
        None, "prompt file, .jsonl or .csv: text, and answer and wrong (in a settings file: relative to it)"
    )
    patterns_on: str = _row(
        "auto",
        "inputs of `patterns`: the prompts, or random tokens repeated; auto takes the prompts where there are any",
        choices=("auto", "prompts", "repeated"),
    )
    repeat_rows: int = _row(8, "how many rows of repeated random tokens", least=1)
    repeat_length: int = _row(32, "how many tokens each row repeats", least=2)
    score: str = _row("induction", f"which pattern score ranks the heads: {', '.join(KINDS)}", choices=KINDS)
    window: int = _row(4, "width of the pattern score `local`, the query itself included", least=1)
    mode: str = _row("zero", "what ablation puts in a head's place", choices=("zero", "mean"))
    ablation_prompts: int = _row(0, "ablate on the first so many prompts only; 0 for all", least=0)
    normalize: str = _row("none", "divide importance by an L2 norm", choices=("none", "layer", "global"))
    absolute: str = _row("example", "where importance takes the absolute value", choices=("example", "token"))
    share: bool = _row(False, "give direct_effect as a share of the logit difference instead of in logits")
    seed: int = _row(0, "seed of every random choice", least=0)
    dtype: str | None = _row(None, "float32, float16, bfloat16 or auto; null for the model's default")
    device: str | None = _row(None, "cpu, cuda, cuda:1 or auto; null for the GPU where there is one")
    batch_size: int = _row(16, "prompts in one run of the model (ablation: up to four times as many)", least=1)
    top: int = _row(20, "how many heads the rankings list", least=1)

    def __post_init__(self) -> None:
        for row in fields(self):
            _check(row.name, getattr(self, row.name), row.metadata, row.default)
        if not self.model:
            raise SettingsError("no model is named: give a packaged model (see `interp models`), a folder or a hub id.")
        if not self.methods:
            raise SettingsError(
                f"no method is named: give --method, one of {', '.join(METHODS)} (several may be given)."
            )
        if len(set(self.methods)) != len(self.methods):
            raise SettingsError(f"a method is named twice: {', '.join(self.methods)}.")
        needing = [m for m in self.methods if m != "patterns" or self.patterns_on == "prompts"]
        if self.prompts is None and needing:
            raise SettingsError(f"{', '.join(needing)} need prompts: give --prompts FILE (.jsonl or .csv).")

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> "HeadsSettings":
        """Settings from several mappings, later ones over earlier ones; None in a later one leaves the earlier.

        Raises:
            UnknownNameError: a key is no setting; the nearest are named.
        """
        known = [row.name for row in fields(cls)]
        merged: dict[str, Any] = {}
        for layer in layers:
            for key, value in layer.items():
                if key not in known:
                    raise unknown("setting", key, known)
                if value is not None or key not in merged:
                    merged[key] = tuple(value) if key == "methods" and isinstance(value, list) else value
        return cls(**merged)

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
        for name in ("answer", "wrong"):
            have = [getattr(p, name) is not None for p in prompts]
            if any(have) and not all(have):
                raise InputError(
                    f"prompt {have.index(False) + 1} of {len(have)} in {self.prompts} has no {name!r}, but others have "
                    "one: give it for every prompt or for none."
                )
        if prompts and prompts[0].answer is None:
            if "direct_effect" in self.methods:
                raise InputError(
                    f"direct_effect needs the field 'answer' in every prompt of {self.prompts} (a next token such as "
                    "' Mary'), and 'wrong' for a logit difference; none is there."
                )
            if prompts[0].wrong is not None:
                raise InputError(f"the prompts of {self.prompts} have 'wrong' but no 'answer' to compare it with.")


def _check(name: str, value: Any, about: Mapping[str, Any], default: Any) -> None:
    """One setting: its type, its choices, its range."""
    if name == "methods":
        if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
            raise SettingsError(f"methods is a list of names, found {value!r}.")
        for method in value:
            if method not in METHODS:
                raise unknown("method", method, METHODS)
        return
    kind = str if default is None else type(default)
    if value is None and default is None:
        return
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "text", int: "a whole number", bool: "true or false"}
        raise SettingsError(f"{name} is {words[kind]}, found {value!r}.")
    if about["choices"] and value not in about["choices"]:
        raise unknown(name, value, about["choices"])
    if about["least"] is not None and value < about["least"]:
        raise SettingsError(f"{name} must be at least {about['least']}, found {value}.")


def help_of(name: str) -> str:
    """What a setting is, in one line, with its choices and default."""
    row = next(row for row in fields(HeadsSettings) if row.name == name)
    choices = row.metadata["choices"]
    rest = f" ({'|'.join(choices)})" if choices and name not in ("methods", "score") else ""
    default = "" if row.default in (None, "", ()) else f" [default: {str(row.default).lower()}]"
    return f"{row.metadata['help'][0].upper()}{row.metadata['help'][1:]}{rest}.{default}"


def template() -> str:
    """A commented config with the defaults, and the demo's model and prompts in place of what has none."""
    import yaml

    shown = {"model": "smollm2-135m", "methods": ["direct_effect", "importance"], "prompts": "prompts.jsonl"}
    lines = ["# Settings of `interp heads --config`. Options on the command line win over this file."]
    for row in fields(HeadsSettings):
        value = shown.get(row.name, row.default)
        text = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
        choices = row.metadata["choices"]
        extra = f": {' | '.join(choices)}" if choices and row.name not in ("methods", "score") else ""
        lines += ["", f"# {row.metadata['help']}{extra}", f"{row.name}: {text}"]
    return "\n".join(lines) + "\n"


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a yaml file; a relative `prompts` is taken relative to the file.

    Raises:
        FileError: the file is missing or not UTF-8.
        SettingsError: it is not yaml, holds a key twice, or is no mapping.
        UnknownNameError: a key is no setting.
    """
    found = read_yaml(path)
    known = [row.name for row in fields(HeadsSettings)]
    for key in found:
        if key not in known:
            raise unknown("setting", key, known, where=str(path))
    if isinstance(found.get("prompts"), str):
        found["prompts"] = str(Path(path).parent / found["prompts"])
    return found


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a config holds, whatever it is for.

    Raises:
        FileError: the file is missing or not UTF-8.
        SettingsError: it is not yaml, holds a key twice, or is no mapping.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot read the config {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FileError(f"the config {path} is not UTF-8.") from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"the config {path} is not yaml: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"the config {path} must hold settings as `name: value`; `interp init` writes one.")
    seen = re.findall(r"^([A-Za-z_]\w*)\s*:", text, flags=re.MULTILINE)
    twice = [key for key in seen if seen.count(key) > 1]
    if twice:
        raise SettingsError(f"the config {path} holds {twice[0]!r} twice; each setting may stand once.")
    return found


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
