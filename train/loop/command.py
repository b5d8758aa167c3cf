"""The command line that all trainings share: a recipe by name or path, flags, dry run, run."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from avdiff.files import RECIPES
from avdiff.train.loop.config import help_text, list_recipes, load_options, read_toml, to_toml
from avdiff.train.loop.fit import FitOptions, FitSummary, Task, fit


class TrainingRecipe(Protocol):
    """A recipe class: frozen dataclasses for its sections, one of them `training`."""

    @property
    def training(self) -> FitOptions:
        """How the task is trained."""
        ...


R = TypeVar("R", bound=TrainingRecipe)


def run_training(
    recipe_class: type[R],
    setup: Callable[[R], Task[Any]],
    argv: Sequence[str] | None,
    about: str,
    plan: Callable[[R], str] | None = None,
    finish: Callable[[R, FitSummary], None] | None = None,
) -> FitSummary | None:
    """Train by a command line: `[RECIPE.toml] [--option value]...`, `--help`, `--list-recipes`
    or `--dry-run`.

    Args:
        recipe_class: what the recipe must be. setup: recipe -> task, with all that it needs.
        argv: words after the command; None takes those of this process. about: what `--help` says
            first.
        plan: recipe -> text of a dry run, None where there is none. finish: called after training.

    Raises:
        ValueError: no such recipe or option, a wrong value, or what `setup` refuses.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"{about.strip()}\n\n{help_text(recipe_class)}")
        return None
    if "--list-recipes" in words:
        for name, first_line in recipes_for(recipe_class):
            print(f"{name:24} {first_line}")
        launches = ", ".join(path.name for path in sorted(RECIPES.glob("*.yaml")))
        print(f"\nfor `accelerate launch --config_file`: {launches} in {RECIPES}")
        return None
    dry = "--dry-run" in words
    recipe = load_recipe(recipe_class, [word for word in words if word != "--dry-run"])
    if dry:
        if plan is None:
            raise ValueError("--dry-run: this training has none; it is for `avdiff train`")
        print(to_toml(recipe))
        print(plan(recipe))
        return None
    summary = fit(setup(recipe), recipe.training)
    if finish is not None:
        finish(recipe, summary)
    where = recipe.training.output_dir
    print(f"{summary.reason} at step {summary.step} after {summary.seconds:.0f} s: {where}")
    return summary


def load_recipe(recipe_class: type[R], words: Sequence[str]) -> R:
    """The recipe of `[RECIPE.toml] [--option value]...`, checked by its own `check` if it has one.

    Raises:
        ValueError: no such recipe or option, or a wrong value.
    """
    rest = list(words)
    path = None
    if rest and not rest[0].startswith("--"):
        path = find_recipe(rest.pop(0))
    recipe = load_options(recipe_class, path, rest)
    check = getattr(recipe, "check", None)
    if check is not None:
        check()
    return recipe


def find_recipe(name: str) -> Path:
    """A recipe file: a path, or the name of one that ships, with or without `.toml`.

    Raises:
        ValueError: neither is there; the nearest names are told.
    """
    path = Path(name)
    shipped = [RECIPES / name, RECIPES / f"{name}.toml"]
    for candidate in (path, *shipped):
        if candidate.is_file():
            return candidate
    names = [recipe for recipe, _ in list_recipes(RECIPES)]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"recipe {name}: no such file, and none of that name ships{hint} "
        "(`--list-recipes` names those that do)"
    )


def recipes_for(recipe_class: type) -> list[tuple[str, str]]:
    """(name, first line) of the shipped recipes that this class can read."""
    found = []
    for name, first_line in list_recipes(RECIPES):
        try:
            read_toml(recipe_class, RECIPES / name)
        except ValueError:
            continue  # a recipe of another training
        found.append((name, first_line))
    return found
