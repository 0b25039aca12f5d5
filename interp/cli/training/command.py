"""The commands `interp train sae|transcoder|lorsa`, with an option for each setting."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.fields import help_of
from interp.cli.training.kinds import SETTINGS
from interp.cli.training.settings import read_config
from interp.errors import SettingsError

_ABOUT = {
    "sae": "Train sparse autoencoders on the activations of MODEL at a site of one or several layers.",
    "transcoder": "Train transcoders of MODEL: what a part of a layer writes, from what it reads.",
    "lorsa": "Train low-rank sparse attention (Lorsa) of MODEL: many heads of rank one for an attention layer.",
}
_REST = """

Several architectures, values of k and layers{more} (with commas between) are trained in one pass over the model. A run
that was stopped, in whatever way, is taken up by the same command and ends with the same bits.{end}
With torchrun (`torchrun --nproc-per-node N -m interp train ...`) several processes share the work.
"""


def command_of(kind: str) -> Callable[..., None]:
    """The function of a command, with its options as typer reads them."""
    cls = SETTINGS[kind]

    def command(**given: Any) -> None:
        out, config, overwrite = given.pop("out"), given.pop("config"), given.pop("overwrite")
        for name, one in _kinds(cls).items():
            if one is tuple and given[name] is not None:
                given[name] = tuple(part.strip() for text in given[name] for part in text.split(","))
        chosen = {name: value for name, value in given.items() if value is not None}
        settings = cls.of({} if config is None else read_config(config, cls), chosen)
        if kind != "lorsa":
            settings.sites(kind)
        if out is None:
            raise SettingsError("no run folder is named: give --out DIR.")
        from interp.cli.named import check_model
        from interp.cli.training.run import run_training

        check_model(settings.model)
        run_training(kind, settings, out, overwrite=overwrite)

    parameters = [_parameter(cls, row.name) for row in fields(cls)]
    extra = {
        "out": Annotated[Path | None, typer.Option("--out", "-o", help="The run folder.")],
        "config": Annotated[Path | None, typer.Option("--config", help="A yaml file; options win over it.")],
        "overwrite": Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")],
    }
    for name, hint in extra.items():
        default = False if name == "overwrite" else None
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    lorsa = kind == "lorsa"
    more, end = (", and first weights", "") if lorsa else ("", " Results open in SAELens.")
    command.__doc__ = _ABOUT[kind] + _REST.format(more=more, end=end)
    return command


def _kinds(cls: Any) -> dict[str, type]:
    return {row.name: row.metadata["kind"] for row in fields(cls)}


def _parameter(cls: Any, name: str) -> inspect.Parameter:
    kind: Any = _kinds(cls)[name]
    flag, said = "--" + name.replace("_", "-"), help_of(cls, name)
    if name == "model":
        hint: Any = Annotated[str | None, typer.Argument(help=said, show_default=False)]
    elif kind is bool:
        hint = Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=said)]
    elif kind is tuple:
        hint = Annotated[list[str] | None, typer.Option(flag, help=said)]
    else:
        hint = Annotated[kind | None, typer.Option(flag, help=said)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
