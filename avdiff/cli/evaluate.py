"""`avdiff eval ...`: lip-sync here, everything else of the suite in `evaluate_all`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avdiff.cli.terminal import progress

if TYPE_CHECKING:
    from avdiff.evaluation.lipsync.measure import LipSync, Measured

app = typer.Typer(
    help="Measure clips: lip-sync first.", no_args_is_help=True, rich_markup_mode=None
)

OTHERS = {
    "all": "Speech, lips, looks, events and sound of each clip (see avdiff eval all --help).",
    "compare": "Paired differences of two JSON reports.",
    "fidelity": "Frechet and kernel distances of two folders of clips.",
    "coupling": "Lips and sound with links between the branches cut.",
}
LIP_NETWORK = {
    "offset_frames": "frames",
    "offset_ms": "ms",
    "score_at_zero": "at 0",
    "score": "best",
    "confidence": "conf.",
}
SYNCNET = {
    "offset_frames": "frames",
    "offset_ms": "ms",
    "distance_at_zero": "D at 0",
    "lse_d": "LSE-D",
    "lse_c": "LSE-C",
}
SYNCHFORMER = {
    "offset_frames": "frames",
    "offset_ms": "ms",
    "desync": "DeSync",
    "score_at_zero": "at 0",
    "score": "best",
}
COLUMNS = {"lip_network": LIP_NETWORK, "syncnet": SYNCNET, "synchformer": SYNCHFORMER}
CONVERSION = (
    'python -c "import torch; from safetensors.torch import save_file; save_file('
    "{k: v.contiguous() for k, v in torch.load('in.pt', map_location='cpu', weights_only=False)"
    "['model'].items()}, "
    "'synchformer.safetensors')\""
)
SUMMED = ("offset_abs_frames", "within_1_frame", "margin", "face_coverage", "speech_coverage")


@app.command()
def lipsync(
    clips: Annotated[list[Path], typer.Argument(help="Files, or folders of them.")],
    json: Annotated[
        Path | None, typer.Option(help="Write rows, curves and summary to this file.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line a clip to this file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with players and curves, worst clip first.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="lip_network, syncnet for LSE-C and LSE-D, or synchformer for DeSync (both need "
            "--weights). "
            "Never compare numbers of two backends. Synchformer compares whole pictures and any "
            "sound of 4.8 s or more, in steps of 200 ms, which are too coarse for lips."
        ),
    ] = "lip_network",
    weights: Annotated[
        Path | None,
        typer.Option(
            help="SyncNet's weights (.safetensors, or syncnet_v2.model), or Synchformer's "
            "(.safetensors, or MMAudio's synchformer_state_dict.pth). Synchformer's own .pt must "
            "be converted once, where omegaconf is installed, and runs code of its "
            "authors when it is read: " + CONVERSION
        ),
    ] = None,
    quirks: Annotated[
        bool,
        typer.Option(
            "--quirks",
            help="SyncNet: pad with zeros, and tell the offset with its port's sign too.",
        ),
    ] = False,
    cropped: Annotated[
        bool,
        typer.Option(
            "--cropped", help="SyncNet: the clips are face crops already, as LRS scripts expect."
        ),
    ] = False,
    landmarker: Annotated[
        str | None,
        typer.Option(
            help="face_landmarker.task of MediaPipe, or 'download' (3.8 MB, once); default "
            "$AVDIFF_LANDMARKER, else a copy that was downloaded before."
        ),
    ] = None,
    faces: Annotated[
        str, typer.Option(help="auto, mesh (filmed faces), reader (drawn presenters).")
    ] = "auto",
    evaluators: Annotated[
        Path | None,
        typer.Option(help="Folder with lip_network and face_reader; default those bundled."),
    ] = None,
    reach: Annotated[float, typer.Option(help="Largest offset that is looked for, seconds.")] = 0.6,
    per_face: Annotated[
        bool, typer.Option("--per-face", help="One row for each face, not for each clip.")
    ] = False,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Shift each clip's sound by 0, 3, 5, 10 frames both ways; swap sounds.",
        ),
    ] = False,
    fail_on_offset: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Exit code 1 if an offset is larger than so many frames, or none was measured.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Clips measured at once.")] = 1,
) -> None:
    """How late is the sound, and how well do lips fit it? Offsets are positive when the audio is
    late.

    Frames are of 40 ms whatever the clip's rate. A clip that cannot be measured has a row that says
    why.
    """
    from avdiff.cli.evaluate_all import clip_files
    from avdiff.evaluation.lipsync.measure import LipSync, face_rows
    from avdiff.evaluation.report.report import print_summary, write_reports

    files = clip_files(clips)
    options: dict[str, Any] = {
        "weights": weights,
        "quirks": quirks,
        "cropped": cropped,
        "reach": reach,
    }
    evaluator = LipSync(landmarker, faces, backend, evaluators, **options)
    if evaluator.faces.name == "reader":
        _warn(
            "only the reader of drawn presenters is here: do not rely on numbers of filmed faces "
            "(--landmarker download, and pip install 'avdiff[eval]')"
        )
    found = evaluator.rows(files, jobs, progress("measuring", len(files)))
    rows = [clip.row for clip in found]
    for row in rows:
        if row["status"] == "ok":
            row["offset_abs_frames"] = abs(row["offset_frames"])
            row["within_1_frame"] = float(row["offset_abs_frames"] <= 1)
    rows = face_rows(rows) if per_face else rows
    header = evaluator.header()
    summary = write_reports(rows, header, json, csv, html, "offset_abs_frames", "Lip-sync")
    columns = COLUMNS[evaluator.backend.name]
    _print_table(rows, columns | {"face_coverage": "face", "speech_coverage": "speech"})
    shown = {
        key: summary["numbers"][key] for key in (*columns, *SUMMED) if key in summary["numbers"]
    }
    print_summary(summary | {"numbers": shown}, header)
    if self_test:
        _self_test(evaluator, [clip for clip in found if clip.audio is not None])
    for path in (json, csv, html):
        if path is not None:
            print(path)
    raise typer.Exit(_verdict([clip.row for clip in found], fail_on_offset))


def _print_table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """One line a clip on stdout; why a clip was not measured stands below."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table("clip", "status")
    for name in columns.values():
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        values = (row.get(key) for key in columns)
        cells = [
            "" if v is None else f"{v:.0f}" if key == "offset_ms" else f"{v:.2f}"
            for key, v in zip(columns, values, strict=True)
        ]
        table.add_row(
            Text(str(row.get("id") or Path(row["file"]).name), overflow="fold"),
            row["status"],
            *cells,
        )
    console.print(table)
    for row in rows:
        if row["error"]:
            console.print(
                f"{Path(row['file']).name}: {row['status']}: {row['error']}",
                markup=False,
                soft_wrap=True,
            )


