"""The command line, the roof of the house: `avdiff generate | info | doctor | data | eval | ...`.

This module only puts the commands together; each lives in the module of its name. They import what
they need when they run, so that `avdiff --help` answers at once. Errors of the user are one line on
stderr with exit code 2; `--debug`, anywhere on the line, shows the traceback instead.
"""

from __future__ import annotations

import sys

import typer

from avdiff.cli import terminal
from avdiff.cli.data import app as data_app
from avdiff.cli.doctor import doctor
from avdiff.cli.evaluate import app as eval_app
from avdiff.cli.generate import generate
from avdiff.cli.info import info
from avdiff.cli.lora import app as lora_app
from avdiff.cli.serve import serve
from avdiff.cli.train import add_train_commands

app = typer.Typer(
    help="Joint audio-video diffusion: make clips that speak, train and measure.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(info)
app.command()(doctor)
app.command()(serve)
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
app.add_typer(lora_app, name="lora")
add_train_commands(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script: run, and turn the user's errors into one line and exit
    code 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    terminal.prepare(debug)
    try:
        terminal.refuse_other_encodings(words)
        code = app([word for word in words if word != "--debug"], standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        print(terminal.error_line(error), file=sys.stderr)
        sys.exit(2)
