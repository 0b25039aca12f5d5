"""`interp evaluate sae`: how faithful a dictionary is, and the model with it, into a run folder with a report."""

from pathlib import Path
from typing import Annotated

import typer

from interp.cli.dictionaries.settings import SaeSettings, help_of, read_config
from interp.errors import SettingsError


def evaluate_sae(
    path: Annotated[str | None, typer.Argument(help=help_of("path"), show_default=False)] = None,
    model: Annotated[str | None, typer.Option("--model", help=help_of("model"))] = None,
    data: Annotated[str | None, typer.Option("--data", help=help_of("data"))] = None,
    column: Annotated[str | None, typer.Option("--column", help=help_of("column"))] = None,
    documents: Annotated[str | None, typer.Option("--documents", help=help_of("documents"))] = None,
    split: Annotated[str | None, typer.Option("--split", help=help_of("split"))] = None,
    images: Annotated[str | None, typer.Option("--images", help=help_of("images"))] = None,
    read: Annotated[str | None, typer.Option("--read", help=help_of("read"))] = None,
    target: Annotated[str | None, typer.Option("--target", help=help_of("target"))] = None,
    ablation: Annotated[list[str] | None, typer.Option("--ablation", help=help_of("ablation"))] = None,
    contexts: Annotated[int | None, typer.Option("--contexts", help=help_of("contexts"))] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help=help_of("batch_size"))] = None,
    context: Annotated[int | None, typer.Option("--context", help=help_of("context"))] = None,
    packed: Annotated[bool | None, typer.Option("--packed/--no-packed", help=help_of("packed"))] = None,
    special: Annotated[str | None, typer.Option("--special", help=help_of("special"))] = None,
    separator: Annotated[str | None, typer.Option("--separator", help=help_of("separator"))] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help=help_of("tokens"))] = None,
    drop_first: Annotated[bool | None, typer.Option("--drop-first/--no-drop-first", help=help_of("drop_first"))] = None,
    everywhere: Annotated[bool | None, typer.Option("--everywhere/--no-everywhere", help=help_of("everywhere"))] = None,
    resamples: Annotated[int | None, typer.Option("--resamples", help=help_of("resamples"))] = None,
    seed: Annotated[int | None, typer.Option("--seed", help=help_of("seed"))] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help=help_of("dtype"))] = None,
    device: Annotated[str | None, typer.Option("--device", help=help_of("device"))] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A yaml file; options win over it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")] = False,
) -> None:
    """Score the dictionary in PATH (SAE, transcoder or Lorsa): fidelity, and the model's loss with it in place.

    Loss and KL recovered are given against zero and mean ablation, with bootstrap intervals over contexts; only the
    layers above the site run again. The model and the site come from the file where they are not given. A Lorsa stands
    for what the attention of its layer adds to the stream: compare it with a dictionary of attn_out at the same l0.
    """
    options = {key: value for key, value in locals().items() if key not in ("out", "config", "overwrite")}
    from interp.cli.named import named_methods

    if ablation:
        options["ablation"] = named_methods(ablation)
    given = {key: value for key, value in options.items() if value is not None and value != []}
    settings = SaeSettings.of({} if config is None else read_config(config), given)
    if out is None:
        raise SettingsError("no run folder is named: give --out DIR.")
    from interp.cli.dictionaries.run import run_sae, show_scores

    show_scores(run_sae(settings, out, overwrite=overwrite))
    typer.echo(f"report: {out / 'report.html'}")
