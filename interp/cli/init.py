"""`interp init`: write a config to edit."""

from pathlib import Path
from typing import Annotated

import typer

from interp.errors import FileError, unknown

KINDS = ("heads", "attribute", "trace", "train", "lorsa", "chair", "pope")


def init(
    kind: Annotated[str, typer.Argument(help=f"What the config is for: {', '.join(KINDS)}.")] = "heads",
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("run.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented config to edit, for `interp heads|attribute|trace|train|evaluate` and `interp check`."""
    if kind not in KINDS:
        raise unknown("kind of config", kind, KINDS)
    if out.exists() and not overwrite:
        raise FileError(f"{out} exists already; give another --out, or --overwrite.")
    from interp.cli.attribution import settings as attribution
    from interp.cli.evaluation import settings as evaluation
    from interp.cli.ranking import settings
    from interp.cli.tracing import settings as tracing
    from interp.files import write_text

    if kind in ("train", "lorsa"):
        from interp.cli.training.kinds import SETTINGS
        from interp.cli.training.settings import template

        one, of = ("sae", "sae|transcoder") if kind == "train" else (kind, kind)
        write_text(out, template(SETTINGS[one], of))
        command = f"interp train {one} --config {out} --out runs/{one}"
        typer.echo(f"wrote {out}; edit it, then: interp check {out} && {command}")
        return
    own = {"heads": settings.template, "attribute": attribution.template, "trace": tracing.template}
    write_text(out, own[kind]() if kind in own else evaluation.template(kind))
    command = kind if kind in own else f"evaluate {kind}"
    typer.echo(f"wrote {out}; edit it, then: interp check {out} && interp {command} --config {out} --out runs/{kind}")
