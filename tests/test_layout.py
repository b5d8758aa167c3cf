"""The house as a whole: floors, packages, sizes, words, and what a checkpoint records.

The checks are plain functions over a folder; each is also run on a small planted tree that breaks
the rule, because a check that cannot go red guards nothing.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("avdiff", "pipelines", "train", "samples", "tests")

# Floors, lowest first, one package each: a module may import its own package and those below.
# `evaluation` has a rule of its own.
FLOORS = (
    (
        "avdiff.clip",
        "avdiff.latents",
        "avdiff.files",
        "avdiff.pixels",
        "avdiff.deferred_imports",
    ),
    ("avdiff.core",),
    ("avdiff.phonetics",),
    ("avdiff.models",),
    ("avdiff.schedulers",),
    ("avdiff.guidance",),
    ("avdiff.media",),
    ("avdiff.g2p",),
    ("avdiff.evaluators",),
    ("avdiff.corpus",),
    ("avdiff.data",),
    ("avdiff.evaluation",),
    ("avdiff.families",),
    ("avdiff.cast",),
    ("avdiff.pipelines",),
    ("avdiff.train",),
    ("avdiff.serve",),
    ("avdiff.cli",),
    ("avdiff.__main__",),
)
GENERATORS = (
    "avdiff.models.transformer",
    "avdiff.models.blocks",
    "avdiff.pipelines",
    "avdiff.train",
)
BANNED_CALLS = (
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "joblib.load",
    "dill.load",
    "torch.load",
    "numpy.load",
)
# Words of a work place have no business in a repository, nor have paths of one machine.
BANNED_TEXT = re.compile(
    r"/(work|home|root|Users)/\w|\.\./shared|\bissue #?\d|\bthis session\b", re.IGNORECASE
)
MAX_LINES = 500


def python_files(root: Path) -> Iterator[tuple[Path, str]]:
    """Each module of the library with its installed name."""
    for folder, package in (
        ("avdiff", "avdiff"),
        ("pipelines", "avdiff.pipelines"),
        ("train", "avdiff.train"),
    ):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            yield path, ".".join((package, *(p for p in parts if p != "__init__")))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything imported anywhere in a file, under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{'.' * node.level}{node.module or ''}"
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def floor_of(name: str) -> int | None:
    return next(
        (i for i, names in enumerate(FLOORS) if any(is_in(name, package) for package in names)),
        None,
    )


def layout_errors(root: Path) -> list[str]:
    """Upward imports, bare or relative imports, generators inside evaluation."""
    errors = []
    for path, module in python_files(root):
        own, where = floor_of(module), path.relative_to(root)
        for line, name in imports(path):
            target = floor_of(name)
            if name.startswith(".") or is_in(name, "pipelines") or is_in(name, "train"):
                errors.append(f"{where}:{line}: imports {name}; use the full name from avdiff")
            elif own is not None and target is not None and target > own:
                errors.append(f"{where}:{line}: {module} imports {name} from a floor above")
            elif is_in(module, "avdiff.evaluation") and any(
                is_in(name, generator) for generator in GENERATORS
            ):
                errors.append(f"{where}:{line}: evaluation imports a generator, {name}")
    return errors


def package_errors(root: Path) -> list[str]:
    """Packages on disk against the list in pyproject, both ways, and modules that belong to no
    floor.
    """
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(settings["packages"])
    found = {name for path, name in python_files(root) if path.name == "__init__.py"}
    loose = {
        name.rpartition(".")[0] for path, name in python_files(root) if path.name != "__init__.py"
    } - found
    errors = [f"{name}: on disk, not listed in pyproject.toml" for name in sorted(found - listed)]
    errors += [f"{name}: listed in pyproject.toml, not on disk" for name in sorted(listed - found)]
    errors += [f"{name}: has modules but no __init__.py" for name in sorted(loose)]
    homeless = [
        name for _, name in python_files(root) if name != "avdiff" and floor_of(name) is None
    ]
    return errors + [f"{name}: belongs to no floor" for name in homeless]


def size_errors(root: Path) -> list[str]:
    paths = [path for folder in SOURCES for path in sorted((root / folder).rglob("*.py"))]
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return [
        f"{path.relative_to(root)}: {n} lines, at most {MAX_LINES}"
        for path, n in counts.items()
        if n > MAX_LINES
    ]


def text_errors(root: Path) -> list[str]:
    """Machine paths and words of a work place in any text file that is shipped."""
    folders = [path for folder in SOURCES for path in sorted((root / folder).rglob("*"))]
    errors = []
    for path in [*folders, *sorted(root.glob("*"))]:
        if (
            path.suffix in {".py", ".md", ".toml", ".txt", ".sh", ".json", ".jsonl"}
            or path.name == "Makefile"
        ):
            if path == Path(__file__):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if match := BANNED_TEXT.search(line):
                    errors.append(f"{path.relative_to(root)}:{number}: {match.group()!r}")
    return errors


# Words of our own that once stood where the field has one: CONTRIBUTING has both.
PRIVATE_WORDS = frozenset(
    [
        "Told",
        "Wish",
        "Question",
        "hears",
        "tick_start",
        "tick_time",
        "Script",
        "script_encoder",
        "num_marks",
        "event_script",
        "steadiness",
        "judge",
        "judges",
        "Judges",
        "Logbook",
        "Means",
        "Watch",
        "Feed",
        "known_truth",
        "PromptWorld",
        "world",
        "ImpactReader",
        "PhoneTimer",
        "goal",
        "untold",
        "landed",
        "aside",
        "Passage",
        "Piece",
        "strokes_told",
        "adherence",
    ]
)


def word_errors(root: Path) -> list[str]:
    """Private words as names of variables, arguments, attributes, functions or classes."""
    errors = []
    for path, _ in python_files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(node, field, None) for field in ("id", "attr", "name", "arg")}
            words = sorted(PRIVATE_WORDS & {name for name in names if isinstance(name, str)})
            line = getattr(node, "lineno", 0)
            errors += [f"{path.relative_to(root)}:{line}: the name {word!r}" for word in words]
    return errors


def call_errors(root: Path) -> list[str]:
    """Calls that could run code from a file. torch.load passes with weights_only=True, numpy.load
    needs no word.
    """
    errors = []
    for path, _ in python_files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).replace("np.", "numpy.")
            words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = (name == "torch.load" and words.get("weights_only") == "True") or (
                name == "numpy.load" and words.get("allow_pickle", "False") == "False"
            )
            if name in BANNED_CALLS and not safe:
                errors.append(f"{path.relative_to(root)}:{node.lineno}: {name}")
    return errors


def dependency_errors(root: Path) -> list[str]:
    """Third-party packages imported by the library but not named in pyproject."""
    from importlib.metadata import packages_distributions

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    named = {re.split(r"[<>=!~\[; ]", d)[0].lower().replace("_", "-") for d in wanted}
    homes, errors = packages_distributions(), []
    for path, _ in python_files(root):
        for line, name in imports(path):
            top = name.split(".")[0]
            dists = {d.lower().replace("_", "-") for d in homes.get(top, [top])}
            if top not in sys.stdlib_module_names and top != "avdiff" and not dists & named:
                errors.append(
                    f"{path.relative_to(root)}:{line}: {top} is not among the dependencies"
                )
    return errors


CHECKS = (
    layout_errors,
    package_errors,
    size_errors,
    text_errors,
    call_errors,
    dependency_errors,
    word_errors,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_the_house_is_in_order(check) -> None:
    assert check(ROOT) == []


@pytest.fixture
def tiny_house(tmp_path: Path) -> Path:
    """A small tree that keeps all rules."""
    for package in (
        "avdiff",
        "avdiff/core",
        "avdiff/models",
        "avdiff/evaluation",
        "pipelines",
        "train",
    ):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text('"""Nothing."""\n')
    (tmp_path / "avdiff/models/transformer.py").write_text(
        "from avdiff.core import attention\nimport numpy\n"
    )
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["numpy>=2"]\noptional-dependencies = '
        '{}\n[tool.setuptools]\npackages = ["avdiff", '
        '"avdiff.core", "avdiff.models", "avdiff.evaluation", "avdiff.pipelines", "avdiff.train"]\n'
        '[tool.setuptools.package-dir]\n"avdiff.pipelines" = "pipelines"\n"avdiff.train" = '
        '"train"\n'
    )
    return tmp_path


PLANTED = {
    "upward import": (
        "avdiff/core/x.py",
        "from avdiff.models import transformer",
        layout_errors,
        "floor above",
    ),
    "upward inside a function": (
        "avdiff/models/x.py",
        "def f():\n    import avdiff.train.loop.fit",
        layout_errors,
        "floor",
    ),
    "upward from the package": (
        "avdiff/clip.py",
        "from avdiff import core",
        layout_errors,
        "floor above",
    ),
    "bare name": ("train/x.py", "from pipelines.pipeline_av import P", layout_errors, "full name"),
    "relative": ("avdiff/core/x.py", "from .y import z", layout_errors, "full name"),
    "flattery": (
        "avdiff/evaluation/x.py",
        "import avdiff.models.transformer",
        layout_errors,
        "a generator",
    ),
    "unlisted package": ("avdiff/extra/__init__.py", "", package_errors, "not listed"),
    "folder without init": ("avdiff/core/deep/x.py", "", package_errors, "no __init__"),
    "module without a floor": ("avdiff/helpers.py", "", package_errors, "no floor"),
    "long file": ("avdiff/core/x.py", "a = 1\n" * 501, size_errors, "501 lines"),
    "machine path": ("avdiff/core/x.py", 'PATH = "/' + 'home/someone/bank"', text_errors, "x.py:1"),
    "pickle": (
        "avdiff/core/x.py",
        "import pickle\npickle.load(open('x', 'rb'))",
        call_errors,
        "pickle.load",
    ),
    "unsafe load": ("train/x.py", "torch.load('x', weights_only=False)", call_errors, "torch.load"),
    "private word": ("avdiff/core/x.py", "def f(world): return world", word_errors, "'world'"),
    "undeclared": ("avdiff/core/x.py", "import pytest", dependency_errors, "pytest is not"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_the_checks_go_red(tiny_house: Path, case: str) -> None:
    assert [error for check in CHECKS for error in check(tiny_house)] == []
    name, text, check, message = PLANTED[case]
    (tiny_house / name).parent.mkdir(exist_ok=True, parents=True)
    (tiny_house / name).write_text(text)
    assert any(message in error for error in check(tiny_house)), check(tiny_house)


def test_a_package_missing_from_disk_is_seen(tiny_house: Path) -> None:
    (tiny_house / "avdiff/core/__init__.py").unlink()
    assert package_errors(tiny_house) == ["avdiff.core: listed in pyproject.toml, not on disk"]


def test_import_is_lazy_and_fast() -> None:
    code = """
