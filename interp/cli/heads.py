"""`interp heads`: rank a model's heads by one or several methods, into a run folder with a report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.ranking.settings import help_of
from interp.errors import SettingsError


def heads(
    model: Annotated[str | None, typer.Argument(help=help_of("model"), show_default=False)] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help=help_of("methods"))] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", "-p", help=help_of("prompts"))] = None,
    images: Annotated[Path | None, typer.Option("--images", help=help_of("images"))] = None,
    ask: Annotated[str | None, typer.Option("--ask", help=help_of("ask"))] = None,
    keywords: Annotated[Path | None, typer.Option("--keywords", "-k", help=help_of("keywords"))] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A yaml file; options win over it.")] = None,
    patterns_on: Annotated[str | None, typer.Option("--patterns-on", help=help_of("patterns_on"))] = None,
    repeat_rows: Annotated[int | None, typer.Option("--repeat-rows", help=help_of("repeat_rows"))] = None,
    repeat_length: Annotated[int | None, typer.Option("--repeat-length", help=help_of("repeat_length"))] = None,
    score: Annotated[str | None, typer.Option("--score", help=help_of("score"))] = None,
    window: Annotated[int | None, typer.Option("--window", help=help_of("window"))] = None,
    mode: Annotated[str | None, typer.Option("--mode", help=help_of("mode"))] = None,
    ablation_prompts: Annotated[
        int | None, typer.Option("--ablation-prompts", help=help_of("ablation_prompts"))
    ] = None,
    normalize: Annotated[str | None, typer.Option("--normalize", help=help_of("normalize"))] = None,
    absolute: Annotated[str | None, typer.Option("--absolute", help=help_of("absolute"))] = None,
    share: Annotated[bool | None, typer.Option("--share/--no-share", help=help_of("share"))] = None,
    without: Annotated[str | None, typer.Option("--without", help=help_of("without"))] = None,
    form: Annotated[str | None, typer.Option("--form", help=help_of("form"))] = None,
    outliers: Annotated[str | None, typer.Option("--outliers", help=help_of("outliers"))] = None,
    sink: Annotated[float | None, typer.Option("--sink", help=help_of("sink"))] = None,
    positions: Annotated[str | None, typer.Option("--positions", help=help_of("positions"))] = None,
    center: Annotated[bool | None, typer.Option("--center/--no-center", help=help_of("center"))] = None,
    apply_final_norm: Annotated[
        str | None, typer.Option("--apply-final-norm", help=help_of("apply_final_norm"))
    ] = None,
    variants: Annotated[bool | None, typer.Option("--variants/--no-variants", help=help_of("variants"))] = None,
    pieces: Annotated[str | None, typer.Option("--pieces", help=help_of("pieces"))] = None,
    random_lists: Annotated[int | None, typer.Option("--random-lists", help=help_of("random_lists"))] = None,
    topic_heads: Annotated[int | None, typer.Option("--topic-heads", help=help_of("topic_heads"))] = None,
    topic_tokens: Annotated[int | None, typer.Option("--topic-tokens", help=help_of("topic_tokens"))] = None,
    effect_heads: Annotated[int | None, typer.Option("--effect-heads", help=help_of("effect_heads"))] = None,
    effect_scale: Annotated[float | None, typer.Option("--effect-scale", help=help_of("effect_scale"))] = None,
    effect_prompts: Annotated[int | None, typer.Option("--effect-prompts", help=help_of("effect_prompts"))] = None,
    controls: Annotated[int | None, typer.Option("--controls", help=help_of("controls"))] = None,
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
    head), patterns (induction, previous-token, ... scores of the attention), vision_divergence (how much a head's
    output depends on the image), visual_concentration (how it looks at the image), pursuit (how much of what it writes
    a list of keywords explains), logit_lens (the baseline for that).
    Under torchrun (torchrun --nproc-per-node 2 -m interp heads ...) the processes divide the batches of prompts.
    """
    options = {key: value for key, value in locals().items() if key not in ("method", "out", "config", "overwrite")}
    from interp.cli.named import check_model, named_methods
    from interp.cli.ranking.settings import HeadsSettings, read_config

    given: dict[str, Any] = {
        key: str(value) if isinstance(value, Path) else value for key, value in options.items() if value is not None
    }
    if method:
        given["methods"] = named_methods(method)
    settings = HeadsSettings.of({} if config is None else read_config(config), given)
    if out is None:
        raise SettingsError("no run folder is named: give --out DIR.")
    check_model(settings.model)
    from interp.cli.ranking.run import run_heads, show_top
    from interp.cli.together import Together

    together = Together(settings.device)
    folder = run_heads(settings, out, overwrite=overwrite, together=together)
    if not together.first:
        return
    for name in settings.methods:
        show_top(folder, name)
    typer.echo(f"report: {folder.path / 'report.html'}")
