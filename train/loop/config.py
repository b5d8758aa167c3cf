"""Recipes: a TOML file plus `--option value`, checked against frozen dataclasses before anything is
loaded.

    recipe = load_options(Recipe, "avdiff/bundled/recipes/presenter.toml", ["--learning_rate",
    "3e-4"])

A recipe class has fields of plain types, or sections that are dataclasses themselves. Field names
are unique over all sections, so a flag needs no section name. The docstring under a field is its
help text.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import textwrap
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a recipe: where it sits, its type, default and help."""

    section: str
    name: str
    kind: Any
    default: Any
    help: str


def load_options(cls: type[T], path: str | Path | None = None, arguments: Sequence[str] = ()) -> T:
    """Build `cls` from a TOML file and overriding `--name value` arguments.

    Raises:
        ValueError: unreadable file, unknown key (with the nearest name), wrong type, missing
            required option; or what the class itself refuses.
    """
    values = read_toml(cls, path) if path is not None else {}
    return build(cls, values | read_arguments(cls, arguments))


def read_toml(cls: type, path: str | Path) -> dict[str, Any]:
    """name -> value of a recipe file; sections must be those of `cls`."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(
            f"recipe {path}: cannot be read ({error.strerror}); `--list-recipes` names those that "
            "ship"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: is not valid TOML ({error})") from error
    known = {o.name: o for o in options_of(cls)}
    sections = {o.section for o in known.values() if o.section}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key in sections:
            if not isinstance(value, dict):
                raise ValueError(f"recipe {path}: {key} is a section; write [{key}]")
            for name, inner in value.items():
                option = known.get(name)
                if option is None or option.section != key:
                    raise ValueError(f"recipe {path}: " + _unknown(name, known, key, option))
                values[name] = inner
        elif key in known:
            values[key] = value
        else:
            raise ValueError(
                f"recipe {path}: " + _unknown(key, {**known, **dict.fromkeys(sections)})
            )
    return values


def read_arguments(cls: type, arguments: Sequence[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, or `--name` alone for true; values as in TOML, bare words are
    strings.
    """
    known = {o.name: o for o in options_of(cls)}
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"argument {word!r}: options are written --name value")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise ValueError(_unknown(name, known).replace("key ", "option --", 1))
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif bool in _members(known[name].kind):
                text = "true"
            else:
                raise ValueError(f"--{name}: needs a value")
        values[name] = _from_text(text, known[name].kind)
    return values


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Instance of `cls` with its sections, from flat `values`; types are checked, the rest keeps
    its defaults.
    """
    known = {o.name: o for o in options_of(cls)}
    for name in values:
        if name not in known:
            raise ValueError(_unknown(name, known))
    missing = [
        o.name for o in known.values() if o.default is dataclasses.MISSING and o.name not in values
    ]
    if missing:
        raise ValueError(
            f"{missing[0]}: is required ({known[missing[0]].help.rstrip('.')}); add it to the "
            "recipe or "
            f"pass --{missing[0]}"
        )
    checked = {name: coerce(name, value, known[name].kind) for name, value in values.items()}
    hints = get_type_hints(cls)
    parts: dict[str, Any] = {}
    for field in _fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            own = {o.name for o in known.values() if o.section == field.name}
            parts[field.name] = hints[field.name](**{k: v for k, v in checked.items() if k in own})
        elif field.name in checked:
            parts[field.name] = checked[field.name]
    return cls(**parts)


def options_of(cls: type) -> list[Option]:
    """All options of a recipe class in order; a name that two sections share is our own mistake."""
    found = list(_walk(cls))
    names = [o.name for o in found]
    assert len(set(names)) == len(names), (
        f"{cls.__name__}: {[n for n in names if names.count(n) > 1]} appear twice"
    )
    return found


def flatten(recipe: Any) -> dict[str, Any]:
    """name -> value over all sections."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        flat |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


def to_toml(recipe: Any) -> str:
    """The resolved recipe as TOML that reads back to the same object; options without a value are
    comments.
    """
    flat = flatten(recipe)
    lines = []
    section = ""
    for option in sorted(options_of(type(recipe)), key=lambda o: o.section != ""):
        if option.section != section:
            section = option.section
            lines += ["", f"[{section}]"]
        value = flat[option.name]
        lines.append(
            f"# {option.name} is not set" if value is None else f"{option.name} = {_as_toml(value)}"
        )
    return "\n".join(lines).strip() + "\n"


