"""The application: its global options, and the list of commands."""

from typing import Annotated

import typer

from interp.cli import anatomy, attribute, check, demo, evaluate, heads, init, models, report, trace, train
from interp.cli.dictionaries import features
from interp.cli.failure import OneLineGroup

app = typer.Typer(
    cls=OneLineGroup,
    name="interp",
    help="Mechanistic interpretability for language and vision-language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models.app, name="models")
app.command("inspect")(anatomy.inspect)
app.command("heads")(heads.heads)
app.command("attribute")(attribute.attribute)
app.command("trace")(trace.trace)
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="evaluate")
app.command("features")(features.features)
app.command("init")(init.init)
app.command("check")(check.check)
app.command("report")(report.report)
app.command("demo")(demo.demo)


def _version(asked: bool) -> None:
    if asked:
        import interp

        typer.echo(f"interp {interp.__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)] = (
        False
    ),
) -> None:
    """Mechanistic interpretability for language and vision-language models."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
