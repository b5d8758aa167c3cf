"""Clips with sound in the middle of training: through the real pipeline, heard and seen by the
evaluators, on a page.

`output_dir/samples/step-000200/` holds the clips, `report.json` and `report.html` with players;
`samples/index.html` shows the curves of the run and links to them.
"""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import ModelMixin

from avdiff.evaluation.report.report import write_reports, write_text
from avdiff.evaluators.load import BUNDLED
from avdiff.media.write import read_clip, write_clip
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.train.joint.export import codecs_of, load_codec_parts
from avdiff.train.joint.trained_model import TrainedModel
from avdiff.train.loop.run_log import read_log


def _heard(clip: Any, prompt: str) -> float:
    from avdiff.corpus.captions import parse_prompt
    from avdiff.evaluation.metrics.speech import score

    return score(clip, parse_prompt(prompt)[1] or "")


def _lips(clip: Any, prompt: str) -> float:
    from avdiff.evaluation.lipsync.measure import score

    return score(clip)


def _truth(clip: Any, prompt: str) -> float:
    from avdiff.evaluation.metrics.visual_speech import score

    return score(clip)


# name -> (networks it needs, clip and prompt -> the higher the better)
EVALUATORS: dict[str, tuple[tuple[str, ...], Callable[[Any, str], float]]] = {
    "speech": (("recognizer",), _heard),
    "lip_sync": (("lip_network", "face_reader"), _lips),
    "mouth": (("recognizer", "face_reader"), _truth),
}


def available_evaluators(folder: Path = BUNDLED) -> list[str]:
    """Evaluators whose networks are there."""
    return [
        name
        for name, (needs, _) in EVALUATORS.items()
        if all((folder / n / "config.json").is_file() for n in needs)
    ]


class ValidationClips:
    """Makes, judges and shows clips of fixed prompts and seeds.

    Args:
        root: output_dir of the run. prompts: one clip each. evaluators: names of `EVALUATORS`.
    """

    def __init__(self, root: Path, prompts: Sequence[str], evaluators: Iterable[str]) -> None:
        self.root = root / "samples"
        self.prompts = list(prompts)
        self.evaluators = list(evaluators)
        self._codecs: dict[str, ModelMixin] | None = None

    @torch.no_grad()
    def make(self, model: TrainedModel, step: int) -> dict[str, float]:
        """Metrics "evaluator/<name>", means over prompts; called with the averaged weights in
        place, on every rank.
        """
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        if (
            parallel and torch.distributed.get_rank() > 0
        ):  # the same clips, so that ranks agree on what is best
            with tempfile.TemporaryDirectory() as temporary_path:
                return _means(self._clips(model, Path(temporary_path)), self.evaluators)
        folder = self.root / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = self._clips(model, folder)
        header = {
            "step": step,
            "evaluators": ", ".join(self.evaluators) or "none: their weights are not here",
        }
        write_reports(
            rows,
            header,
            json=folder / "report.json",
            html=folder / "report.html",
            title=f"Samples at step {step}",
        )
        write_text(self.root / "index.html", curves_page(self.root.parent / "log.jsonl", self.root))
        return _means(rows, self.evaluators)

    def _clips(self, model: TrainedModel, folder: Path) -> list[dict[str, Any]]:
        pipe = self._pipeline(model)
        rows = []
        for number, prompt in enumerate(self.prompts):
            row: dict[str, Any] = {
                "file": str(folder / f"{number:02d}.mp4"),
                "status": "ok",
                "error": "",
                "prompt": prompt,
            }
            generator = torch.Generator("cpu").manual_seed(number)
            with torch.autocast(model.device.type, enabled=False):
                out = pipe(prompt, generator=generator, output_type="np", check_prompt=False)
            sound = None if out.audio is None else out.audio[0].float().cpu().numpy()
            write_clip(
                row["file"],
                out.frames[0],
                out.frame_rate,
                sound,
                out.sampling_rate,
                {"prompt": prompt},
            )
            clip = read_clip(row["file"])
            for evaluator in self.evaluators:
                try:
                    row[evaluator] = float(EVALUATORS[evaluator][1](clip, prompt))
                except ValueError as error:
                    row |= {"status": "not_judged", "error": f"{evaluator}: {error}"}
            rows.append(row)
        return rows

    def _pipeline(self, model: TrainedModel) -> AVDiffPipeline:
        if self._codecs is None:
            self._codecs = load_codec_parts(str(codecs_of(model.recipe)))
            for part in self._codecs.values():
                part.to(model.device).eval()
        pipe = AVDiffPipeline(
            transformer=model.transformer,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            scheduler=model.scheduler,
            **self._codecs,
            **model.sampling,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _means(rows: Sequence[Mapping[str, Any]], evaluators: Iterable[str]) -> dict[str, float]:
    return {f"evaluator/{name}": mean(row.get(name, 0.0) for row in rows) for name in evaluators}


def curves_page(log: Path, samples: Path) -> str:
    """HTML with the curves of a run, one small drawing each, and links to the pages of its
    samples.
    """
    lines = read_log(log) if log.exists() else []
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if (
                name != "step"
                and isinstance(value, int | float)
                and name.count("/") < 3
                and "/t0." not in name
            ):
                curves.setdefault(name, []).append((line["step"], float(value)))
    pages = sorted(samples.glob("step-*/report.html"), reverse=True)
    links = "".join(
        f'<li><a href="{p.parent.name}/{p.name}">{p.parent.name}</a></li>' for p in pages
    )
    drawings = "".join(_drawing(name, points) for name, points in curves.items() if len(points) > 1)
    style = (
        "body{font:14px "
        "sans-serif}figure{display:inline-block;margin:6px}polyline{fill:none;stroke:#06c}"
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>Training</title><style>{style}</style>"
        f"<h1>Training</h1><ul>{links}</ul>{drawings}\n"
    )


def _drawing(
    name: str, points: Sequence[tuple[int, float]], width: int = 240, height: int = 100
) -> str:
    xs, ys = zip(*points, strict=True)
    left = xs[0]
    low = min(ys)
    across = max(xs[-1] - left, 1)
    up = max(max(ys) - low, 1e-12)
    path = " ".join(
        f"{(x - left) / across * width:.1f},{height - (y - low) / up * height:.1f}"
        for x, y in points
    )
    return (
        f'<figure><svg width="{width}" height="{height}"><polyline points="{path}"/></svg>'
        f"<figcaption>{html.escape(name)}: {ys[0]:.4g} to {ys[-1]:.4g}</figcaption></figure>"
    )
