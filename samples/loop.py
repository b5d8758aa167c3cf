"""The whole road once, in minutes: mini-bank -> corpus -> codecs -> latents -> training -> pipeline
-> mp4.

    python samples/loop.py --folder runs/loop          (or: make loop)

Every part is the real one; only the budgets are small, so the result shows that the road is open,
not how good it gets.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

PROMPT = 'A woman says "good morning"'


def train_codecs(model: Path, runs: Path, scale: float, bank: str | None) -> None:
    """Three small codecs into model/vae, model/audio_vae, model/vocoder."""
    from avdiff.train.codecs.train_codec import main as train_codec

    budgets = {
        "video_vae": (240, 8, 3e-3, "vae"),
        "audio_vae": (400, 16, 2e-3, "audio_vae"),
        "vocoder": (80, 8, 1e-3, "vocoder"),
    }
    for codec, (steps, batch, rate, name) in budgets.items():
        out = runs / codec
        options = [
            "--codec",
            codec,
            "--output_dir",
            str(out),
            "--max_train_steps",
            str(max(4, round(steps * scale))),
            "--train_batch_size",
            str(batch),
            "--learning_rate",
            str(rate),
            "--lr_warmup_steps",
            "20",
            "--mixed_precision",
            "auto",
            "--checkpointing_steps",
            "0",
            "--clips",
            "200",
            "--clip_frames",
            "5",
            "--segment_seconds",
            "0.8",
            *(["--bank", bank] if bank else []),
        ]
        train_codec(options)
        saved = next((out / "final").iterdir())
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        saved.rename(model / name)


def make_caches(model: Path, runs: Path, scale: float, bank: str | None) -> list[Path]:
    """Latents of training clips and of a few held-out ones."""
    from avdiff.data.cache import cache_presenters

    counts = {"train": max(16, round(192 * scale)), "val": 16}
    return [
        cache_presenters(runs / f"latents-{split}", model, count, bank, split, seconds=1.64)
        for split, count in counts.items()
    ]


def train_joint(
    model: Path, runs: Path, caches: list[Path], scale: float
) -> tuple[Path, dict[str, tuple[float, float]]]:
    """Train the presenter-sized model briefly -> pipeline folder, and (first, last) held-out loss
    of each modality.
    """
    from avdiff.train.finetune import main as train

    steps = max(8, round(160 * scale))
    out = runs / "joint"
    train(
        [
            "--train_data",
            str(caches[0]),
            "--validation_data",
            str(caches[1]),
            "--codecs",
            str(model),
            "--output_dir",
            str(out),
            "--max_train_steps",
            str(steps),
            "--train_batch_size",
            "16",
            "--learning_rate",
            "1e-3",
            "--lr_warmup_steps",
            "20",
            "--mixed_precision",
            "auto",
            "--validation_steps",
            str(steps // 4),
            "--validation_items",
            "16",
            "--checkpointing_steps",
            "0",
            "--ema_decay",
            "0.98",
        ]
    )
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = {}
    for modality in ("video", "audio"):
        key = next(
            k for row in rows for k in row if k.endswith(f"/{modality}") and k.startswith("val")
        )
        values = [row[key] for row in rows if key in row]
        losses[modality] = (values[0], values[-1])
    return out / "final", losses


def speak(pipeline: Path, target: Path) -> tuple[float, float]:
    """Generate the clip -> seconds of picture and of sound, as read back from the file."""
    from avdiff.media.write import read_clip, write_clip
    from avdiff.pipelines.pipeline_av import AVDiffPipeline

    pipe = AVDiffPipeline.from_pretrained(pipeline)
    out = pipe(PROMPT, num_inference_steps=8, generator=torch.Generator().manual_seed(0))
    write_clip(
        target,
        out.frames[0],
        out.frame_rate,
        out.audio[0],
        out.sampling_rate,
        {"prompt": PROMPT, "model": str(pipeline), "seed": 0},
    )
    clip = read_clip(target)
    return len(clip.frames) / float(clip.fps), clip.audio.shape[-1] / clip.sample_rate


def main() -> None:
    """Run all stages and check what must hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/loop"),
        help="empty folder for everything that is made",
    )
    parser.add_argument(
        "--bank", help="speech bank folder; default is the mini-bank of the repository"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="multiply all training budgets (1 takes some eight minutes)",
    )
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        raise SystemExit(f"--folder {args.folder}: is not empty; choose another or delete it")
    start = time.time()

    def stage(name: str) -> None:
        print(f"[{time.time() - start:5.0f} s] {name}", flush=True)

    model = args.folder / "model"
    stage("codecs")
    train_codecs(model, args.folder / "runs", args.scale, args.bank)
    stage("latents")
    caches = make_caches(model, args.folder / "runs", args.scale, args.bank)
    stage("joint training")
    pipeline, losses = train_joint(model, args.folder / "runs", caches, args.scale)
    stage("generation")
    target = args.folder / "loop.mp4"
    picture, sound = speak(pipeline, target)
    stage(f"{target}: picture {picture:.3f} s, sound {sound:.3f} s")
    for modality, (first, last) in losses.items():
        print(f"held-out {modality} loss {first:.3f} -> {last:.3f}")
    if abs(picture - sound) > 0.04 or any(last >= first for first, last in losses.values()):
        raise SystemExit("the loop ran, but lengths differ or a loss did not fall")


if __name__ == "__main__":
    main()
