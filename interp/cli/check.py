"""`interp check`: is a config usable, before anything heavy runs."""

from pathlib import Path
from typing import Annotated, Any

import typer


def check(config: Annotated[Path, typer.Argument(help="A config such as `interp init` writes.")]) -> None:
    """Check a config, its model's files and its prompt file, without loading any weights."""
    from interp.cli.fields import read_yaml
    from interp.cli.named import check_model
    from interp.cli.ranking.folder import prompts_of
    from interp.cli.ranking.settings import HeadsSettings, read_config

    found = read_yaml(config)
    if "task" in found:
        _check_evaluation(config)
        return
    if "data" in found and "layer" in found:
        _check_training(config, found)
        return
    if _is_trace(found):
        _check_trace(config)
        return
    if _is_attribution(found):
        _check_attribution(config)
        return
    settings = HeadsSettings.of(read_config(config))
    check_model(settings.model)
    prompts = prompts_of(settings)
    settings.check_prompts(prompts)
    answers = sum(p.answer is not None for p in prompts)
    what = f"{len(prompts)} prompts, {answers} with an answer" if prompts else "repeated random tokens, no prompt file"
    typer.echo(f"{config}: usable. {settings.model}: {', '.join(settings.methods)}; {what}.")


def _check_evaluation(config: Path) -> None:
    from interp.cli.evaluation.data import load_data
    from interp.cli.evaluation.settings import EvaluateSettings, read_config
    from interp.cli.named import check_model

    settings = EvaluateSettings.of(read_config(config))
    if settings.model:
        check_model(settings.model)
    data = load_data(settings)
    if settings.texts is not None:
        from interp.cli.evaluation.run import given_rows

        given_rows(settings, data)
    what = f"{len(data.questions)} questions" if settings.task == "pope" else f"{len(data.objects)} images"
    typer.echo(f"{config}: usable. {settings.model or settings.texts}: {settings.task}; {what}.")


def _check_training(config: Path, found: dict[str, Any]) -> None:
    from interp.cli.named import check_model
    from interp.cli.training.kinds import kind_of
    from interp.cli.training.settings import read_config
    from interp.data.corpora import corpus

    cls = kind_of(found)
    settings = cls.of(read_config(config, cls))
    check_model(settings.model)
    texts = corpus(settings.data, **settings.data_options())
    typer.echo(f"{config}: usable. {settings.model}: layer {settings.layer}; {settings.architecture}; {texts!r}.")


def _is_trace(found: dict[str, Any]) -> bool:
    """Whether a config is for `interp trace`: by its methods, which no other command has."""
    from interp.cli.tracing.settings import METHODS

    methods = found.get("methods")
    return isinstance(methods, list) and any(m in METHODS for m in methods)


def _check_trace(config: Path) -> None:
    from interp.cli.named import check_model
    from interp.cli.tracing.inputs import prompts_of
    from interp.cli.tracing.settings import TraceSettings, read_config

    settings = TraceSettings.of(read_config(config))
    check_model(settings.model)
    prompts = prompts_of(settings)
    typer.echo(f"{config}: usable. {settings.model}: {', '.join(settings.methods)}; {len(prompts)} prompts.")


def _is_attribution(found: dict[str, Any]) -> bool:
    """Whether a config is for `interp attribute`: by its methods, or by settings that no other command has."""
    from dataclasses import fields

    from interp.cli.attribution.settings import METHODS, AttributeSettings
    from interp.cli.ranking.settings import HeadsSettings

    mine, others = ({row.name for row in fields(cls)} for cls in (AttributeSettings, HeadsSettings))
    methods = found.get("methods")
    named = isinstance(methods, list) and any(m in METHODS for m in methods)
    return named or bool((mine - others) & set(found))


def _check_attribution(config: Path) -> None:
    from interp.cli.attribution.run import prompts_of
    from interp.cli.attribution.settings import AttributeSettings, read_config
    from interp.cli.named import check_model

    settings = AttributeSettings.of(read_config(config))
    check_model(settings.model)
    prompts = prompts_of(settings)
    images = sum(p.image is not None for p in prompts)
    what = f"{len(prompts)} prompts{f', {images} with an image' if images else ''}"
    typer.echo(
        f"{config}: usable. {settings.model}: {', '.join(settings.methods)}; {what}; target {settings.target!r}."
    )
