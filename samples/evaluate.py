"""Measure a model on the held-out prompts, beside the corpus itself and the corpus through the
model's codecs.

    python samples/evaluate.py [--model FOLDER] [--folder runs/evaluation] [--seeds 1] [--steps 16]
    [--limit 40]

Everything is resumable: clips and rows that are in the folder are kept. It ends with a table,
`table.json`, a JSON and a CSV for each column of the table, and `report.html` with the model's
clips, worst first. Evaluators are frozen and never trained on anything that the model makes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from avdiff import PRESENTER, AVDiffPipeline, write_clip
from avdiff.corpus.speech.read import SpeechCorpus
from avdiff.data.heldout import FILE, Prompt, load_prompts
from avdiff.evaluation import suite
from avdiff.evaluation.metrics.table import metrics_table, print_metrics
from avdiff.evaluation.oracle import truth_clip
from avdiff.evaluation.report.report import write_reports, write_text
from avdiff.guidance import Guidance
from avdiff.latents import Joint
from avdiff.pipelines.generate_prompts import clip_path, generate_prompts, round_trip

Clips = list[tuple[Path, Prompt]]


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call; what is not asked for is left to the pipeline."""
    found: dict[str, Any] = {}
    if args.steps is not None:
        found["num_inference_steps"] = args.steps
    if args.cross_guidance is not None:
        text = Joint(args.guidance or 1.0, args.audio_guidance or args.guidance or 1.0)
        found["guidance"] = Guidance(
            text=text, cross=Joint(args.cross_guidance, args.cross_guidance)
        )
    elif args.guidance is not None:
        found |= {
            "guidance_scale": args.guidance,
            "audio_guidance_scale": args.audio_guidance or args.guidance,
        }
    return found


def make_oracle(
    prompts: Sequence[Prompt],
    folder: Path,
    bank: SpeechCorpus,
    tick: Callable[[int], None],
    codecs: AVDiffPipeline | None = None,
) -> Clips:
    """The corpus's own clips of the prompts that the bank has the words of; with `codecs`, after
    their round trip, drawn again, so that mp4 coding counts once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made: Clips = []
    for prompt in prompts:
        path = clip_path(folder, prompt, 0)
        clip = None if path.is_file() else truth_clip(prompt, bank)
        if clip is not None:
            clip = clip if codecs is None else round_trip(codecs, clip)
            write_clip(path, clip.frames, clip.fps, clip.audio, clip.sample_rate)
        if path.is_file():
            made.append((path, prompt))
        tick(1)
    return made


def measure(
    clips: Clips,
    store: Path,
    evaluators: suite.Evaluators,
    fingerprint: str,
    mos: bool,
    tick: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Rows of the clips; those in `store` that the same evaluators measured on the same file are
    kept.
    """
    known: dict[str, dict[str, Any]] = {}
    if store.is_file():
        for line in store.read_text(encoding="utf8").splitlines():
            record = json.loads(line)
            known[record["key"]] = record["row"]
    rows = []
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.open("a", encoding="utf8") as file:
        for path, prompt in clips:
            key = f"{path.name} {path.stat().st_mtime_ns} {fingerprint}"
            if key not in known:
                row = suite.measure_file(path, prompt, evaluators, mos) | {"id": path.stem}
                file.write(json.dumps({"key": key, "row": _plain(row)}, ensure_ascii=False) + "\n")
                file.flush()
                known[key] = row
            rows.append(known[key])
            tick(1)
    return rows


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """NumPy scalars as numbers; NaN stays NaN, which Python's json reads back."""
    return {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}


def spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """All prompts, or about `limit` of them, evenly taken so that every kind and language is
    there.
    """
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return [prompts[round(i * (len(prompts) - 1) / max(1, limit - 1))] for i in range(limit)]


