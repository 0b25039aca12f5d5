"""`interp evaluate`: score captions (CHAIR), yes/no answers (POPE) or a dictionary, into a run folder with a report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.dictionaries.command import evaluate_sae
from interp.cli.evaluation.settings import help_of

app = typer.Typer(help="Score what a vision-language model says about images, or a dictionary.", no_args_is_help=True)

Model = Annotated[str | None, typer.Argument(help=help_of("model"), show_default=False)]
Data = Annotated[str | None, typer.Option("--data", help=help_of("data"))]
Split = Annotated[str | None, typer.Option("--split", help=help_of("split"))]
N = Annotated[int | None, typer.Option("--n", help=help_of("n"))]
Images = Annotated[Path | None, typer.Option("--images", help=help_of("images"))]
Annotations = Annotated[Path | None, typer.Option("--annotations", help=help_of("annotations"))]
Chat = Annotated[bool | None, typer.Option("--chat/--no-chat", help=help_of("chat"))]
Longest = Annotated[int | None, typer.Option("--max-new-tokens", help=help_of("max_new_tokens"))]
Intervention = Annotated[str | None, typer.Option("--intervention", help=help_of("intervention"))]
Strength = Annotated[float | None, typer.Option("--strength", help=help_of("strength"))]
Control = Annotated[str | None, typer.Option("--control", help=help_of("control"))]
Doses = Annotated[str | None, typer.Option("--doses", help=help_of("doses"))]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help=help_of("batch_size"))]
Seed = Annotated[int | None, typer.Option("--seed", help=help_of("seed"))]
Resamples = Annotated[int | None, typer.Option("--resamples", help=help_of("resamples"))]
Examples = Annotated[int | None, typer.Option("--examples", help=help_of("examples"))]
Dtype = Annotated[str | None, typer.Option("--dtype", help=help_of("dtype"))]
Device = Annotated[str | None, typer.Option("--device", help=help_of("device"))]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The run folder.")]
Config = Annotated[Path | None, typer.Option("--config", help="A yaml file; options win over it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")]


@app.command("chair")
def chair(
    model: Model = None,
    data: Data = None,
    split: Split = None,
    n: N = None,
    images: Images = None,
    annotations: Annotations = None,
    reference_captions: Annotated[
        Path | None, typer.Option("--reference-captions", help=help_of("reference_captions"))
    ] = None,
    vocabulary: Annotated[str | None, typer.Option("--vocabulary", help=help_of("vocabulary"))] = None,
    captions: Annotated[Path | None, typer.Option("--captions", help=help_of("captions"))] = None,
    subset: Annotated[bool | None, typer.Option("--subset/--no-subset", help=help_of("subset"))] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help=help_of("prompt"))] = None,
    chat: Chat = None,
    max_new_tokens: Longest = None,
    intervention: Intervention = None,
    strength: Strength = None,
    control: Control = None,
    doses: Doses = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    resamples: Resamples = None,
    examples: Examples = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Caption images with MODEL and count the objects in the captions that are not there (CHAIR).

    With --captions FILE an existing file is scored, and no model is run. Captions are stored batch by batch: a run that
    was interrupted is taken up by the same command. With --intervention the model is changed while it speaks; several
    interventions, or --doses, make a comparison with the plain model, each dose and every control.
    """
    options = {key: value for key, value in locals().items() if key not in ("out", "config", "overwrite")}
    _run("chair", options, out, config, overwrite)


@app.command("pope")
def pope(
    model: Model = None,
    data: Data = None,
    split: Split = None,
    n: N = None,
    images: Images = None,
    annotations: Annotations = None,
    questions: Annotated[Path | None, typer.Option("--questions", help=help_of("questions"))] = None,
    answers: Annotated[Path | None, typer.Option("--answers", help=help_of("answers"))] = None,
    negatives: Annotated[list[str] | None, typer.Option("--negatives", help=help_of("negatives"))] = None,
    per_image: Annotated[int | None, typer.Option("--per-image", help=help_of("per_image"))] = None,
    minimum: Annotated[int | None, typer.Option("--minimum", help=help_of("minimum"))] = None,
    template: Annotated[str | None, typer.Option("--template", help=help_of("template"))] = None,
    parser: Annotated[str | None, typer.Option("--parser", help=help_of("parser"))] = None,
    chat: Chat = None,
    max_new_tokens: Longest = None,
    intervention: Intervention = None,
    strength: Strength = None,
    control: Control = None,
    doses: Doses = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    resamples: Resamples = None,
    examples: Examples = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Ask MODEL after objects that are there and objects that are not (POPE).

    With --answers FILE an existing file is scored, and no model is run. Answers are stored batch by batch: a run that
    was interrupted is taken up by the same command. With --intervention the model is changed while it speaks; several
    interventions, or --doses, make a comparison with the plain model, each dose and every control.
    """
    options = {key: value for key, value in locals().items() if key not in ("out", "config", "overwrite")}
    _run("pope", options, out, config, overwrite)


app.command("sae")(evaluate_sae)


def _run(task: str, options: dict[str, Any], out: Path | None, config: Path | None, overwrite: bool) -> None:
    from interp.cli.evaluation.settings import EvaluateSettings, read_config
    from interp.cli.named import check_model
    from interp.errors import SettingsError

    given = {
        key: str(value) if isinstance(value, Path) else value for key, value in options.items() if value is not None
    }
    stored = {} if config is None else read_config(config)
    if stored.get("task", task) != task:
        raise SettingsError(f"{config} is for `interp evaluate {stored['task']}`, not {task}.")
    settings = EvaluateSettings.of(stored, given, {"task": task})
    if out is None:
        raise SettingsError("no run folder is named: give --out DIR.")
    if settings.model:
        check_model(settings.model)
    from interp.cli.evaluation.run import run_evaluation, show_numbers

    folder = run_evaluation(settings, out, overwrite=overwrite)
    show_numbers(folder)
    typer.echo(f"report: {folder.path / 'report.html'}")
