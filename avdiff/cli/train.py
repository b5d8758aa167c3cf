"""`avdiff train`, `train-codec`, `train-evaluator`, `train-g2p`: each hands its words to a recipe.

The options of a recipe are the fields of its dataclass, so they are read where those are known:
`--help` after any of these commands prints the recipe's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import typer


class TrainCommand(NamedTuple):
    """Where a training command lives: a module with `main(words)`, and its line in the help."""

    module: str
    help: str


TRAIN_COMMANDS = {
    "train": TrainCommand(
        "avdiff.train.finetune", "Train or fine-tune by a recipe (see avdiff train --help)."
    ),
    "train-codec": TrainCommand(
        "avdiff.train.codecs.train_codec",
        "Train or fine-tune a codec (see avdiff train-codec --help).",
    ),
    "train-evaluator": TrainCommand(
        "avdiff.train.evaluators.train_evaluator",
        "Train an evaluator: recognizer, face reader or lip network.",
    ),
    "train-g2p": TrainCommand(
        "avdiff.train.g2p.train_g2p", "Train the networks from letters to phonemes and durations."
    ),
}


def add_train_commands(app: typer.Typer) -> None:
    """Put the commands of `TRAIN_COMMANDS` on the program."""
    # The recipe reads its words itself, `--help` among them: typer hands on what it does not know.
    everything = {"allow_extra_args": True, "ignore_unknown_options": True}
    for name, (module, about) in TRAIN_COMMANDS.items():
        register = app.command(name, help=about, add_help_option=False, context_settings=everything)
        register(_handing_on(module))


def _handing_on(module: str):  # type: ignore[no-untyped-def]
    def command(context: typer.Context) -> None:
        import_module(module).main(context.args)

    return command