def help_text(cls: type) -> str:
    """One paragraph per section: --name  (default)  help."""
    lines = []
    section = None
    for o in options_of(cls):
        if o.section != section:
            section = o.section
            lines.append(f"\n{section or 'general'}:")
        default = (
            "required"
            if o.default is dataclasses.MISSING
            else "-"
            if o.default is None
            else _as_toml(o.default)
        )
        lines.append(
            f"  --{o.name} ({default})\n" + textwrap.indent(textwrap.fill(o.help, 100), " " * 8)
        )
    return "\n".join(lines).strip()


def list_recipes(folder: Path) -> list[tuple[str, str]]:
    """(file name, first comment line) of every recipe in a folder."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        first = path.read_text().split("\n", 1)[0]
        found.append((path.name, first.lstrip("# ").strip() if first.startswith("#") else ""))
    return found


def coerce(name: str, value: Any, kind: Any) -> Any:
    """Check a TOML value against a field's type; whole numbers pass as floats, lists become tuples.

    Raises:
        ValueError: names the option, the value and what fits.
    """
    members = _members(kind)
    for member in members:
        try:
            return _fit(value, member)
        except TypeError:
            continue
    choices = [c for m in members if get_origin(m) is Literal for c in get_args(m)]
    if choices:
        raise ValueError(
            f"{name}={value!r}: needs one of "
            f"{', '.join(map(str, choices))}{_nearest(value, choices)}"
        )
    raise ValueError(
        f"{name}={value!r}: needs {' or '.join(_say(m) for m in members if m is not type(None))}"
    )


def _fit(value: Any, kind: Any) -> Any:
    """The value as `kind`, or TypeError."""
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            if arguments[-1] is Ellipsis:
                return tuple(_fit(v, arguments[0]) for v in value)
            if len(arguments) == len(value):
                return tuple(_fit(v, k) for v, k in zip(value, arguments, strict=True))
    elif origin is dict:
        if isinstance(value, Mapping):
            return {_fit(k, arguments[0]): _fit(v, arguments[1]) for k, v in value.items()}
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise TypeError


def _from_text(text: str, kind: Any) -> Any:
    """A command-line word as the TOML value it stands for; a comma makes a list, `a=1,b=2` a
    table.
    """
    members = _members(kind)
    lists = [m for m in members if get_origin(m) is tuple]
    if lists and not text.startswith("["):
        return [_from_text(t, get_args(lists[0])[0]) for t in text.split(",") if t]
    tables = [m for m in members if get_origin(m) is dict]
    if tables and not text.startswith("{"):
        pairs = [t.partition("=") for t in text.split(",") if t]
        return {k.strip(): _from_text(v, get_args(tables[0])[1]) for k, _, v in pairs}
    if str in members and type(None) in members and text == "none":
        return None
    if str in members:
        return text
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _walk(cls: type, section: str = "") -> Iterator[Option]:
    hints = get_type_hints(cls)
    texts = _docstrings(cls)
    for field in _fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _walk(hints[field.name], field.name)
        else:
            default = (
                field.default
                if field.default_factory is dataclasses.MISSING
                else field.default_factory()
            )
            yield Option(section, field.name, hints[field.name], default, texts.get(field.name, ""))


def _fields(cls: type) -> tuple[dataclasses.Field, ...]:
    return tuple(f for f in dataclasses.fields(cls) if f.init)


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """field -> the string literal that follows it in the class body (inherited fields included)."""
    texts: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                texts[field.target.id] = " ".join(text.value.value.split())
    return texts


def _members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _unknown(
    name: str, known: Mapping[str, Any], section: str = "", elsewhere: Option | None = None
) -> str:
    if elsewhere is not None:
        home = f"[{elsewhere.section}]" if elsewhere.section else "the top of the file"
        return f"key {name} in [{section}]: belongs in {home}"
    where = f" in [{section}]" if section else ""
    return f"key {name}{where}: unknown{_nearest(name, list(known))}"


def _nearest(word: Any, choices: Sequence[Any]) -> str:
    close = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _say(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if get_origin(kind) is tuple:
        return f"a list, each {_say(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"a table name = {_say(get_args(kind)[1])}"
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_as_toml(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{json.dumps(k)} = {_as_toml(v)}" for k, v in value.items()) + " }"
            if value
            else "{}"
        )
    return repr(value)
