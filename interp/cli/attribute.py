"""`interp attribute`: which tokens and patches mattered, by several methods side by side, into a run folder."""

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.attribution.settings import help_of
from interp.errors import SettingsError


def attribute(
    model: Annotated[str | None, typer.Argument(help=help_of("model"), show_default=False)] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help=help_of("methods"))] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", "-p", help=help_of("prompts"))] = None,
    images: Annotated[Path | None, typer.Option("--images", help=help_of("images"))] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help=help_of("target"))] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help=help_of("max_new_tokens"))] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A yaml file; options win over it.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", help=help_of("layer"))] = None,
    residual: Annotated[float | None, typer.Option("--residual", help=help_of("residual"))] = None,
    fusion: Annotated[str | None, typer.Option("--fusion", help=help_of("fusion"))] = None,
    tower: Annotated[str | None, typer.Option("--tower", help=help_of("tower"))] = None,
    mode: Annotated[str | None, typer.Option("--mode", help=help_of("mode"))] = None,
    image_mode: Annotated[str | None, typer.Option("--image-mode", help=help_of("image_mode"))] = None,
    measure: Annotated[str | None, typer.Option("--measure", help=help_of("measure"))] = None,
    steps: Annotated[int | None, typer.Option("--steps", help=help_of("steps"))] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help=help_of("baseline"))] = None,
    form: Annotated[str | None, typer.Option("--form", help=help_of("form"))] = None,
    general: Annotated[str | None, typer.Option("--general", help=help_of("general"))] = None,
    seed: Annotated[int | None, typer.Option("--seed", help=help_of("seed"))] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help=help_of("dtype"))] = None,
    device: Annotated[str | None, typer.Option("--device", help=help_of("device"))] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help=help_of("batch_size"))] = None,
    top: Annotated[int | None, typer.Option("--top", help=help_of("top"))] = None,
    examples: Annotated[int | None, typer.Option("--examples", help=help_of("examples"))] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")] = False,
) -> None:
    """Which tokens of the prompts, or patches of their pictures, mattered to MODEL: several methods side by side.

    Writes a run folder with tables and a report. Results are stored batch by batch: a run that was interrupted is taken
    up by the same command, and what is complete with the same settings is not computed again.
    """
    options = {key: value for key, value in locals().items() if key not in ("method", "out", "config", "overwrite")}
    from interp.cli.attribution.settings import AttributeSettings, read_config
    from interp.cli.named import check_model, named_methods

    given: dict[str, Any] = {
        key: str(value) if isinstance(value, Path) else value for key, value in options.items() if value is not None
    }
    if method:
        given["methods"] = named_methods(method)
    settings = AttributeSettings.of({} if config is None else read_config(config), given)
    if out is None:
        raise SettingsError("no run folder is named: give --out DIR.")
    check_model(settings.model)
    from interp.cli.attribution.run import run_attribution, show_top

    folder = run_attribution(settings, out, overwrite=overwrite)
    show_top(folder)
    typer.echo(f"report: {folder.path / 'report.html'}")
