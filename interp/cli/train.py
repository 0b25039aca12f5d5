"""`interp train`: its commands are made from the settings of the library, which are read when one of them is called."""

from typing import Any

import typer
from typer.core import TyperGroup

KINDS = ("sae", "transcoder", "lorsa")


class Trainers(TyperGroup):
    """A group whose commands are built when they are asked for: their options need torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands."""
        return list(KINDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by name, or None."""
        if cmd_name not in KINDS:
            return None
        from interp.cli.training.command import command_of

        made = typer.Typer(add_completion=False)
        made.command(cmd_name)(command_of(cmd_name))
        command = typer.main.get_command(made)
        command.name = cmd_name
        return command


app = typer.Typer(cls=Trainers, help="Train sparse dictionaries: SAEs, transcoders and Lorsas.", no_args_is_help=True)


@app.callback()
def train() -> None:
    """Train sparse dictionaries: SAEs, transcoders and Lorsas."""
