"""The commands. Importing this is cheap: each command loads what it needs when it runs."""


def main() -> None:
    """The entry point `interp`."""
    from interp.cli.app import app

    app()