def main(arguments: Iterable[str] | None = None) -> dict[str, Any]:
    """Generate, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(PRESENTER), help="pipeline folder")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/evaluation"), help="for clips and results"
    )
    parser.add_argument(
        "--prompts", default=str(FILE), help="file of prompts; see avdiff.data.heldout"
    )
    parser.add_argument(
        "--kinds", nargs="*", help="sentence, passage, digits, grid, event; all by default"
    )
    parser.add_argument("--languages", nargs="*", help="codes; all by default")
    parser.add_argument("--limit", type=int, help="about so many prompts, spread over the file")
    parser.add_argument("--seeds", type=int, default=1, help="clips of each prompt")
    parser.add_argument("--batch", type=int, default=8, help="clips generated at a time")
    parser.add_argument("--steps", type=int, help="denoising steps; default is the pipeline's")
    parser.add_argument("--guidance", type=float, help="text guidance; default is the pipeline's")
    parser.add_argument(
        "--audio-guidance", type=float, help="text guidance of the sound; default as --guidance"
    )
    parser.add_argument(
        "--cross-guidance", type=float, help="cross-modal guidance of both modalities"
    )
    parser.add_argument(
        "--bank", help="speech bank of the oracles; default $AVDIFF_BANK, else the mini-bank"
    )
    parser.add_argument("--evaluators", help="folder with other evaluators than the bundled ones")
    parser.add_argument("--no-oracles", action="store_true", help="the model alone")
    parser.add_argument(
        "--mos", action="store_true", help="predicted opinion scores too (needs speechmos)"
    )
    args = parser.parse_args(None if arguments is None else list(arguments))

    prompts = spread(load_prompts(args.prompts, args.kinds, args.languages), args.limit)
    if not prompts:
        raise SystemExit("no prompt of these kinds and languages")
    evaluators = (
        suite.Evaluators.from_folder(args.evaluators)
        if args.evaluators
        else suite.Evaluators.bundled()
    )
    facts = suite.header(args.evaluators) | {
        "model": args.model,
        "prompts": len(prompts),
        "seeds": args.seeds,
        "options": json.dumps(vars(args) | {"folder": ""}, default=str),
    }
    pipe = AVDiffPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    fingerprint = " ".join(value for key, value in facts.items() if key.endswith("weights"))
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.description}")
    began = time.time()
    with Progress(*columns) as progress:

        def stage(name: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(name, total=total)
            return lambda count: progress.update(task, advance=count)

        clips: dict[str, Clips] = {
            "model": generate_prompts(
                pipe,
                prompts,
                args.folder / "model",
                args.seeds,
                args.batch,
                stage("generate", len(prompts) * args.seeds),
                **options_of(args),
            )
        }
        if not args.no_oracles:
            bank = SpeechCorpus(args.bank, decoded=True)
            clips["codec"] = make_oracle(
                prompts, args.folder / "codec", bank, stage("codec", len(prompts)), pipe
            )
            clips["corpus"] = make_oracle(
                prompts, args.folder / "corpus", bank, stage("corpus", len(prompts))
            )
        rows = {
            name: measure(
                members,
                args.folder / f"rows-{name}.jsonl",
                evaluators,
                fingerprint,
                args.mos,
                stage(f"measure {name}", len(members)),
            )
            for name, members in clips.items()
        }
    facts["minutes"] = f"{(time.time() - began) / 60:.1f}"
    table = metrics_table(rows)
    for name, members in rows.items():
        page = args.folder / "report.html" if name == "model" else None
        write_reports(
            members,
            facts | {"clips": name},
            json=args.folder / f"{name}.json",
            csv=args.folder / f"{name}.csv",
            html=page,
            rank="mouth_r",
            title="Held-out prompts",
            tables=[("Metrics", *table.cells())] if page else (),
        )
    write_text(
        args.folder / "table.json",
        json.dumps({"header": facts, "table": table.record()}, indent=1) + "\n",
    )
    print_metrics(table)
    print(f"{args.folder / 'report.html'}, {args.folder / 'table.json'}")
    return table.record()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
