"""`interp demo`: the standard reports of a small language model and of a small vision-language model."""

from pathlib import Path
from typing import Annotated

import typer

MODELS = ("smollm2-135m", "scenes")


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder.")] = Path("runs/demo"),
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=4, help="How many prompts of each model; ablation uses the first 4.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; default: the GPU if any.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the runs that are in the folder.")] = False,
) -> None:
    """Rank the heads of two models by every method that fits, in a few minutes on two cores.

    SmolLM2-135M: which heads write the name after "Mary and John ... John gave a drink to"? And scenes, a small
    vision-language model: which heads tell the colour of a picture's background?
    """
    from interp.cli.named import check_model

    for model in MODELS:
        check_model(model)
    from interp.cli.console import load
    from interp.cli.ranking.run import show_top
    from interp.cli.ranking.standard import standard_report

    pages = []
    for model in MODELS:
        typer.echo(f"loading {model} ...")
        lens = load(model, device=device)
        folder = standard_report(lens, model, out / model, prompts=prompts, overwrite=overwrite)
        for method in folder.complete:
            show_top(folder, method, 5)
        _show_answers(folder.path)
        pages.append(folder.path / "report.html")
    for page in pages:
        typer.echo(f"report: {page}")


def _show_answers(folder: Path) -> None:
    import pandas as pd

    from interp.cli.console import table
    from interp.cli.ranking.folder import RunFolder

    frame = pd.read_parquet(folder / "answers.parquet")
    run = RunFolder.read(folder)
    rows = []
    for row in frame.head(4).to_dict("records"):
        cells = [f"P({row[name]!r}) = {row[f'p_{name}']:.2f}" for name in ("answer", "wrong")]
        rows.append([run.prompts[row["prompt"]].text, *cells])
    table("The model's answers", ["prompt", "right", "wrong"], rows)
    right = (frame["rank"] == 1).sum()
    typer.echo(
        f"{right} of {len(frame)} prompts have the answer as the most likely token; mean logit difference "
        f"{frame['logit_difference'].mean():.2f}."
    )
