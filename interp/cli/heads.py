"""`interp heads`: rank a model's heads by one or several methods, into a run folder with a report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.settings import help_of
from interp.errors import SettingsError


def heads(
    model: Annotated[str | None, typer.Argument(help=help_of("model"), show_default=False)] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help=help_of("methods"))] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", "-p", help=help_of("prompts"))] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A yaml file; options win over it.")] = None,
    patterns_on: Annotated[str | None, typer.Option("--patterns-on", help=help_of("patterns_on"))] = None,
    repeat_rows: Annotated[int | None, typer.Option("--repeat-rows", help=help_of("repeat_rows"))] = None,
    repeat_length: Annotated[int | None, typer.Option("--repeat-length", help=help_of("repeat_length"))] = None,
    score: Annotated[str | None, typer.Option("--score", help=help_of("score"))] = None,
    window: Annotated[int | None, typer.Option("--window", help=help_of("window"))] = None,
    mode: Annotated[str | None, typer.Option("--mode", help=help_of("mode"))] = None,
    ablation_prompts: Annotated[int | None, typer.Option("--ablation-prompts", help=help_of("ablation_prompts"))] = (
        None
    ),
    normalize: Annotated[str | None, typer.Option("--normalize", help=help_of("normalize"))] = None,
    absolute: Annotated[str | None, typer.Option("--absolute", help=help_of("absolute"))] = None,
    share: Annotated[bool | None, typer.Option("--share/--no-share", help=help_of("share"))] = None,
    seed: Annotated[int | None, typer.Option("--seed", help=help_of("seed"))] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help=help_of("dtype"))] = None,
    device: Annotated[str | None, typer.Option("--device", help=help_of("device"))] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help=help_of("batch_size"))] = None,
    top: Annotated[int | None, typer.Option("--top", help=help_of("top"))] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")] = False,
) -> None:
    """Rank the attention heads of MODEL, and write a run folder with tables, figures and a report.

    A method that is complete in the folder with the same settings is not computed again. Methods: direct_effect (what
    a head writes towards the answer), importance (gradient of a head mask), ablation (the exact effect of removing a
    head), patterns (induction, previous-token, ... scores of the attention).
    """
    options: dict[str, Any] = {
        **{"model": model, "methods": tuple(method) if method else None},
        **{"prompts": None if prompts is None else str(prompts), "patterns_on": patterns_on},
        **{"repeat_rows": repeat_rows, "repeat_length": repeat_length, "score": score, "window": window},
        **{"mode": mode, "ablation_prompts": ablation_prompts, "normalize": normalize, "absolute": absolute},
        **{"share": share, "seed": seed, "dtype": dtype, "device": device, "batch_size": batch_size, "top": top},
    }
    from interp.cli.settings import HeadsSettings, check_model, read_config

    given = {key: value for key, value in options.items() if value is not None}
    settings = HeadsSettings.of({} if config is None else read_config(config), given)
    if out is None:
        raise SettingsError("no run folder is named: give --out DIR.")
    check_model(settings.model)
    from interp.cli.runs import run_heads, show_top

    folder = run_heads(settings, out, overwrite=overwrite)
    for name in settings.methods:
        show_top(folder, name)
    typer.echo(f"report: {folder.path / 'report.html'}")
