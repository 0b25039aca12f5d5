"""`interp check`: is a config usable, before anything heavy runs."""

from pathlib import Path
from typing import Annotated

import typer


def check(config: Annotated[Path, typer.Argument(help="A config such as `interp init` writes.")]) -> None:
    """Check a config, its model's files and its prompt file, without loading any weights."""
    from interp.cli.runfolder import prompts_of
    from interp.cli.settings import HeadsSettings, check_model, read_config

    settings = HeadsSettings.of(read_config(config))
    check_model(settings.model)
    prompts = prompts_of(settings)
    settings.check_prompts(prompts)
    answers = sum(p.answer is not None for p in prompts)
    what = f"{len(prompts)} prompts, {answers} with an answer" if prompts else "repeated random tokens, no prompt file"
    typer.echo(f"{config}: usable. {settings.model}: {', '.join(settings.methods)}; {what}.")
