"""Recipes: what is read is what was meant, and every slip is answered in one sentence."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from avdiff.train.loop.config import (
    build,
    flatten,
    help_text,
    list_recipes,
    load_options,
    options_of,
    to_toml,
)
from avdiff.train.loop.task import FitOptions


@dataclass(frozen=True)
class Sound:
    """A section."""

    sample_rate: int = 24000
    """Samples per second."""
    targets: tuple[str, ...] = ("audio", "cross")
    """Names
    over two lines."""
    weights: dict[str, float] = field(default_factory=lambda: {"joint": 1.0})
    """Shares."""


@dataclass(frozen=True)
class Recipe:
    """Everything a recipe can hold."""

    name: str
    """What to call it."""
    coupling: Literal["shared", "independent"] = "shared"
    """How noise is drawn."""
    limit: float | None = None
    """Highest value."""
    checkpoint: str | bool = False
    """A path or yes."""
    sound: Sound = Sound()
    training: FitOptions = field(default_factory=lambda: FitOptions("runs"))


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


GOOD = """# A voice for the presenter
name = "ariel"
limit = 3
[sound]
targets = ["audio"]
weights = { joint = 0.5, a2v = 1 }
[training]
output_dir = "runs/ariel"
learning_rate = 1e-3
"""


def test_file_and_flags(tmp_path):
    recipe = load_options(
        Recipe,
        write(tmp_path, GOOD),
        [
            "--learning-rate",
            "2e-4",
            "--max_train_steps=7",
            "--targets",
            "video,text",
            "--coupling",
            "independent",
            "--allow_changed_options",
            "--weights",
            "t2a=0.25,joint=1",
            "--resume_from_checkpoint",
            "latest",
        ],
    )
    assert (recipe.name, recipe.limit, recipe.coupling) == ("ariel", 3.0, "independent")
    assert recipe.sound == Sound(24000, ("video", "text"), {"t2a": 0.25, "joint": 1.0})
    assert recipe.training == FitOptions(
        "runs/ariel",
        learning_rate=2e-4,
        max_train_steps=7,
        allow_changed_options=True,
        resume_from_checkpoint="latest",
    )
    assert isinstance(recipe.limit, float)


def test_resolved_recipe_reads_back(tmp_path):
    recipe = load_options(Recipe, write(tmp_path, GOOD), ["--name", 'quo"te = 音', "--targets", ""])
    assert recipe.sound.targets == ()
    assert load_options(Recipe, write(tmp_path, to_toml(recipe))) == recipe
    assert set(flatten(recipe)) == {o.name for o in options_of(Recipe)}


@pytest.mark.parametrize(
    ("text", "arguments", "answer"),
    [
        ("nmae = 'x'", [], "key nmae: unknown; did you mean name?"),
        (
            "name = 'x'\n[training]\nlearning_rat = 1",
            [],
            r"rat in \[training\]: unknown; did you mean learning_rate\?",
        ),
        (
            "name = 'x'\n[sound]\nlearning_rate = 1.0",
            [],
            r"key learning_rate in \[sound\]: belongs in \[training\]",
        ),
        ("name = 'x'\n[trainning]\nseed = 1", [], "key trainning: unknown; did you mean training?"),
        (
            "name = 'x'\n[training]\nseed = 'one'\noutput_dir = 'r'",
            [],
            "seed='one': needs a whole number",
        ),
        (
            "name = 'x'\n[training]\nseed = 1.5\noutput_dir = 'r'",
            [],
            "seed=1.5: needs a whole number",
        ),
        ("name = 3", ["--output_dir", "r"], "name=3: needs a text"),
        (
            "name = 'x'\ncoupling = 'sharde'",
            ["--output_dir", "r"],
            "coupling='sharde': needs one of shared, independent; did you mean shared?",
        ),
        (
            "name = 'x'\n[sound]\ntargets = 'audio'",
            ["--output_dir", "r"],
            "targets='audio': needs a list, each a text",
        ),
        (
            "name = 'x'",
            ["--output_dir", "r", "--weights", "joint=much"],
            "weights=.*: needs a table name = a number",
        ),
        (
            "name = 'x'",
            ["--output_dri", "r"],
            "option --output_dri: unknown; did you mean output_dir?",
        ),
        ("name = 'x'", ["--seed"], "--seed: needs a value"),
        ("name = 'x'", ["seed", "3"], "argument 'seed': options are written --name value"),
        ("name = 'x'", [], "output_dir: is required .*; add it to the recipe or pass --output_dir"),
        ("name = 'x'", ["--output_dir", "r", "--ema_decay", "1"], "ema_decay=1.0"),
        ("name = ", [], "is not valid TOML"),
        ("sound = 3", [], r"sound is a section; write \[sound\]"),
    ],
)
def test_slips_are_answered(tmp_path, text, arguments, answer):
    with pytest.raises(ValueError, match=answer) as caught:
        load_options(Recipe, write(tmp_path, text), arguments)
    assert "\n" not in str(caught.value)


def test_missing_file():
    with pytest.raises(ValueError, match=r"recipe nowhere.toml: cannot be read .*--list-recipes"):
        load_options(Recipe, "nowhere.toml")
    with pytest.raises(ValueError, match="key loud: unknown"):
        build(Recipe, {"loud": 1})


def test_help_comes_from_the_fields():
    text = help_text(Recipe)
    assert '--targets (["audio", "cross"])\n        Names over two lines.' in text
    assert "--name (required)" in text
    assert all(o.help for o in options_of(Recipe)), "every option explains itself"


def test_recipes_are_listed(tmp_path):
    write(tmp_path, GOOD)
    assert list_recipes(tmp_path) == [("recipe.toml", "A voice for the presenter")]