def _verdict(rows: list[dict[str, Any]], limit: float | None) -> int:
    """Exit code: 1 if a measured offset is beyond the limit, or a limit was given and nothing was
    measured.
    """
    offsets = [abs(row["offset_frames"]) for row in rows if row["status"] == "ok"]
    return int(limit is not None and (not offsets or max(offsets) > limit))


def _self_test(evaluator: LipSync, clips: list[Measured]) -> None:
    """Recovery of planted shifts, and true against swapped sound, on stdout."""
    from rich.console import Console
    from rich.table import Table

    from avdiff.evaluation.lipsync.self_checks import recovery, shift_clip, swap_auc

    console = Console(highlight=False)
    if not clips:
        console.print("self-test: no clip could be measured")
        return
    metrics = recovery([shift_clip(clip, evaluator.backend) for clip in clips])
    table = Table(
        "shift, frames", "absolute, within 1", "relative to the clip's own zero, within 1"
    )
    for shift, (absolute, relative) in metrics["by_shift"].items():
        table.add_row(f"{shift:+d}", f"{absolute:.1%}", f"{relative:.1%}")
    for within in (1, 2):
        table.add_row(
            f"all, within {within}",
            str(metrics[f"absolute_{within}"]),
            str(metrics[f"relative_{within}"]),
        )
    console.print(f"self-test on {len(clips)} clips, 95 % intervals over clips", markup=False)
    console.print(table)
    if len(clips) > 1:
        for name, value in swap_auc(clips, evaluator.backend).items():
            told = "at lag 0" if name == "auc_zero" else "at the best lag"
            console.print(f"true against swapped sound, {told}: AUC {value}", markup=False)


def _warn(text: str) -> None:
    typer.echo(f"avdiff: warning: {text}", err=True)


def _passed_on(name: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        from avdiff.cli.evaluate_all import main

        try:
            code = main([name, *context.args])
        except (
            SystemExit
        ) as stop:  # argparse ends the program itself, after its help or its complaint
            code = stop.code if isinstance(stop.code, int) else 2
        raise typer.Exit(code)

    return command


for _name, _help in OTHERS.items():
    _settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(_name, help=_help, add_help_option=False, context_settings=_settings)(
        _passed_on(_name)
    )
