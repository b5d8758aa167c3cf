"""`avdiff eval all | compare | fidelity | coupling`: everything of the suite but lip-sync, on
files.

avdiff eval all runs/evaluation/model --html report.html
avdiff eval compare a.json b.json
avdiff eval fidelity REAL_FOLDER MADE_FOLDER
avdiff eval coupling whole=DIR cut=DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg")


def clip_files(paths: list[Path]) -> list[Path]:
    """Files, and the media files of folders, in order.

    Raises:
        ValueError: a path that does not exist, or no clip at all.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        inside = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        found += sorted(inside) if path.is_dir() else [path]
    if not found:
        raise ValueError(
            f"{', '.join(map(str, paths))}: no clip there; known are {' '.join(SUFFIXES)}"
        )
    return found


def _reports(parser: argparse.ArgumentParser) -> None:
    for kind in ("json", "csv", "html"):
        parser.add_argument(f"--{kind}", type=Path, help=f"write a {kind.upper()} report")


def _judges(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--evaluators",
        help="folder with recognizer, face_reader and lip_network; default: those bundled",
    )


def _all(arguments: list[str]) -> int:
    """Every measure of each clip; exit code 1 if none could be measured."""
    from rich.progress import track

    from avdiff.data.heldout import FILE, load_prompts
    from avdiff.evaluation import suite
    from avdiff.evaluation.report import report

    parser = argparse.ArgumentParser(
        "avdiff eval all", description="Measure speech, lips, looks, events and sound."
    )
    parser.add_argument("clips", nargs="+", type=Path, help="files or folders")
    parser.add_argument(
        "--prompts",
        help="prompts that the clips were made from; a clip's name begins with their id",
    )
    parser.add_argument(
        "--mos", action="store_true", help="predicted opinion scores too (needs speechmos)"
    )
    _reports(parser)
    _judges(parser)
    options = parser.parse_args(arguments)
    files = clip_files(options.clips)
    if options.prompts is None and FILE.is_file():
        prompts = load_prompts()
    else:
        prompts = load_prompts(options.prompts) if options.prompts else []
    by = (
        suite.Evaluators.from_folder(options.evaluators)
        if options.evaluators
        else suite.Evaluators.bundled()
    )
    rows = [
        suite.measure_file(file, suite.find_prompt(file, prompts), by, options.mos)
        for file in track(files, "measuring", transient=True)
    ]
    for row in rows:
        row.pop("id", None)  # several clips may come from one prompt: here the file is the name
    facts = suite.header(options.evaluators)
    summary = report.write_reports(rows, facts, options.json, options.csv, options.html)
    report.print_rows(rows, ["mouth_r", "offset_ms", "phone_errors", "phones", "peak"])
    report.print_summary(summary, facts)
    return 0 if summary["status"].get("ok") else 1


def _compare(arguments: list[str]) -> int:
    """Paired differences of two runs."""
    from avdiff.evaluation.report import report

    parser = argparse.ArgumentParser(
        "avdiff eval compare", description="Compare two JSON reports, clip by clip."
    )
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--json", type=Path, help="write the differences")
    options = parser.parse_args(arguments)
    found = report.compare(options.a, options.b)
    report.print_comparison(found)
    if options.json:
        report.write_text(options.json, json.dumps([asdict(one) for one in found], indent=1) + "\n")
    return 0


def _fidelity(arguments: list[str]) -> int:
    """Distances of two folders of clips."""
    from avdiff.evaluation import fidelity, suite
    from avdiff.evaluation.report import report
    from avdiff.media.write import Clip, read_clip

    parser = argparse.ArgumentParser(
        "avdiff eval fidelity", description="Frechet and kernel distances of two sets."
    )
    parser.add_argument("real", type=Path)
    parser.add_argument("made", type=Path)
    parser.add_argument("--json", type=Path, help="write the distances")
    _judges(parser)
    options = parser.parse_args(arguments)
    by = (
        suite.Evaluators.from_folder(options.evaluators)
        if options.evaluators
        else suite.Evaluators.bundled()
    )

    def clips(folder: Path) -> Iterator[Clip]:
        for file in clip_files([folder]):
            try:
                yield read_clip(file, max_seconds=suite.LONGEST)
            except ValueError as error:
                print(f"left out: {error}")

    found = fidelity.fidelity(
        fidelity.features(clips(options.real), by), fidelity.features(clips(options.made), by)
    )
    fidelity.print_fidelity(found)
    if options.json:
        report.write_text(options.json, json.dumps([asdict(one) for one in found], indent=1) + "\n")
    return 0 if any(one.made for one in found) else 1


def _coupling(arguments: list[str]) -> int:
    """Arms that were generated before, such as by samples/coupling.py."""
    from avdiff.evaluation import coupling, suite

    parser = argparse.ArgumentParser(
        "avdiff eval coupling", description="Lips and sound with links cut."
    )
    parser.add_argument("arms", nargs="+", help="NAME=FOLDER; one must be called whole")
    _judges(parser)
    options = parser.parse_args(arguments)
    folders = {}
    for arm in options.arms:
        name, equals, folder = arm.partition("=")
        if not equals:
            raise ValueError(f"{arm!r}: needs NAME=FOLDER, such as cut=runs/coupling/cut")
        folders[name] = Path(folder)
    by = (
        suite.Evaluators.from_folder(options.evaluators)
        if options.evaluators
        else suite.Evaluators.bundled()
    )
    coupling.print_couplings(coupling.measure_arms(folders, by))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "all": _all,
    "compare": _compare,
    "fidelity": _fidelity,
    "coupling": _coupling,
}


def main(arguments: list[str]) -> int:
    """Run `arguments`, the first of which is the command -> exit code.

    Raises:
        ValueError: an unknown command, or what the command refuses.
    """
    if not arguments or arguments[0] not in COMMANDS:
        raise ValueError(f"eval {' '.join(arguments[:1])}: needs one of {', '.join(COMMANDS)}")
    return COMMANDS[arguments[0]](arguments[1:])
