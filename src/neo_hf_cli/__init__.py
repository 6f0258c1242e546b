"""
The `neo-hf` command.

This is a package beside `neo_hf`, not inside it: importing any module of `neo_hf` runs its `__init__`, which imports
torch and transformers to register NEO with the Auto classes. That takes seconds, and `neo-hf --help`, `--version` and
usage errors should not. The modules that declare the commands therefore import only the standard library and typer,
and everything else inside the commands.
"""

from . import conversion, inference, training

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

app = typer.Typer(
    help="NEO, a native vision-language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(inference.app)
app.add_typer(conversion.app)
app.add_typer(training.app)


def _print_version(wanted: bool):
    if wanted:
        print(f"neo-hf {version('neo-hf')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
):
    pass


def main(argv: list[str] | None = None):
    """
    Run the command line and exit. Errors raised by the library become one line on standard error, with the option in
    place of the argument that it stands for.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(argv)
    except (ValueError, OSError, ImportError) as error:
        print("neo-hf: error:", str(error).replace("force=True", "--force"), file=sys.stderr)
        sys.exit(1)
