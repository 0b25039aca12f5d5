"""`interp demo`: the heads of a small real model, by four methods, in about a minute on two cores."""

from pathlib import Path
from typing import Annotated

import typer

MODEL = "smollm2-135m"


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder.")] = Path("runs/demo"),
    prompts: Annotated[int, typer.Option("--prompts", min=2, help="How many prompts; ablation uses the first 4.")] = 16,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; default: the GPU if any.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")] = False,
) -> None:
    """Rank the heads of SmolLM2-135M: which write the name after "Mary and John ... John gave a drink to"?"""
    from interp.cli.settings import METHODS, HeadsSettings, check_model

    settings = HeadsSettings(
        model=MODEL,
        methods=METHODS,
        prompts="prompts.jsonl",
        patterns_on="repeated",
        ablation_prompts=4,
        device=device,
    )
    check_model(MODEL)
    from interp.cli.runs import run_heads, show_top
    from interp.data import indirect_objects

    folder = run_heads(settings, out, prompts=indirect_objects(prompts, seed=settings.seed), overwrite=overwrite)
    for method in METHODS:
        show_top(folder, method, 5)
    _show_answers(folder.path)
    typer.echo(f"report: {folder.path / 'report.html'}")


def _show_answers(folder: Path) -> None:
    import pandas as pd

    from interp.cli.console import table
    from interp.cli.runfolder import RunFolder

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