import json, sys, time
start = time.process_time()
import avdiff
seconds = time.process_time() - start
heavy = [m for m in ("torch", "diffusers", "numpy", "av", "transformers") if m in sys.modules]
print(json.dumps({"seconds": seconds, "heavy": heavy, "names": avdiff.__all__}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["heavy"] == []
    assert found["seconds"] < 0.3  # CPU seconds
    assert {"ClipSpec", "AVTransformer", "AVDiffPipeline", "ModelMixin"} <= set(found["names"])


def test_public_names_lead_somewhere() -> None:
    import avdiff

    for name in avdiff.__all__:
        assert getattr(avdiff, name) is not None, name
        assert name in dir(avdiff)
    with pytest.raises(AttributeError, match="Nonsense"):
        avdiff.Nonsense  # noqa: B018


def saved_classes() -> list[tuple[str, str]]:
    """(module, class) of each class in models/ and schedulers/ that diffusers or transformers would
    save.
    """
    bases = {"ModelMixin", "SchedulerMixin", "PreTrainedTokenizerFast", "PreTrainedTokenizer"}
    return [
        (module, node.name)
        for path, module in python_files(ROOT)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        and bases & {ast.unparse(base).split(".")[-1] for base in node.bases}
    ]


def test_saved_components_are_recorded_by_name() -> None:
    """`["avdiff", Class]` in model_index.json, and the same class found again by that name."""
    from importlib import import_module

    from diffusers.pipelines.pipeline_loading_utils import (
        LOADABLE_CLASSES,
        _fetch_class_library_tuple,
    )

    import avdiff
    import avdiff.models

    assert "avdiff" in LOADABLE_CLASSES
    assert ("avdiff.models.transformer", "AVTransformer") in saved_classes()
    for module, name in saved_classes():
        cls = getattr(import_module(module), name)
        assert _fetch_class_library_tuple(cls) == ("avdiff", name)
        assert getattr(avdiff, name, None) is cls, (
            f"{module}.{name} is saved, so avdiff/__init__.py needs a line for it"
        )
        base = next(b for b in LOADABLE_CLASSES["avdiff"] if issubclass(cls, getattr(avdiff, b)))
        assert all(hasattr(cls, method) for method in LOADABLE_CLASSES["avdiff"][base])


def test_wheel_contents(tmp_path: Path) -> None:
    """What setuptools would put into a wheel: every module, and every bundled file."""
    code = f"""
import json, os
os.chdir({str(ROOT)!r})
from setuptools import Distribution
d = Distribution(dict(script_name='setup.py')); d.parse_config_files()
build = d.get_command_obj("build_py"); build.build_lib = {str(tmp_path)!r}; build.ensure_finalized()
names = [f"{{p.replace('.', '/')}}/{{os.path.basename(f)}}" for p, _, f in build.find_all_modules()]
names += [f"{{p.replace('.', '/')}}/{{f}}" for p, _, _, files in build.data_files for f in files]
print(json.dumps(names))
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    shipped = set(json.loads(run.stdout.splitlines()[-1]))
    modules = {f"{path.relative_to(ROOT)}" for path, _ in python_files(ROOT)}
    modules = {
        f"avdiff/{name}" if name.startswith(("pipelines/", "train/")) else name for name in modules
    }
    bundled = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "avdiff/bundled").rglob("*")
        if path.is_file()
    }
    assert modules | bundled | {"avdiff/py.typed"} <= shipped
    assert not [
        name for name in shipped if "tests/" in name or name.endswith((".pt", ".bin", ".pkl"))
    ]
