"""`interp trace`: which states, tokens and layers carry the answer, into a run folder with a report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.tracing.settings import help_of
from interp.errors import SettingsError


def trace(
    model: Annotated[str | None, typer.Argument(help=help_of("model"), show_default=False)] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help=help_of("methods"))] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", "-p", help=help_of("prompts"))] = None,
    images: Annotated[Path | None, typer.Option("--images", help=help_of("images"))] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A yaml file; options win over it.")] = None,
    site: Annotated[list[str] | None, typer.Option("--site", help=help_of("sites"))] = None,
    layers: Annotated[str | None, typer.Option("--layers", help=help_of("layers"))] = None,
    positions: Annotated[str | None, typer.Option("--positions", help=help_of("positions"))] = None,
    heads: Annotated[str | None, typer.Option("--heads", help=help_of("heads"))] = None,
    window: Annotated[int | None, typer.Option("--window", help=help_of("window"))] = None,
    direction: Annotated[str | None, typer.Option("--direction", help=help_of("direction"))] = None,
    metric: Annotated[str | None, typer.Option("--metric", help=help_of("metric"))] = None,
    corruption: Annotated[str | None, typer.Option("--corruption", help=help_of("corruption"))] = None,
    noise: Annotated[float | None, typer.Option("--noise", help=help_of("noise"))] = None,
    samples: Annotated[int | None, typer.Option("--samples", help=help_of("samples"))] = None,
    steps: Annotated[int | None, typer.Option("--steps", help=help_of("steps"))] = None,
    severed: Annotated[str | None, typer.Option("--severed", help=help_of("severed"))] = None,
    softmax: Annotated[str | None, typer.Option("--softmax", help=help_of("softmax"))] = None,
    receiver: Annotated[list[str] | None, typer.Option("--receiver", help=help_of("receivers"))] = None,
    via: Annotated[str | None, typer.Option("--via", help=help_of("via"))] = None,
    mlps: Annotated[str | None, typer.Option("--mlps", help=help_of("mlps"))] = None,
    edge: Annotated[list[str] | None, typer.Option("--edge", help=help_of("edges"))] = None,
    min_gap: Annotated[float | None, typer.Option("--min-gap", help=help_of("min_gap"))] = None,
    seed: Annotated[int | None, typer.Option("--seed", help=help_of("seed"))] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help=help_of("dtype"))] = None,
    device: Annotated[str | None, typer.Option("--device", help=help_of("device"))] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help=help_of("batch_size"))] = None,
    top: Annotated[int | None, typer.Option("--top", help=help_of("top"))] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what it would cost, and compute nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")] = False,
) -> None:
    """Which states of MODEL carry the answer from the prompt to the last token: maps over layers and tokens.

    Methods: causal (noise on a subject, states put back), cross_modal (a spoilt picture, groups of tokens put back),
    sweep (clean against corrupt prompts, exact), attribution (the same to first order, all heads at once), paths (what
    heads give directly), knockout (attention cut between groups of tokens). Says what it costs before it starts.
    Results are stored part by part: a run that was interrupted is taken up by the same command. Under torchrun
    (torchrun --nproc-per-node 2 -m interp trace ...) the processes divide the prompts.
    """
    own = ("method", "site", "edge", "receiver", "out", "config", "estimate", "overwrite")
    options = {key: value for key, value in locals().items() if key not in (*own, "own")}
    from interp.cli.named import check_model, named_methods
    from interp.cli.tracing.settings import TraceSettings, read_config

    given: dict[str, Any] = {
        key: str(value) if isinstance(value, Path) else value for key, value in options.items() if value is not None
    }
    if method:
        given["methods"] = named_methods(method)
    for key, listed in (("sites", site), ("edges", edge), ("receivers", receiver)):
        if listed:
            given[key] = tuple(part.strip() for text in listed for part in text.split(","))
    settings = TraceSettings.of({} if config is None else read_config(config), given)
    if out is None and not estimate:
        raise SettingsError("no run folder is named: give --out DIR, or --estimate.")
    check_model(settings.model)
    from interp.cli.together import Together
    from interp.cli.tracing import run

    if estimate:
        run.estimate(settings)
        return
    assert out is not None
    together = Together(settings.device)
    folder = run.run_trace(settings, out, overwrite=overwrite, together=together)
    if not together.first:
        return
    run.show_top(folder)
    typer.echo(f"report: {folder.path / 'report.html'}")
